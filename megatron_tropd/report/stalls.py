"""Watch for runs that train on without learning: each kind is warned of once, with its numbers and likely causes."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

_log = logging.getLogger(__name__)

WINDOW = 5  # steps whose mean counts: one step may be anything
LEAST_UNFINISHED = 0.5  # of a step's sequences
LEAST_ENTROPY = 1 / 3  # of what it was at first, and
LEAST_OF_TEACHER = 0.5  # of the teacher's
RISE, LEAST_RISE = 2.0, 0.05  # of the outliers: times the least they have been, and how much more of all tokens


@dataclass(slots=True)
class Course:
    """Means of a metric over ``WINDOW`` steps: the first, the least and the last; None before there are so many."""

    first: float | None = None
    least: float | None = None
    last: float | None = None
    _window: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def add(self, value: float) -> None:
        """Take the value of a step."""
        self._window.append(value)
        if len(self._window) == WINDOW:
            self.last = sum(self._window) / WINDOW
            self.first = self.last if self.first is None else self.first
            self.least = self.last if self.least is None else min(self.least, self.last)


def _cut_off(courses: Mapping[str, Course]) -> str | None:
    """Describe responses that end at their budget."""
    finished = courses["finished_fraction"].last
    if finished is None or 1 - finished < LEAST_UNFINISHED:
        return None
    length = courses["response_length"].last
    tokens = "" if length is None else f", {length:.0f} tokens long on average,"
    return (
        f"{1 - finished:.0%} of the responses{tokens} were cut off by their budget. Likely causes: "
        "rollout.max_new_tokens is less than an answer takes; the student repeats itself (look at samples: "
        "report.samples_every); the end token of its template is none that it was trained to write (tropd check "
        "lists the ends)"
    )


def _collapsing(courses: Mapping[str, Course]) -> str | None:
    """Describe an entropy that has left the teacher's behind on its way to nothing."""
    own = courses["student_entropy"]
    teacher = courses["teacher_entropy"].last
    if own.first is None or own.last is None or teacher is None:
        return None
    if own.last > LEAST_ENTROPY * own.first or own.last > LEAST_OF_TEACHER * teacher:
        return None
    return (
        f"the student's entropy has fallen from {own.first:.3g} to {own.last:.3g} nats per token, below half of the "
        f"teacher's {teacher:.3g}. Likely causes: optimizer.lr is too high; rollout.temperature is below 1, so that it "
        "learns from its likeliest words alone; reverse KL, which seeks one mode: fkl, or a method with forward KL on "
        "outliers (tropd), keeps more"
    )


def _leaving(courses: Mapping[str, Course]) -> str | None:
    """Describe outliers that become more."""
    share = courses["outlier_fraction"]
    if share.least is None or share.last is None:
        return None
    if share.last < RISE * share.least or share.last < share.least + LEAST_RISE:
        return None
    return (
        f"{share.last:.1%} of the student's tokens are outliers, after {share.least:.1%} when they were fewest. Likely "
        "causes: optimizer.lr is too high, or its warm-up too short; prefixes have become shorter, and the student "
        "writes alone (report, teacher prefix); responses have become longer than those it learned from; another "
        "source of prompts"
    )


STALLS: Mapping[str, Callable[[Mapping[str, Course]], str | None]] = {
    "length": _cut_off,
    "entropy": _collapsing,
    "outliers": _leaving,
}
_METRICS = ("finished_fraction", "response_length", "student_entropy", "teacher_entropy", "outlier_fraction")


class StallMonitor:
    """Warn once of each of ``STALLS``. The sampler's mismatch, and a student that cannot be moved, have their own."""

    def __init__(self) -> None:
        self._courses = {name: Course() for name in _METRICS}
        self._said: set[str] = set()

    def check(self, metrics: Mapping[str, float]) -> None:
        """Check the metrics of a step; to be called with those of every step."""
        for name, course in self._courses.items():
            value = metrics.get(name)
            if value is not None and math.isfinite(value):
                course.add(value)
        for name, describe in STALLS.items():
            if name not in self._said and (text := describe(self._courses)) is not None:
                self._said.add(name)
                _log.warning("steps %d to %d: %s. Said once.", *self._steps(metrics), text)

    @staticmethod
    def _steps(metrics: Mapping[str, float]) -> tuple[int, int]:
        last = int(metrics["step"])
        return max(1, last - WINDOW + 1), last
