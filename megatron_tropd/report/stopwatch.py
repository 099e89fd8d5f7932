"""Seconds spent in the parts of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from megatron_tropd.progress.phases import Phase

_PHASES = {
    "rollout": "rollouts",
    "student": "the student's scores",
    "teacher": "the teacher's scores",
    "pack": "packing",
    "train": "learning",
    "publish": "handing on the weights",
}


def _nothing() -> None:
    """Wait for nothing."""


@dataclass(slots=True)
class Stopwatch:
    """``with watch("part")`` adds to a part; what a part inside it takes is the inner one's alone.

    ``settle`` waits for what a device has been asked to do: else its time would be that of whoever waits for it next.
    """

    settle: Callable[[], None] = _nothing
    started: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    _inner: float = 0.0  # seconds of finished parts inside the one that is being measured

    def reset(self) -> None:
        self.settle()
        self.started, self.parts, self._inner = time.perf_counter(), {}, 0.0

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self.settle()
        before, around = time.perf_counter(), self._inner
        self._inner = 0.0
        with Phase(_PHASES.get(part, part)):
            yield
        self.settle()
        seconds = time.perf_counter() - before
        self.parts[part] = self.parts.get(part, 0.0) + seconds - self._inner
        self._inner = around + seconds

    def metrics(self) -> dict[str, float]:
        """Return ``time_*`` of the step; what no part claims is ``time_other``."""
        total = time.perf_counter() - self.started
        named = {f"time_{part}": seconds for part, seconds in self.parts.items()}
        return named | {"time_step": total, "time_other": total - sum(self.parts.values())}
