"""Work for a pool of servers, and who is doing it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_tropd.errors import ServingError
from megatron_tropd.vllm_bridge.client import Server


@dataclass(eq=False, slots=True)
class Job:
    """One request that any server can answer."""

    call: Callable[[Server], Awaitable[Any]]
    cost: float  # tokens, about
    batch: JobBatch | None = None
    attempts: int = 0  # that were answered wrongly
    moves: int = 0  # servers that were lost while it was under way there
    wrong: set[Peer] = field(default_factory=set)  # who answered wrongly: others are tried first
    result: Any = None


class JobBatch:
    """Jobs handed in together; their results come in their order."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self.error: ServingError | None = None
        self.ended_at: float | None = None  # time.perf_counter() of the last result
        self._jobs = tuple(jobs)
        self._left = len(self._jobs)
        self._finished = threading.Event()
        for job in jobs:
            job.batch = self
        if not jobs:
            self._end()

    def wait(self, timeout_s: float) -> bool:
        """Wait, at most so long, and return whether all is done.

        Raises:
            ServingError: it never will be.
        """
        done = self._finished.wait(timeout_s)
        if self.error is not None:
            raise self.error
        return done

    def results(self) -> list[Any]:
        """Return the results of a batch that is done, in the order of its jobs."""
        return [job.result for job in self._jobs]

    def finish(self, job: Job, result: Any) -> None:
        """Record the result of a job. Called once for every job."""
        job.result = result
        self._left -= 1
        if self._left == 0:
            self._end()

    def fail(self, error: ServingError) -> None:
        """Record that the batch will never be done."""
        self.error = error
        self._finished.set()

    def _end(self) -> None:
        self.ended_at = time.perf_counter()
        self._finished.set()


@dataclass(eq=False, slots=True)
class Peer:
    """A server and what it is doing."""

    server: Server
    alive: bool = True
    current: bool = True  # has the weights that are wanted
    faults: int = 0  # wrong answers in a row
    losses: int = 0  # since it last answered rightly
    error: str = ""  # why it is not alive
    info: dict[str, Any] = field(default_factory=dict)  # what it said of itself at first
    tasks: dict[Job, asyncio.Task[None]] = field(default_factory=dict)
    feed: asyncio.Task[None] | None = None  # takes it through an update
    reviving: asyncio.Task[None] | None = None

    @property
    def outstanding(self) -> float:
        """Return the tokens, about, that it is working on."""
        return sum(job.cost for job in self.tasks)

    @property
    def updating(self) -> bool:
        return self.feed is not None and not self.feed.done()

    @property
    def usable(self) -> bool:
        return self.alive and self.current and not self.updating
