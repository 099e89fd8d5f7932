"""A server that answers what it likes; ``tests/unit/vllm_bridge/test_hostile_server.py`` has more of its answers."""

from __future__ import annotations

import asyncio
import gzip
import json
import resource
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.attacks import Attack, Hole

_VOCAB = 40
Handler = Callable[[asyncio.StreamWriter], Awaitable[None]]


def reply(body: bytes, *, status: str = "200 OK", headers: dict[str, str] | None = None) -> bytes:
    """An HTTP answer whose digest is right."""
    from megatron_tropd.vllm_bridge.wire import DIGEST, digest_of

    lines = {"content-length": str(len(body)), DIGEST: digest_of(body), "connection": "close", **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode() + body


def asked_of(answer: bytes | Handler, call: Callable[[Any], Any], *, vocab_size: int = _VOCAB) -> Any:
    """What a client makes of a server that gives this answer to whatever it is asked."""
    from megatron_tropd.vllm_bridge.client import Server, new_connections

    async def main() -> Any:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            try:
                if callable(answer):
                    await answer(writer)
                else:
                    writer.write(answer)
                    await writer.drain()
            except (ConnectionError, asyncio.CancelledError):  # the client has left
                pass
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as listener, new_connections() as connections:
            server = Server(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}", connections)
            server._vocab_size = vocab_size
            return await call(server)

    return asyncio.run(main())


def _info(server: Any) -> Any:
    return server.info()


def _write(server: Any) -> Any:
    from megatron_tropd.types import SamplingParams
    from megatron_tropd.vllm_bridge.client import WeightSteps
    from megatron_tropd.vllm_bridge.requests import Task

    steps = WeightSteps(oldest=1, newest=lambda: 3)

    task = Task(number=3, token_ids=np.arange(5), max_new_tokens=4, seed=0)
    params = SamplingParams(max_new_tokens=4, stop_token_ids=(1,))
    return server.write(task, params, forbidden=range(_VOCAB, _VOCAB), weights=steps, timeout_s=60)


def _score(server: Any) -> Any:
    from megatron_tropd.vllm_bridge.score_requests import ScoreRequest

    return server.answer(ScoreRequest(number=7, token_ids=np.arange(4), top_k=2), timeout_s=60)


def _refused(answer: bytes | Handler, call: Callable[[Any], Any], *, most_mib: int = 64) -> str:
    """What is said of an answer, which must be one printable error, in little memory."""
    from megatron_tropd.errors import ServingError

    asked_of(_text(), _write)  # what is imported for any answer does not count
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        found = asked_of(answer, call)
    except ServingError as error:
        said = str(error)
    else:
        raise Hole(f"taken as {str(found)[:80]!r}")
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10
    if grown > most_mib:
        raise Hole(f"{grown} MiB of memory for it")
    if not said.isprintable():
        raise Hole(f"said with control characters: {said!r}")
    return said.split(" ", 1)[1][:160]


def _text(**change: Any) -> bytes:
    from megatron_tropd.vllm_bridge.wire import encoded

    good = {
        "token_ids": np.array([5, 6, 7, 1]),
        "logprob": np.full(4, -1.0, np.float32),
        "versions": np.full(4, 2),
        "finished": np.array([True]),
    }
    return reply(encoded(good | change))


def _scores(**change: Any) -> bytes:
    from megatron_tropd.vllm_bridge.wire import encoded

    good = {
        "logprob": np.full(3, -1.0, np.float32),
        "topk_ids": np.array([[1, 2], [3, 4], [5, 6]], np.int32),
        "topk_logprob": np.full((3, 2), -1.5, np.float32),
    }
    return reply(encoded(good | change))


async def _endless(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
    while True:
        writer.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
        await writer.drain()


async def _endless_head(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"x-more: " + b"y" * 0xFFFF + b"\r\n")
        await writer.drain()


def _bomb(directory: Path) -> str:
    body = gzip.compress(bytes(64 << 20), mtime=0)
    return _refused(reply(body, headers={"content-encoding": "gzip"}), _info)


def _refuses(answer: Callable[[], bytes] | Handler, call: Callable[[Any], Any]) -> Callable[[Path], str]:
    def attempt(directory: Path) -> str:
        return _refused(answer if asyncio.iscoroutinefunction(answer) else answer(), call)  # type: ignore[call-arg, operator, arg-type]

    return attempt


_MARKS = b"\x1b]0;owned\x07\x1b[2J\x9b31m\xe2\x80\xaebad \xff thing\r\n" + b"x" * 10_000

ATTACKS = tuple(
    Attack(name=name, attempt=attempt)
    for name, attempt in {
        "a body without end, to a request for text": _refuses(_endless, _write),
        "the same to one for scores": _refuses(_endless, _score),
        "headers without end": _refuses(_endless_head, _info),
        "64 MiB of zeros packed into 64 KiB": _bomb,
        "ids that are no whole numbers": _refuses(lambda: _text(token_ids=np.array([5.0, 6.0, 7.0, 1.0])), _write),
        "the id 10^9": _refuses(lambda: _text(token_ids=np.array([5, 6, 10**9, 1])), _write),
        "the weights' version 2^40": _refuses(lambda: _text(versions=np.full(4, 2**40)), _write),
        "the weights' version 2^62, in floats": _refuses(lambda: _text(versions=np.full(4, 2.0**62)), _write),
        "a top-k list with an id twice": _refuses(lambda: _scores(topk_ids=np.array([[1, 2], [3, 3], [5, 6]])), _score),
        "a top-k list of more than all mass": _refuses(
            lambda: _scores(topk_logprob=np.full((3, 2), -0.1, np.float32)), _score
        ),
        "control characters in an error": _refuses(lambda: reply(_MARKS, status="500 Oh"), _info),
        "the same in a refusal": _refuses(lambda: reply(_MARKS, status="400 No"), _info),
        "a body that was changed on the way": _refuses(
            lambda: reply(json.dumps({"vocab_size": 3}).encode(), headers={"x-tropd-digest": "0"}), _info
        ),
    }.items()
)
