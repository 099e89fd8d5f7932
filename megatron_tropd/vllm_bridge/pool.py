"""Several servers as one: ``Pool`` is what other threads see of scheduler, health monitor and weight updates.

The pool lives in a thread of its own with an event loop; the public methods are called from other threads. A job whose
server dies, hangs or has the wrong weights goes to another one as if never tried; a job that is answered wrongly is
tried again, a few times. Nothing is lost and nothing is delivered twice.
"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from tenacity import AsyncRetrying, retry_if_exception, retry_if_exception_type, stop_after_attempt, stop_after_delay

from megatron_tropd.config.sections import ServersConfig
from megatron_tropd.errors import ServingError
from megatron_tropd.vllm_bridge.client import Refused, Server, Unreachable, new_connections
from megatron_tropd.vllm_bridge.health import BACKOFF, HealthMonitor
from megatron_tropd.vllm_bridge.jobs import Job, JobBatch, Peer
from megatron_tropd.vllm_bridge.scheduler import Scheduler
from megatron_tropd.vllm_bridge.weight_updates import Refresh, Update, WeightUpdates


class Pool:
    """See the module. ``close`` it, or its thread keeps its connections until the program ends."""

    def __init__(self, settings: ServersConfig, *, key: str = "") -> None:
        self.settings = settings
        self.counts: Counter[str] = Counter()  # moved and wrong (jobs), lost, back and refreshed (servers)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="tropd-servers", daemon=True)
        self._thread.start()
        self._connections = self.run(_connect())
        self._peers = [Peer(Server(url, self._connections, key=key)) for url in settings.urls]
        shared = (self._peers, self.settings, self.counts)
        self._scheduler = Scheduler(*shared, lose=self._lose)
        self._weights = WeightUpdates(
            self._peers, self.counts, lose=self._lose, pump=self._scheduler.pump, run=self.run
        )
        self._health = HealthMonitor(
            *shared,
            requeue=self._scheduler.requeue,
            pump=self._scheduler.pump,
            renew_weights=self._weights.renew,
            has_work=lambda: self._scheduler.has_work,
            give_up=self._scheduler.fail_all,
        )
        self._loop.call_soon_threadsafe(self._health.start)

    def _lose(self, peer: Peer, error: ServingError) -> None:
        self._health.lose(peer, error)

    # ----------------------------------------------------------------- from other threads

    def run(self, awaitable: Any) -> Any:
        """Run a coroutine in the pool's thread and return its result."""
        return asyncio.run_coroutine_threadsafe(awaitable, self._loop).result()

    def infos(self) -> dict[str, dict[str, Any]]:
        """Return what every server says of itself, by address; wait for those that are still starting.

        Raises:
            ServingError: one refuses, or does not answer for ``patience_s``.
        """
        found: dict[str, dict[str, Any]] = self.run(self._infos())
        return found

    def submit(self, jobs: Sequence[Job]) -> JobBatch:
        """Start on the jobs as soon as a server has room, after those handed in before."""
        batch = JobBatch(jobs)
        self._loop.call_soon_threadsafe(self._scheduler.enqueue, list(jobs))
        return batch

    def on_every(self, call: Callable[[Server], Awaitable[Any]]) -> dict[str, Any]:
        """Return the answer of every usable server, by address; leave out, and lose, one that gives no right one."""
        found: dict[str, Any] = self.run(self._on_every(call))
        return found

    @property
    def starved(self) -> bool:
        """Say whether servers are there, but all wait for weights."""
        alive = [peer for peer in self._peers if peer.alive]
        return bool(alive) and not any(peer.current or peer.updating for peer in alive)

    def begin_update(self, version: int, *, keep: bool, timeout_s: float) -> Update:
        """Begin to bring new weights to all servers that are alive: hand them to the ``Update``, then ``end`` it.

        ``keep``: what is being written is continued with the new weights, not dropped. ``timeout_s``: for a bucket
        to arrive.
        """
        update: Update = self.run(self._weights.start(version, "keep" if keep else "abort", timeout_s))
        return update

    def set_refresh(self, version: int, refresh: Refresh) -> None:
        """Say how a server gets the weights of ``version`` by itself when it comes back."""
        self._loop.call_soon_threadsafe(self._weights.set_refresh, version, refresh)

    def close(self) -> None:
        """Release the servers."""
        self.run(self._disconnect())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)
        if not self._thread.is_alive():
            self._loop.close()

    # ----------------------------------------------------------------- in the event loop

    async def _infos(self) -> dict[str, dict[str, Any]]:
        async def info(peer: Peer) -> dict[str, Any]:
            patient = AsyncRetrying(
                wait=BACKOFF,
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
                wait=BACKOFF,
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


def _is_wrong_answer(error: BaseException) -> bool:
    return isinstance(error, ServingError) and not isinstance(error, Unreachable | Refused)


async def _connect() -> Any:
    return new_connections()
