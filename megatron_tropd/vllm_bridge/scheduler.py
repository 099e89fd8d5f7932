"""Which job goes to which server: work spread by outstanding tokens, wrong answers tried again elsewhere.

Everything here runs in the pool's event loop. A job has one result, the first valid one: an answer that comes after
its job has moved to another server does not count.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Sequence

from megatron_tropd.config.sections import ServersConfig
from megatron_tropd.errors import ServingError
from megatron_tropd.vllm_bridge.client import Refused, Unreachable
from megatron_tropd.vllm_bridge.jobs import Job, Peer

# wrong answers in a row after which a server is left alone for a while
_WRONG_ANSWERS = 3
# a job may be under way at so many times ``attempts`` servers that are lost: then it is what ends them
_MOVES_PER_ATTEMPT = 2


class Scheduler:
    """Hand waiting jobs to the servers with the least to do.

    Args:
        lose: takes a server out, with the reason (``health.HealthMonitor.lose``).
    """

    def __init__(
        self,
        peers: Sequence[Peer],
        settings: ServersConfig,
        counts: Counter[str],
        *,
        lose: Callable[[Peer, ServingError], None],
    ) -> None:
        self._peers = peers
        self._settings = settings
        self._counts = counts
        self._lose = lose
        self._queue: deque[Job] = deque()

    @property
    def has_work(self) -> bool:
        """Say whether jobs wait or are under way."""
        return bool(self._queue) or any(peer.tasks for peer in self._peers)

    def enqueue(self, jobs: Sequence[Job]) -> None:
        """Add jobs behind those that wait."""
        self._queue.extend(jobs)
        self.pump()

    def pump(self) -> None:
        """Give waiting jobs to the servers with the least to do."""
        postponed: list[Job] = []
        while self._queue:
            usable = [peer for peer in self._peers if peer.usable]
            if not any(self._has_room(peer) for peer in usable):
                break
            job = self._queue.popleft()
            assert job.batch is not None
            if job.batch.error is not None:
                continue
            # one that has answered this job wrongly is tried again when there is no other
            suited = [peer for peer in usable if peer not in job.wrong] or usable
            room = [peer for peer in suited if self._has_room(peer)]
            if room:
                peer = min(room, key=lambda p: p.outstanding)
                peer.tasks[job] = asyncio.ensure_future(self._attempt(peer, job))
            else:
                postponed.append(job)
        self._queue.extendleft(reversed(postponed))

    def _has_room(self, peer: Peer) -> bool:
        return len(peer.tasks) < self._settings.requests

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
            peer.faults, peer.losses, peer.error = 0, 0, ""
            job.batch.finish(job, result)
        self.pump()

    def _done_by(self, peer: Peer, job: Job) -> bool:
        """Take the job off the server's list; False when it has gone to another one: only that one's answer counts."""
        return peer.tasks.pop(job, None) is not None

    def _answered_wrongly(self, peer: Peer, job: Job, error: ServingError) -> None:
        assert job.batch is not None
        self._counts["wrong"] += 1
        job.attempts += 1
        job.wrong.add(peer)
        peer.faults += 1
        if job.attempts >= self._settings.attempts:
            job.batch.fail(ServingError(f"{error} It was tried {job.attempts} times, last of {peer.server.url}."))
            return
        pause_s = min(0.1 * 2**job.attempts, 10.0)
        asyncio.get_running_loop().call_later(pause_s, self.enqueue, [job])
        if peer.faults >= _WRONG_ANSWERS:
            self._lose(peer, error)

    def requeue(self, jobs: Sequence[Job]) -> None:
        """Put the jobs of a lost server first in the queue; fail one that was under way at too many lost servers."""
        most = _MOVES_PER_ATTEMPT * self._settings.attempts
        for job in jobs:
            assert job.batch is not None
            job.moves += 1
            if job.moves >= most:
                job.batch.fail(
                    ServingError(
                        f"one request was under way at {job.moves} servers that were lost meanwhile: it may be what "
                        "ends them. Look at the servers' logs (memory, longest sequence), and lower "
                        "rollout.max_new_tokens or the servers' load."
                    )
                )
        self._queue.extendleft(reversed([job for job in jobs if job.moves < most]))

    def fail_all(self, error: ServingError) -> None:
        """End every batch that waits or is under way with this error."""
        for job in (*self._queue, *(job for peer in self._peers for job in peer.tasks)):
            assert job.batch is not None
            job.batch.fail(error)
        self._queue.clear()
