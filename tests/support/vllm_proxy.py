"""A network that can be made to misbehave: an HTTP proxy before one server, in a thread of the test's process.

A fault is a function of the answer, or an action beside it, that strikes the next requests for a route. Only what lies
between trainer and server is changed; both ends are real.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from megatron_tropd.vllm_bridge.wire import DIGEST, PREFIX, digest_of

CONTROL = "/proxy/"


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """A request or an answer: its first line, headers (lower case) and body."""

    start: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    cut: int | None = None  # bytes of the body after which the connection is closed

    @property
    def route(self) -> str:
        return self.start.split(" ")[1].removeprefix(PREFIX)

    def with_body(self, body: bytes, *, signed: bool) -> Message:
        """With a length that fits and, when ``signed``, a checksum that does."""
        changed = {"content-length": str(len(body))} | ({DIGEST: digest_of(body)} if signed else {})
        return replace(self, body=body, headers=tuple((n, changed.get(n, v)) for n, v in self.headers))

    def encoded(self) -> bytes:
        lines = [self.start, *(f"{name}: {value}" for name, value in self.headers)]
        return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + self.body[: self.cut]


@dataclass(kw_only=True)
class Fault:
    """What goes wrong with some of the requests for a route."""

    route: str
    answer: Callable[[Message], Message] | None = None  # what becomes of the server's answer
    before: Callable[[], None] | None = None  # done when the request has come, before the server has it
    after: Callable[[], None] | None = None  # done when the server has answered
    delay_s: float = 0.0  # by which the answer is late
    when: Callable[[], bool] = lambda: True  # before this holds, requests are let through
    skip: int = 0  # requests that are let through after that
    times: int = 1  # requests that it strikes
    struck: int = 0

    def strikes(self, route: str) -> bool:
        """Whether this request is one of them; counts it."""
        if route != self.route or self.struck >= self.times or not self.when():
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.struck += 1
        return True


class Proxy:
    """Listens on a port of its own. ``counts`` are answers that came through unharmed.

    ``faults`` are those in force. A request for ``/proxy/NUMBER`` puts ``script[NUMBER]`` in their place.
    """

    def __init__(self, port: int) -> None:
        """``port``: of the server on this host."""
        self._server_port = port
        self.faults: list[Fault] = []
        self.script: list[list[Fault]] = []
        self.counts: Counter[str] = Counter()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._listener = self._run(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = int(self._listener.sockets[0].getsockname()[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        self._run(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        self._loop.close()

    def _run(self, awaitable: Awaitable[object]) -> object:
        async def wait() -> object:
            return await awaitable

        return asyncio.run_coroutine_threadsafe(wait(), self._loop).result()

    async def _stop(self) -> None:
        self._listener.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            while await self._exchange(reader, writer):
                pass
        writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; whether the connection can be used again."""
        request = await _read(reader)
        if request.route.startswith(CONTROL):
            self.faults = self.script[int(request.route.removeprefix(CONTROL))]
            writer.write(Message(start="HTTP/1.1 200 OK", headers=(("content-length", "0"),), body=b"").encoded())
            await writer.drain()
            return True
        fault = next((fault for fault in self.faults if fault.strikes(request.route)), None)
        if fault is not None and fault.before is not None:
            fault.before()
        working = asyncio.ensure_future(self._forward(request))
        leaving = asyncio.ensure_future(reader.read(1))  # a client that leaves takes its request with it
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            working.cancel()
            return False
        answer = working.result()
        if fault is not None:
            if fault.after is not None:
                fault.after()
            await asyncio.wait((leaving,), timeout=fault.delay_s)
            answer = answer if fault.answer is None else fault.answer(answer)
        if leaving.done():
            return False
        leaving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await leaving
        writer.write(answer.encoded())
        await writer.drain()
        if fault is None:
            self.counts[request.route] += 1
        return answer.cut is None

    async def _forward(self, request: Message) -> Message:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._server_port)
        try:
            writer.write(request.encoded())
            await writer.drain()
            return await _read(reader)
        finally:
            writer.close()


async def _read(reader: asyncio.StreamReader) -> Message:
    start, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
    headers = tuple((name.strip().lower(), value.strip()) for name, _, value in (line.partition(":") for line in lines))
    length = int(dict(headers).get("content-length", 0))
    return Message(start=start, headers=headers, body=await reader.readexactly(length))
