"""Servers that come and go: lost ones are probed for their return, silent ones are noticed, absence ends the run.

Everything here runs in the pool's event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from tenacity import AsyncRetrying, retry_if_exception_type, wait_exponential_jitter

from megatron_tropd.config.sections import ServersConfig
from megatron_tropd.errors import ServingError
from megatron_tropd.vllm_bridge.jobs import Job, Peer

_log = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 30.0
BACKOFF = wait_exponential_jitter(multiplier=0.25, max=_LONGEST_PAUSE_S)
# a server that was lost so often since its last right answer is of no use, whatever it says of its health
_USELESS_LOSSES = 2


class HealthMonitor:
    """Watch the servers of a pool.

    Args:
        requeue: takes back the jobs of a lost server.
        pump: gives waiting jobs to servers.
        renew_weights: brings a server that is back to the weights that are wanted.
        give_up: ends all work with an error; ``has_work`` says whether there is any.
    """

    def __init__(
        self,
        peers: Sequence[Peer],
        settings: ServersConfig,
        counts: Counter[str],
        *,
        requeue: Callable[[Sequence[Job]], None],
        pump: Callable[[], None],
        renew_weights: Callable[[Peer, Mapping[str, Any]], Awaitable[None]],
        has_work: Callable[[], bool],
        give_up: Callable[[ServingError], None],
    ) -> None:
        self._peers = peers
        self._settings = settings
        self._counts = counts
        self._requeue = requeue
        self._pump = pump
        self._renew_weights = renew_weights
        self._has_work = has_work
        self._give_up = give_up
        self._useless_since: float | None = None

    def start(self) -> None:
        """Begin to listen; to be called in the event loop."""
        self._watching = asyncio.ensure_future(self._heartbeat())

    def lose(self, peer: Peer, error: ServingError) -> None:
        """Take a server out: its work goes to the others, and it is probed now and then for its return."""
        if not peer.alive:
            return
        peer.alive, peer.faults, peer.error = False, 0, str(error)
        peer.losses += 1
        moved, tasks = list(peer.tasks), list(peer.tasks.values())
        _log.warning("lost a server: %s It is tried again; %d requests go to the others.", error, len(moved))
        self._counts["lost"] += 1
        self._counts["moved"] += len(moved)
        peer.tasks.clear()
        for task in (*tasks, *([peer.feed] if peer.feed is not None else [])):
            if task is not asyncio.current_task():
                task.cancel()
        self._requeue(moved)
        peer.reviving = asyncio.ensure_future(self._revive(peer))
        self._pump()

    async def _revive(self, peer: Peer) -> None:
        """Wait for a server to be well again, longer each time, and see to its weights."""
        if peer.losses > 1:  # it was back, but of no use
            await asyncio.sleep(min(0.25 * 2.0**peer.losses, _LONGEST_PAUSE_S))
        async for attempt in AsyncRetrying(wait=BACKOFF, retry=retry_if_exception_type(ServingError)):
            with attempt:
                info = await peer.server.info()
                _check_same(peer, info)
                await self._renew_weights(peer, info)
        _log.warning("%s is back", peer.server.url)
        peer.alive = True
        self._counts["back"] += 1
        self._pump()

    async def _heartbeat(self) -> None:
        """Notice servers that hang, and the absence of all that are of use."""
        while True:
            await asyncio.sleep(self._settings.heartbeat_s / 3)
            await asyncio.gather(*(self._listen(peer) for peer in self._peers if peer.alive))
            if any(peer.alive and peer.losses < _USELESS_LOSSES for peer in self._peers) or not self._expected():
                self._useless_since = None
                continue
            self._useless_since = self._useless_since or time.monotonic()
            if time.monotonic() - self._useless_since > self._settings.patience_s:
                self._end()

    def _expected(self) -> bool:
        """Say whether anybody waits: for servers to come back, or for the answers of some that are there."""
        return self._has_work() or not any(peer.alive for peer in self._peers)

    async def _listen(self, peer: Peer) -> None:
        try:
            await peer.server.alive(self._settings.heartbeat_s)
        except ServingError as error:
            self.lose(peer, error)

    def _end(self) -> None:
        reasons = " ".join(peer.error for peer in self._peers if peer.error)
        self._give_up(
            ServingError(
                f"no server has been of use for {self._settings.patience_s:g} s. {reasons} Start one (`tropd serve`) "
                "and run again: the run resumes from its last checkpoint."
            )
        )


def _check_same(peer: Peer, info: Mapping[str, Any]) -> None:
    """Raise ServingError when what came back at the address is another server than the one that went."""
    for name, was in peer.info.items():
        if name != "version" and info.get(name) != was:
            raise ServingError(
                f"{peer.server.url} has come back with {name}={info.get(name)}, it had {was}. Start it with the "
                "configuration of this run."
            )
