"""Several servers as one: work spread by outstanding tokens, faults survived, weights kept the same everywhere.

The pool lives in a thread of its own with an event loop; the public methods are called from other threads. A job whose
server dies, hangs or has the wrong weights goes to another one as if never tried; a job that is answered wrongly is
tried again, a few times. Nothing is lost and nothing is delivered twice: a job has one result, the first valid one.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any

from tenacity import (
    AsyncRetrying,
    retry_if_exception,
    retry_if_exception_type,
    stop_after_attempt,
    stop_after_delay,
    wait_exponential_jitter,
)

from megatron_tropd.errors import ServingError
from megatron_tropd.vllm_bridge.client import Refused, Server, Unreachable, new_connections
from megatron_tropd.vllm_bridge.jobs import Batch, Job, Peer, PoolSettings

_log = logging.getLogger(__name__)

# wrong answers in a row after which a server is left alone for a while
_WRONG_ANSWERS = 3
# a server that failed at something but says within so long that it is well is not lost
_WELL_S = 5.0
_COMPLAINTS = 2
_LONGEST_PAUSE_S = 30.0
_BACKOFF = wait_exponential_jitter(multiplier=0.25, max=_LONGEST_PAUSE_S)

Refresh = Callable[[Server], Awaitable[None]]


class Pool:
    """See the module. ``close`` it, or its thread keeps its connections until the program ends."""

    def __init__(self, urls: Sequence[str], *, key: str = "", settings: PoolSettings | None = None) -> None:
        self.settings = settings or PoolSettings()
        self.counts: Counter[str] = Counter()  # moved and wrong (jobs), lost, back and refreshed (servers)
        self._queue: deque[Job] = deque()
        self._wanted: int | None = None  # version of weights; None: whatever the servers have
        self._refresh: tuple[int, Refresh] | None = None
        self._idle_since: float | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tropd-servers", daemon=True)
        self._thread.start()
        self._connections = self.run(_connect())
        self._peers = [Peer(Server(url, self._connections, key=key)) for url in urls]
        self._loop.call_soon_threadsafe(self._watch)

    # ----------------------------------------------------------------- from other threads

    def run(self, awaitable: Any) -> Any:
        """What the coroutine returns, run in the pool's thread."""
        return asyncio.run_coroutine_threadsafe(awaitable, self._loop).result()

    def infos(self) -> dict[str, dict[str, Any]]:
        """What every server says of itself, by address; waits for those that are still starting.

        Raises:
            ServingError: one refuses, or does not answer for ``patience_s``.
        """
        found: dict[str, dict[str, Any]] = self.run(self._infos())
        return found

    def submit(self, jobs: Sequence[Job]) -> Batch:
        """Starts on the jobs as soon as a server has room, after those handed in before."""
        batch = Batch(jobs)
        self._loop.call_soon_threadsafe(self._enqueue, list(jobs))
        return batch

    def on_every(self, call: Callable[[Server], Awaitable[Any]]) -> dict[str, Any]:
        """The answer of every usable server, by address; one that gives none that is right is lost, and left out."""
        found: dict[str, Any] = self.run(self._on_every(call))
        return found

    @property
    def starved(self) -> bool:
        """Whether servers are there, but all wait for weights."""
        alive = [peer for peer in self._peers if peer.alive]
        return bool(alive) and not any(peer.current or peer.updating for peer in alive)

    def begin_update(self, version: int, *, keep: bool) -> Update:
        """New weights for all servers that are alive: hand them to the ``Update``, then ``end`` it.

        ``keep``: what is being written is continued with the new weights, not dropped.
        """
        update: Update = self.run(self._begin_update(version, "keep" if keep else "abort"))
        return update

    def set_refresh(self, version: int, refresh: Refresh) -> None:
        """How a server gets the weights of ``version`` by itself when it comes back."""
        self._loop.call_soon_threadsafe(self._set_refresh, version, refresh)

    def close(self) -> None:
        """Lets go of the servers."""
        self.run(self._disconnect())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        if not self._thread.is_alive():
            self._loop.close()

    # ----------------------------------------------------------------- work

    def _enqueue(self, jobs: Sequence[Job]) -> None:
        self._queue.extend(jobs)
        self._pump()

    def _pump(self) -> None:
        """Gives waiting jobs to the servers with the least to do."""
        kept: list[Job] = []
        while self._queue:
            usable = [peer for peer in self._peers if peer.usable]
            if not any(self._has_room(peer) for peer in usable):
                break
            job = self._queue.popleft()
            assert job.batch is not None
            if job.batch.error is not None:
                continue
            # one that has answered this job wrongly is asked again when there is no other
            suited = [peer for peer in usable if peer not in job.wrong] or usable
            room = [peer for peer in suited if self._has_room(peer)]
            if room:
                peer = min(room, key=lambda p: p.outstanding)
                peer.tasks[job] = asyncio.ensure_future(self._attempt(peer, job))
            else:
                kept.append(job)
        self._queue.extendleft(reversed(kept))

    def _has_room(self, peer: Peer) -> bool:
        return len(peer.tasks) < self.settings.requests

    async def _attempt(self, peer: Peer, job: Job) -> None:
        assert job.batch is not None
        try:
            result = await job.call(peer.server)
        except Unreachable as error:
            self._lose(peer, error)  # this job is among those that move
            return
        except Exception as error:
            if not self._done_by(peer, job):
                return
            if isinstance(error, ServingError) and not isinstance(error, Refused):
                self._answered_wrongly(peer, job, error)
            else:
                fault = error if isinstance(error, ServingError) else ServingError(f"{peer.server.url}: {error!r}.")
                job.batch.fail(fault)
        else:
            if not self._done_by(peer, job):
                return
            peer.faults = peer.losses = 0
            job.batch.finish(job, result)
        self._pump()

    def _done_by(self, peer: Peer, job: Job) -> bool:
        """Takes the job off the server's list; False when it has gone to another one: only that one's answer counts."""
        return peer.tasks.pop(job, None) is not None

    def _answered_wrongly(self, peer: Peer, job: Job, error: ServingError) -> None:
        assert job.batch is not None
        self.counts["wrong"] += 1
        job.attempts += 1
        job.wrong.add(peer)
        peer.faults += 1
        if job.attempts >= self.settings.attempts:
            job.batch.fail(ServingError(f"{error} It was asked {job.attempts} times, last of {peer.server.url}."))
            return
        pause_s = min(0.1 * 2**job.attempts, 10.0)
        self._loop.call_later(pause_s, self._enqueue, [job])
        if peer.faults >= _WRONG_ANSWERS:
            self._lose(peer, error)

    # ----------------------------------------------------------------- servers that come and go

    def _lose(self, peer: Peer, error: ServingError) -> None:
        """Takes a server out: its work goes to the others, and it is asked now and then whether it is back."""
        if not peer.alive:
            return
        peer.alive, peer.faults, peer.error = False, 0, str(error)
        peer.losses += 1
        moved, tasks = list(peer.tasks), list(peer.tasks.values())
        _log.warning("lost a server: %s It is tried again; %d requests go to the others.", error, len(moved))
        self.counts["lost"] += 1
        self.counts["moved"] += len(moved)
        peer.tasks.clear()
        for task in (*tasks, *([peer.feed] if peer.feed is not None else [])):
            if task is not asyncio.current_task():
                task.cancel()
        self._queue.extendleft(reversed(moved))
        peer.reviving = asyncio.ensure_future(self._revive(peer))
        self._pump()

    async def _revive(self, peer: Peer) -> None:
        """Waits for a server to be well again, longer each time, and sees to its weights."""
        if peer.losses > 1:  # it was back, but of no use
            await asyncio.sleep(min(0.25 * 2.0**peer.losses, _LONGEST_PAUSE_S))
        async for attempt in AsyncRetrying(wait=_BACKOFF, retry=retry_if_exception_type(ServingError)):
            with attempt:
                info = await peer.server.info()
                _check_same(peer, info)
                peer.current = self._wanted is None or info["version"] == str(self._wanted)
                # newer ones may come meanwhile
                while not peer.current and self._refresh is not None and self._refresh[0] == self._wanted:
                    version, refresh = self._refresh
                    await refresh(peer.server)
                    peer.current = version == self._wanted
                    self.counts["refreshed"] += 1
        _log.warning("%s is back", peer.server.url)
        peer.alive, peer.error = True, ""
        self.counts["back"] += 1
        self._pump()

    def _set_refresh(self, version: int, refresh: Refresh) -> None:
        self._refresh = (version, refresh)
        for peer in self._peers:
            if peer.alive and not peer.current and not peer.updating:
                self._lose(peer, ServingError(f"{peer.server.url} has missed weights of step {version}."))

    def _watch(self) -> None:
        self._watching = asyncio.ensure_future(self._heartbeat())

    async def _heartbeat(self) -> None:
        """Notices servers that hang, and the absence of all."""
        while True:
            await asyncio.sleep(self.settings.heartbeat_s / 3)
            await asyncio.gather(*(self._listen(peer) for peer in self._peers if peer.alive))
            if any(peer.alive for peer in self._peers):
                self._idle_since = None
                continue
            self._idle_since = self._idle_since or time.monotonic()
            if time.monotonic() - self._idle_since > self.settings.patience_s:
                self._give_up()

    async def _listen(self, peer: Peer) -> None:
        try:
            await peer.server.alive(self.settings.heartbeat_s)
        except ServingError as error:
            self._lose(peer, error)

    def _give_up(self) -> None:
        reasons = " ".join(peer.error for peer in self._peers)
        error = ServingError(
            f"no server has been of use for {self.settings.patience_s:g} s. {reasons} Start one (`tropd serve`) and "
            "run again: the run goes on from its last checkpoint."
        )
        while self._queue:
            batch = self._queue.popleft().batch
            assert batch is not None
            batch.fail(error)

    async def _infos(self) -> dict[str, dict[str, Any]]:
        async def info(peer: Peer) -> dict[str, Any]:
            patient = AsyncRetrying(
                wait=_BACKOFF,
                retry=retry_if_exception_type(Unreachable),
                stop=stop_after_delay(self.settings.patience_s),
                reraise=True,
            )
            peer.info = await patient(peer.server.info)
            return peer.info

        found = await asyncio.gather(*(info(peer) for peer in self._peers))
        return {peer.server.url: answer for peer, answer in zip(self._peers, found, strict=True)}

    async def _on_every(self, call: Callable[[Server], Awaitable[Any]]) -> dict[str, Any]:
        async def ask(peer: Peer) -> Any:
            patient = AsyncRetrying(
                wait=_BACKOFF,
                retry=retry_if_exception(_is_wrong_answer),
                stop=stop_after_attempt(self.settings.attempts),
                before_sleep=lambda _: self.counts.update(["wrong"]),
                reraise=True,
            )
            try:
                return await patient(call, peer.server)
            except Refused:
                raise
            except ServingError as error:
                self._lose(peer, error)
                return None

        usable = [peer for peer in self._peers if peer.usable]
        answers = await asyncio.gather(*(ask(peer) for peer in usable))
        return {p.server.url: answer for p, answer in zip(usable, answers, strict=True) if answer is not None}

    async def _disconnect(self) -> None:
        tasks = [task for task in asyncio.all_tasks(self._loop) if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._connections.aclose()

    # ----------------------------------------------------------------- new weights

    async def _begin_update(self, version: int, mode: str) -> Update:
        self._wanted = version
        update = Update(self, version)
        for peer in self._peers:
            peer.current = False
            if peer.alive:
                queue = update.feeds[peer] = asyncio.Queue()
                started: asyncio.Future[bool] = self._loop.create_future()
                update.started.append(started)
                peer.feed = asyncio.ensure_future(self._feed(peer, queue, version, mode, started))
                peer.feed.add_done_callback(partial(_not_started, started))
        return update

    async def _feed(
        self, peer: Peer, queue: asyncio.Queue[Any], version: int, mode: str, started: asyncio.Future[bool]
    ) -> None:
        """Takes one server through an update."""
        timeout_s, begun = self.settings.transfer_s, False
        try:
            await _begin(peer.server, mode)
            begun = True
            started.set_result(True)
            while (item := await queue.get()) is not None:
                kind, value = item
                if kind == "abandon":
                    return
                send = peer.server.meet if kind == "meet" else peer.server.bucket
                await send(value, timeout_s=timeout_s)
            await peer.server.finish(version)
            peer.current = True
        except ServingError as error:
            if not begun:
                self._lose(peer, error)
                return
            # where a broadcast broke off because of one server, the others have failed too, and are well
            try:
                await peer.server.alive(_WELL_S)
                _log.warning("%s has not got the weights of step %d: %s", peer.server.url, version, error)
            except ServingError:
                self._lose(peer, error)
        self._loop.call_soon(self._pump)


class Update:
    """One set of weights on its way to the servers. Its methods are called from the trainer's threads."""

    def __init__(self, pool: Pool, version: int) -> None:
        self.version = version
        self.feeds: dict[Peer, asyncio.Queue[tuple[str, Mapping[str, Any]] | None]] = {}
        self.started: list[asyncio.Future[bool]] = []
        self._pool = pool

    @property
    def urls(self) -> list[str]:
        """Addresses of the servers that take part."""
        return [peer.server.url for peer in self.feeds]

    def meet(self, meetings: Mapping[str, Mapping[str, Any]]) -> None:
        """Has every server join a broadcasting group, each as its meeting (by address) says."""
        for peer in self.feeds:
            self._put(peer, ("meet", meetings[peer.server.url]))

    def bucket(self, bucket: Mapping[str, Any]) -> None:
        """The next bucket, for every server."""
        for peer in self.feeds:
            self._put(peer, ("bucket", bucket))

    def begun(self) -> bool:
        """Waits until every server is ready for weights, or has failed; whether none has."""
        return all(self._pool.run(self._begun()))

    async def _begun(self) -> list[bool]:
        return await asyncio.gather(*self.started)

    @property
    def intact(self) -> bool:
        """Whether no server has dropped out so far."""
        return not any(peer.feed is None or peer.feed.done() for peer in self.feeds)

    @property
    def left(self) -> int:
        """How many of them are there."""
        return sum(peer.alive for peer in self.feeds)

    def end(self, *, complete: bool = True) -> list[str]:
        """Waits until every server has the weights, or will not get them; addresses of those that have them.

        ``complete``: False where some could not be sent: then nobody is to have them.
        """
        for peer in self.feeds:
            self._put(peer, None if complete else ("abandon", {}))
        self._pool.run(self._ended())
        return [peer.server.url for peer in self.feeds if peer.usable]

    async def _ended(self) -> None:
        await asyncio.gather(*(peer.feed for peer in self.feeds if peer.feed is not None), return_exceptions=True)

    def _put(self, peer: Peer, item: tuple[str, Mapping[str, Any]] | None) -> None:
        self._pool._loop.call_soon_threadsafe(self.feeds[peer].put_nowait, item)


def _not_started(started: asyncio.Future[bool], feed: asyncio.Task[None]) -> None:
    """What is said when a feed has ended, however early."""
    if not started.done():
        started.set_result(False)


async def _begin(server: Server, mode: str) -> None:
    """Begins an update; what one that broke off has left to complain of comes out with the next requests."""
    for _ in range(_COMPLAINTS):
        try:
            return await server.begin(mode)
        except Unreachable:
            await server.alive(_WELL_S)
    return await server.begin(mode)


def _is_wrong_answer(error: BaseException) -> bool:
    return isinstance(error, ServingError) and not isinstance(error, Unreachable | Refused)


def _check_same(peer: Peer, info: Mapping[str, Any]) -> None:
    """ServingError when what came back at the address is another server than the one that went."""
    for name, was in peer.info.items():
        if name != "version" and info.get(name) != was:
            raise ServingError(
                f"{peer.server.url} has come back with {name}={info.get(name)}, it had {was}. Start it with the "
                "configuration of this run."
            )


async def _connect() -> Any:
    return new_connections()
