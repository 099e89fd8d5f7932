"""New weights on their way to servers: who is being updated, who missed an update and how that is made good.

``WeightUpdates`` runs in the pool's event loop; the methods of an ``Update`` are called from the trainer's threads.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any

from megatron_tropd.errors import ServingError
from megatron_tropd.vllm_bridge.client import Server, Unreachable
from megatron_tropd.vllm_bridge.jobs import Peer

_log = logging.getLogger(__name__)

# a server that failed at something but says within so long that it is well is not lost
_WELL_S = 5.0
_COMPLAINTS = 2

Refresh = Callable[[Server], Awaitable[None]]
Run = Callable[[Coroutine[Any, Any, Any]], Any]  # what the coroutine returns, run in the pool's thread


class WeightUpdates:
    """Keep the weights of all servers the same.

    Args:
        lose: takes a server out, with the reason; ``pump`` gives waiting jobs to servers; ``run``: see ``Run``.
    """

    def __init__(
        self,
        peers: Sequence[Peer],
        counts: Counter[str],
        *,
        lose: Callable[[Peer, ServingError], None],
        pump: Callable[[], None],
        run: Run,
    ) -> None:
        self._peers = peers
        self._counts = counts
        self._lose = lose
        self._pump = pump
        self._run = run
        self._wanted: int | None = None  # version of weights; None: whatever the servers have
        self._refresh: tuple[int, Refresh] | None = None

    def set_refresh(self, version: int, refresh: Refresh) -> None:
        """Remember how a server gets the weights of ``version`` by itself; lose those that have missed them."""
        self._refresh = (version, refresh)
        for peer in self._peers:
            if peer.alive and not peer.current and not peer.updating:
                self._lose(peer, ServingError(f"{peer.server.url} has missed weights of step {version}."))

    async def renew(self, peer: Peer, info: Mapping[str, Any]) -> None:
        """Bring a server that is back to the weights that are wanted, where it can get them by itself."""
        peer.current = self._wanted is None or info["version"] == str(self._wanted)
        # newer ones may come meanwhile
        while not peer.current and self._refresh is not None and self._refresh[0] == self._wanted:
            version, refresh = self._refresh
            await refresh(peer.server)
            peer.current = version == self._wanted
            self._counts["refreshed"] += 1

    async def start(self, version: int, mode: str, timeout_s: float) -> Update:
        """Start an update of all servers that are alive.

        ``mode``: abort or keep what is being written. ``timeout_s``: for a bucket to arrive.
        """
        self._wanted = version
        update = Update(self._run, version)
        for peer in self._peers:
            peer.current = False
            if peer.alive:
                update.feeds[peer] = asyncio.Queue()
                started: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
                update.started.append(started)
                peer.feed = asyncio.ensure_future(self._feed(peer, update, mode, timeout_s, started))
                peer.feed.add_done_callback(partial(_not_started, started))
        return update

    async def _feed(
        self, peer: Peer, update: Update, mode: str, timeout_s: float, started: asyncio.Future[bool]
    ) -> None:
        """Take one server through an update."""
        queue, version, ready = update.feeds[peer], update.version, False
        try:
            await _begin(peer.server, mode)
            ready = True
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
            if not ready:
                self._lose(peer, error)
                return
            # where a broadcast broke off because of one server, the others have failed too, and are well
            try:
                await peer.server.alive(_WELL_S)
                _log.warning("%s has not got the weights of step %d: %s", peer.server.url, version, error)
            except ServingError:
                self._lose(peer, error)
        asyncio.get_running_loop().call_soon(self._pump)


class Update:
    """One set of weights on its way to the servers. Its methods are called from the trainer's threads."""

    def __init__(self, run: Run, version: int) -> None:
        self.version = version
        self.feeds: dict[Peer, asyncio.Queue[tuple[str, Mapping[str, Any]] | None]] = {}
        self.started: list[asyncio.Future[bool]] = []
        self._run = run

    @property
    def urls(self) -> list[str]:
        """Return the addresses of the servers that take part."""
        return [peer.server.url for peer in self.feeds]

    def meet(self, meetings: Mapping[str, Mapping[str, Any]]) -> None:
        """Let every server join a broadcasting group, each as its meeting (by address) says."""
        for peer in self.feeds:
            self._put(peer, ("meet", meetings[peer.server.url]))

    def bucket(self, bucket: Mapping[str, Any]) -> None:
        """Send the next bucket to every server."""
        for peer in self.feeds:
            self._put(peer, ("bucket", bucket))

    def wait_ready(self) -> bool:
        """Wait until every server is ready for weights, or has failed; return whether none has."""
        return all(self._run(self._wait_all()))

    async def _wait_all(self) -> list[bool]:
        return await asyncio.gather(*self.started)

    @property
    def intact(self) -> bool:
        """Say whether no server has dropped out so far."""
        return not any(peer.feed is None or peer.feed.done() for peer in self.feeds)

    @property
    def left(self) -> int:
        """Return how many of them are there."""
        return sum(peer.alive for peer in self.feeds)

    def end(self, *, complete: bool = True) -> list[str]:
        """Wait until every server has the weights, or will not get them; return the addresses of those that have them.

        ``complete``: False where some could not be sent: then nobody is to have them.
        """
        for peer in self.feeds:
            self._put(peer, None if complete else ("abandon", {}))
        self._run(self._ended())
        return [peer.server.url for peer in self.feeds if peer.usable]

    async def _ended(self) -> None:
        await asyncio.gather(*(peer.feed for peer in self.feeds if peer.feed is not None), return_exceptions=True)

    def _put(self, peer: Peer, item: tuple[str, Mapping[str, Any]] | None) -> None:
        self._run(self.feeds[peer].put(item))


def _not_started(started: asyncio.Future[bool], feed: asyncio.Task[None]) -> None:
    """Report an update as not started when its feed has ended, however early."""
    if not started.done():
        started.set_result(False)


async def _begin(server: Server, mode: str) -> None:
    """Start an update; what one that broke off has left to complain of comes out with the next requests."""
    for _ in range(_COMPLAINTS):
        try:
            return await server.start(mode)
        except Unreachable:
            await server.alive(_WELL_S)
    return await server.start(mode)
