"""One server, as the trainer sees it. The API key goes to the configured address and nowhere else."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
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
_PASSING = (408, 425, 429)  # what a proxy says where asking again later may help


class Unreachable(ServingError):
    """The server is down, hangs, fails, or has not the weights it should have: others may do its work."""


class Refused(ServingError):
    """The server does not do what is asked, and never will: no other is likely to."""


def new_connections() -> http.AsyncClient:
    """Connections without a limit on their number, without proxies or keys from the environment, without redirects."""
    limits = http.Limits(max_connections=None, max_keepalive_connections=None)
    return http.AsyncClient(trust_env=False, follow_redirects=False, limits=limits, timeout=_CONTROL_S)


class Server:
    """What one server can be asked. Every method raises Unreachable, Refused, or ServingError for a wrong answer."""

    def __init__(self, url: str, connections: http.AsyncClient, *, key: str = "") -> None:
        self.url = url.rstrip("/")
        self._connections = connections
        self._headers = {"authorization": f"Bearer {key}"} if key else {}

    async def alive(self, timeout_s: float) -> None:
        """Returns when the server says that it is well."""
        await self._ask("GET", "/health", None, timeout_s, key=False)

    async def info(self) -> dict[str, Any]:
        """What ``app`` says of the server."""
        return self._object(await self._ask("GET", PREFIX + "info", None, _CONTROL_S))

    async def write(
        self, task: Task, params: SamplingParams, *, forbidden: range, oldest: int, timeout_s: float
    ) -> Written:
        """Continues one task with weights of step ``oldest`` or later."""
        options = sampling_options(params, task, forbidden=forbidden)
        asked = {"token_ids": task.token_ids.tolist(), "options": options}
        response = await self._ask("POST", PREFIX + "write", asked, timeout_s)
        names = ("token_ids", "logprob", "versions", "finished")
        arrays = decoded(response.content, response.headers.get(DIGEST), names)
        versions = arrays["versions"]
        if len(versions) and versions.min() < oldest:
            raise Unreachable(
                f"{self.url} wrote with weights of step {versions.min()} (-1: those it started with), not {oldest}: "
                "it has restarted, or another program has changed its weights."
            )
        written = Written(
            token_ids=arrays["token_ids"],
            logprob_n=arrays["logprob"],
            version_n=versions,
            finished=bool(arrays["finished"].any()),
        )
        return checked_written(written, task, params)

    async def grade(self, token_ids: Int64Array, *, number: int = 0, top_k: int = 0, timeout_s: float) -> TeacherScores:
        """Log-probs of the tokens after the first, and of their likeliest alternatives."""
        return await self.answer(ScoreRequest(number=number, token_ids=token_ids, top_k=top_k), timeout_s=timeout_s)

    async def answer(self, question: ScoreRequest, *, timeout_s: float) -> TeacherScores:
        """What the server's model says of a sequence."""
        response = await self._ask("POST", PREFIX + "grade", question.as_json(), timeout_s)
        whole = ("query_logprob", "entropy", "logtail") if question.whole is not None else ()
        names = ("logprob", "topk_ids", "topk_logprob", *whole)
        arrays = decoded(response.content, response.headers.get(DIGEST), names)
        arrays["topk_ids"] = arrays["topk_ids"].astype(np.int64)
        return checked_answer(TeacherScores(**arrays), question)

    async def begin(self, mode: str) -> None:
        """Stops generation and gets ready for new weights."""
        await self._ask("POST", PREFIX + "begin", {"mode": mode}, _CONTROL_S)

    async def meet(self, meeting: Mapping[str, Any], *, timeout_s: float) -> None:
        """Has the server's workers join a broadcasting group."""
        await self._ask("POST", PREFIX + "meet", dict(meeting), timeout_s)

    async def bucket(self, bucket: Mapping[str, Any], *, timeout_s: float) -> None:
        """Has the server take one bucket of weights."""
        await self._ask("POST", PREFIX + "bucket", dict(bucket), timeout_s)

    async def finish(self, version: int) -> None:
        """Makes the weights those of ``version`` and goes on generating."""
        await self._ask("POST", PREFIX + "finish", {"version": version}, _CONTROL_S)

    def _object(self, response: http.Response) -> dict[str, Any]:
        try:
            if response.headers.get(DIGEST) != digest_of(response.content):
                raise ValueError("the checksum does not match")
            found = json.loads(response.content)
            return dict(found)
        except (ValueError, TypeError) as error:
            raise ServingError(f"{self.url} gave an answer that cannot be read ({error}).") from error

    async def _ask(
        self, method: str, path: str, asked: Mapping[str, Any] | None, timeout_s: float, *, key: bool = True
    ) -> http.Response:
        headers = self._headers if key else {}
        try:
            async with asyncio.timeout(timeout_s):  # for the whole answer: httpx's own limit starts anew at every byte
                response = await self._connections.request(
                    method, self.url + path, json=asked, headers=headers, timeout=timeout_s
                )
        except (TimeoutError, http.TimeoutException) as error:
            raise Unreachable(f"{self.url}{path} gave no answer within {timeout_s:g} s.") from error
        except http.TransportError as error:
            raise Unreachable(f"{self.url}{path} cannot be reached: {error!r}.") from error
        except http.RequestError as error:
            raise ServingError(f"{self.url}{path} gave an answer that cannot be read: {error!r}.") from error
        if response.status_code == 401:
            raise Refused(f"{self.url} does not accept the API key. Give trainer and server the same one.")
        if response.status_code >= 500 or response.status_code in _PASSING:
            raise Unreachable(f"{self.url}{path} failed ({response.status_code}): {_excerpt(response)}")
        if response.status_code != 200:
            raise Refused(f"{self.url}{path} refused ({response.status_code}): {_excerpt(response)}")
        return response


def _excerpt(response: http.Response) -> str:
    return response.text[:500]
