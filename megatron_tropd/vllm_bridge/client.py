"""One server, as the trainer sees it. The API key goes to the configured address and nowhere else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx2 as http
import numpy as np

from megatron_tropd.errors import ServingError
from megatron_tropd.types import Int64Array, SamplingParams
from megatron_tropd.vllm_bridge.requests import (
    Task,
    TeacherScores,
    Written,
    checked_written,
    sampling_options,
)
from megatron_tropd.vllm_bridge.score_requests import ScoreRequest, checked_answer
from megatron_tropd.vllm_bridge.wire import DIGEST, PREFIX, decoded, digest_of

_CONTROL_S = 60.0  # for requests that compute nothing
_CONTROL_BYTES = 1 << 20  # of their answers
_EXCERPT = 500  # characters of an error that are shown
_PASSING = (408, 425, 429)  # what a proxy says where asking again later may help


class Unreachable(ServingError):
    """The server is down, hangs, fails, or has not the weights it should have: others may do its work."""


class Refused(ServingError):
    """The server does not do what is requested, and never will: no other is likely to."""


def new_connections() -> http.AsyncClient:
    """Make connections without a limit on their number, without proxies or keys from the environment, without
    redirects.
    """
    limits = http.Limits(max_connections=None, max_keepalive_connections=None)
    return http.AsyncClient(trust_env=False, follow_redirects=False, limits=limits, timeout=_CONTROL_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSteps:
    """The steps whose weights may have written an answer."""

    oldest: int
    newest: Callable[[], int]  # when the answer is there: newer weights may come meanwhile

    def may_be(self, step: int) -> bool:
        return self.oldest <= step <= self.newest()


def _farthest(versions: np.ndarray, oldest: int) -> int:
    """Return the earliest version where it is too early, else the latest."""
    return int(versions.min() if versions.min() < oldest else versions.max())


class Server:
    """A client of one server. Every method raises Unreachable, Refused, or ServingError for a wrong answer."""

    def __init__(self, url: str, connections: http.AsyncClient, *, key: str = "") -> None:
        self.url = url.rstrip("/")
        self._connections = connections
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._vocab_size: int | None = None  # as it says of itself

    async def alive(self, timeout_s: float) -> None:
        """Return when the server says that it is well."""
        await self._ask("GET", "/health", None, timeout_s, key=False)

    async def info(self) -> dict[str, Any]:
        """Return what ``app`` reports of the server."""
        found = self._object(await self._ask("GET", PREFIX + "info", None, _CONTROL_S))
        if isinstance(found.get("vocab_size"), int):
            self._vocab_size = found["vocab_size"]
        return found

    async def write(
        self, task: Task, params: SamplingParams, *, forbidden: range, weights: WeightSteps, timeout_s: float
    ) -> Written:
        """Continue one task with weights of the steps that may be."""
        options = sampling_options(params, task, forbidden=forbidden)
        payload = {"token_ids": task.token_ids.tolist(), "options": options}
        response = await self._ask(
            "POST", PREFIX + "write", payload, timeout_s, most_bytes=_answer_bytes(task.max_new_tokens, 8 + 4 + 8)
        )
        names = ("token_ids", "logprob", "versions", "finished")
        arrays = decoded(response.body, response.digest, names)
        versions = arrays["versions"]
        self._check_ids(arrays["token_ids"], task.number, below=forbidden.start)
        if len(versions) and not weights.may_be(strange := _farthest(versions, weights.oldest)):
            raise Unreachable(
                f"{self.url} wrote with weights of step {strange} (-1: those it started with), not {weights.oldest}: "
                "it has restarted, or another program has changed its weights."
            )
        written = Written(
            token_ids=arrays["token_ids"],
            logprob_n=arrays["logprob"],
            version_n=versions,
            finished=bool(arrays["finished"].any()),
        )
        return checked_written(written, task, params)

    async def score(self, token_ids: Int64Array, *, number: int = 0, top_k: int = 0, timeout_s: float) -> TeacherScores:
        """Return log-probs of the tokens after the first, and of their likeliest alternatives."""
        return await self.answer(ScoreRequest(number=number, token_ids=token_ids, top_k=top_k), timeout_s=timeout_s)

    async def answer(self, request: ScoreRequest, *, timeout_s: float) -> TeacherScores:
        """Return the scores of a sequence by the server's model."""
        columns = request.top_k + (0 if request.whole is None else request.whole.query_ids.shape[1] + 2)
        most = _answer_bytes(len(request.token_ids), 4 + 8 * columns)
        response = await self._ask("POST", PREFIX + "score", request.as_json(), timeout_s, most_bytes=most)
        whole = ("query_logprob", "entropy", "logtail") if request.whole is not None else ()
        names = ("logprob", "topk_ids", "topk_logprob", *whole)
        arrays = decoded(response.body, response.digest, names)
        self._check_ids(arrays["topk_ids"], request.number, below=self._vocab_size)
        arrays["topk_ids"] = arrays["topk_ids"].astype(np.int64)
        return checked_answer(TeacherScores(**arrays), request)

    async def start(self, mode: str) -> None:
        """Stop generation and get ready for new weights."""
        await self._ask("POST", PREFIX + "start", {"mode": mode}, _CONTROL_S)

    async def meet(self, meeting: Mapping[str, Any], *, timeout_s: float) -> None:
        """Let the server's workers join a broadcasting group."""
        await self._ask("POST", PREFIX + "meet", dict(meeting), timeout_s)

    async def bucket(self, bucket: Mapping[str, Any], *, timeout_s: float) -> None:
        """Let the server take one bucket of weights."""
        await self._ask("POST", PREFIX + "bucket", dict(bucket), timeout_s)

    async def finish(self, version: int) -> None:
        """Make the weights those of ``version`` and resume generation."""
        await self._ask("POST", PREFIX + "finish", {"version": version}, _CONTROL_S)

    def _check_ids(self, ids: np.ndarray, number: int, *, below: int | None) -> None:
        """Raise ServingError for ids that are no whole numbers from 0 to ``below``."""
        largest = None if ids.size == 0 or ids.dtype.kind not in "iu" else int(ids.max())
        if ids.dtype.kind not in "iu" or (below is not None and largest is not None and largest >= below):
            raise ServingError(
                f"{self.url} answered sequence {number} with ids of type {ids.dtype} up to {largest}; there are "
                f"{below} ids."
            )

    def _object(self, response: _Reply) -> dict[str, Any]:
        try:
            if response.digest != digest_of(response.body):
                raise ValueError("the checksum does not match")
            found = json.loads(response.body)
            return dict(found)
        except (ValueError, TypeError) as error:
            raise ServingError(f"{self.url} gave an answer that cannot be read ({error}).") from error

    async def _ask(
        self,
        method: str,
        path: str,
        payload: Mapping[str, Any] | None,
        timeout_s: float,
        *,
        key: bool = True,
        most_bytes: int = _CONTROL_BYTES,
    ) -> _Reply:
        # nothing is unpacked: a small body may be a large one compressed
        headers = {"accept-encoding": "identity", **(self._headers if key else {})}
        try:
            async with asyncio.timeout(timeout_s):  # for the whole answer: httpx's own limit starts anew at every byte
                request = self._connections.build_request(
                    method, self.url + path, json=payload, headers=headers, timeout=timeout_s
                )
                response = await self._connections.send(request, stream=True)
                try:
                    reply = await self._read(response, path, most_bytes)
                finally:
                    await response.aclose()
        except (TimeoutError, http.TimeoutException) as error:
            raise Unreachable(f"{self.url}{path} gave no answer within {timeout_s:g} s.") from error
        except http.TransportError as error:
            raise Unreachable(f"{self.url}{path} cannot be reached: {error!r}.") from error
        except http.RequestError as error:
            raise ServingError(f"{self.url}{path} gave an answer that cannot be read: {error!r}.") from error
        if reply.status == 401:
            raise Refused(f"{self.url} does not accept the API key. Give trainer and server the same one.")
        if reply.status >= 500 or reply.status in _PASSING:
            raise Unreachable(f"{self.url}{path} failed ({reply.status}): {reply.excerpt}")
        if reply.status != 200:
            raise Refused(f"{self.url}{path} refused ({reply.status}): {reply.excerpt}")
        return reply

    async def _read(self, response: http.Response, path: str, most_bytes: int) -> _Reply:
        """Read a body of at most so many bytes, as it comes over the wire."""
        encoding = response.headers.get("content-encoding", "identity")
        if encoding != "identity":
            raise ServingError(f"{self.url}{path} gave an answer in the encoding {_shown(encoding)}: none was allowed.")
        parts: list[bytes] = []
        left = most_bytes
        async for part in response.aiter_raw():
            left -= len(part)
            if left < 0:
                raise ServingError(
                    f"{self.url}{path} gave an answer of more than {most_bytes:,} bytes, more than was requested."
                )
            parts.append(part)
        return _Reply(response.status_code, b"".join(parts), response.headers.get(DIGEST))


@dataclass(frozen=True, slots=True)
class _Reply:
    """A whole answer."""

    status: int
    body: bytes
    digest: str | None

    @property
    def excerpt(self) -> str:
        """Return the first characters of a text, fit for a terminal."""
        return _shown(self.body[: 4 * _EXCERPT].decode("utf-8", errors="replace"))[:_EXCERPT]


def _shown(text: str) -> str:
    """Replace control characters: the text comes from elsewhere, and is printed here."""
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def _answer_bytes(rows: int, row_bytes: int) -> int:
    """Bound the bytes of an answer of so many rows, with as much again for names, shapes and wider types."""
    return 2 * rows * row_bytes + (1 << 16)
