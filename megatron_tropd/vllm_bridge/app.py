"""Inside vLLM's HTTP server: authorization, and the trainer's own requests.

``--middleware megatron_tropd.vllm_bridge.app.Tropd`` puts this in front of vLLM's routes. Everything but ``/health``
needs the key (vLLM's own ``--api-key`` leaves the routes that change weights open, so they are not switched on here).
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import json
import os
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, TypeAlias

import numpy as np
from vllm import SamplingParams
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest

from megatron_tropd.vllm_bridge.requests import scoring_options
from megatron_tropd.vllm_bridge.score_requests import ScoreRequest, answer_of
from megatron_tropd.vllm_bridge.wire import DIGEST, PREFIX, digest_of, encoded

KEY_VARIABLE = "TROPD_SERVER_KEY"
WEIGHTS_VARIABLE = "TROPD_SERVER_WEIGHTS"
_OPEN = ("/health",)

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Answer: TypeAlias = Mapping[str, Any] | bytes


class Tropd:
    """ASGI middleware."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app
        self._key = os.environ.get(KEY_VARIABLE, "")
        self._numbers = itertools.count()
        self._routes: dict[str, Callable[[Any, Mapping[str, Any]], Awaitable[Answer]]] = {
            "info": _info,
            "write": self._write,
            "score": self._score,
            "start": _start,
            "meet": _meet,
            "bucket": _bucket,
            "finish": _finish,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        if scope["type"] == "lifespan" or path in _OPEN:
            await self._app(scope, receive, send)
        elif not self._is_allowed(scope):
            await _reply(send, 401, {"error": "the API key is missing or wrong"})
        elif scope["type"] == "http" and path.removeprefix(PREFIX) in self._routes and path.startswith(PREFIX):
            await self._serve(self._routes[path.removeprefix(PREFIX)], scope["app"].state.engine_client, receive, send)
        else:
            await self._app(scope, receive, send)

    def _is_allowed(self, scope: Scope) -> bool:
        sent = next((value for name, value in scope.get("headers", ()) if name == b"authorization"), b"")
        return not self._key or hmac.compare_digest(sent, f"Bearer {self._key}".encode())

    async def _serve(
        self, route: Callable[[Any, Mapping[str, Any]], Awaitable[Answer]], engine: Any, receive: Receive, send: Send
    ) -> None:
        """Answer one request; a client that leaves takes its work with it."""
        try:
            request = json.loads(await _body(receive) or b"{}")
            working = asyncio.ensure_future(route(engine, request))
            leaving = asyncio.ensure_future(_disconnected(receive))
            await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
            leaving.cancel()
            if not working.done():
                working.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await working
                return
            await _reply(send, 200, working.result())
        except (ValueError, TypeError, KeyError) as error:  # what was requested cannot be done, now or later
            await _reply(send, 400, {"error": f"{type(error).__name__}: {error}"})
        except Exception as error:  # the client must hear of whatever else goes wrong, and goes to another server
            await _reply(send, 500, {"error": f"{type(error).__name__}: {error}"})

    async def _write(self, engine: Any, request: Mapping[str, Any]) -> bytes:
        """Continue ``token_ids`` as the ``options`` of ``vllm.SamplingParams`` say."""
        options = dict(request["options"])
        if "logit_bias" in options:  # JSON has no whole numbers for keys
            options["logit_bias"] = {int(token): bias for token, bias in options["logit_bias"].items()}
        output = (await self._final(engine, request["token_ids"], SamplingParams(**options))).outputs[0]
        token_ids = np.asarray(output.token_ids, dtype=np.int64)
        versions = np.full(len(token_ids), -1, dtype=np.int64)  # weights that no trainer has sent
        for span in output.weight_versions or ():
            if span.version.isdecimal():
                versions[span.start : span.end] = int(span.version)
        logprobs = [entry[token].logprob for token, entry in zip(token_ids.tolist(), output.logprobs, strict=True)]
        return encoded(
            {
                "token_ids": token_ids,
                "logprob": np.asarray(logprobs, dtype=np.float32),
                "versions": versions,
                "finished": np.asarray([output.finish_reason == "stop"]),
            }
        )

    async def _score(self, engine: Any, request: Mapping[str, Any]) -> bytes:
        """Return log-probs of the tokens of ``token_ids`` and of their alternatives: see
        ``score_requests.ScoreRequest``.
        """
        wanted = ScoreRequest.of_json(request)
        options = SamplingParams(**scoring_options(wanted.columns), flat_logprobs=True)
        flat = (await self._final(engine, request["token_ids"], options)).prompt_logprobs
        # all ids of a long sequence take a while, in which others should be answered too
        scores = await asyncio.to_thread(answer_of, wanted, flat.token_ids, flat.logprobs)
        found = {name: getattr(scores, name) for name in scores.__slots__}
        found["topk_ids"] = scores.topk_ids.astype(np.int32)
        return encoded({name: array for name, array in found.items() if array is not None})

    async def _final(self, engine: Any, token_ids: list[int], options: SamplingParams) -> Any:
        output = None
        name = f"tropd-{next(self._numbers)}"
        async for output in engine.generate({"prompt_token_ids": token_ids}, options, name):  # noqa: B007
            pass
        if output is None:
            raise RuntimeError("the engine ended without an answer")
        return output


async def _info(engine: Any, request: Mapping[str, Any]) -> Answer:
    """Return what the trainer must know before it relies on this server."""
    config, model = engine.vllm_config, engine.vllm_config.model_config
    return {
        "model": str(model.model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "vocab_size": model.get_vocab_size(),
        "max_model_len": model.max_model_len,
        "max_logprobs": model.max_logprobs,
        "logprobs_mode": str(getattr(model.logprobs_mode, "value", model.logprobs_mode)),
        "workers": config.parallel_config.world_size,
        "takes_weights": config.weight_transfer_config is not None,
        "version": await engine.get_weight_version(),
        "weights": os.environ.get(WEIGHTS_VARIABLE) or None,  # fingerprint of those it was started with
    }


async def _start(engine: Any, request: Mapping[str, Any]) -> Answer:
    """Stop generation (``mode``: abort or keep what is being written) and get ready for new weights."""
    await engine.pause_generation(mode=request["mode"])
    await engine.update_weight_version("incomplete")  # until it is finished the weights are nobody's
    await engine.collective_rpc("close_open_update")
    await engine.start_weight_update()
    return {}


async def _meet(engine: Any, request: Mapping[str, Any]) -> Answer:
    """Join the group that broadcasts weights: see ``worker.Meeting``."""
    await engine.init_weight_transfer_engine(WeightTransferInitRequest(init_info=dict(request)))
    return {}


async def _bucket(engine: Any, request: Mapping[str, Any]) -> Answer:
    """Take one bucket: see ``worker.Bucket``."""
    await engine.update_weights(WeightTransferUpdateRequest(update_info=dict(request)))
    return {}


async def _finish(engine: Any, request: Mapping[str, Any]) -> Answer:
    """Make the weights the ones of ``version``; nothing computed with older ones is used again."""
    await engine.finish_weight_update(str(request["version"]))
    if not await engine.reset_prefix_cache(reset_running_requests=True):
        raise RuntimeError("the prefix cache could not be emptied: it holds what older weights have computed")
    await engine.resume_generation()
    return {}


async def _body(receive: Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _reply(send: Send, status: int, answer: Answer) -> None:
    body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    kind = b"application/octet-stream" if isinstance(answer, bytes) else b"application/json"
    headers = [(b"content-type", kind), (b"content-length", str(len(body)).encode())]
    headers.append((DIGEST.encode(), digest_of(body).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
