"""Schedules of the share of the teacher's response that a guided sequence starts with."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_tropd.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixSchedule:
    """A fraction ``alpha`` in [0, 1] of the teacher's response, per training step."""

    name: str
    alpha: Callable[[int, int], float]  # (step t, total steps N) -> alpha
    guided: bool = True

    def fraction(self, step: int, total_steps: int) -> float:
        """Return ``alpha`` at ``step`` (from 0) of ``total_steps``.

        Raises:
            ConfigError: the step lies outside the run.
        """
        if total_steps < 1 or not 0 <= step <= total_steps:
            raise ConfigError(f"step {step} of {total_steps} is not a step of the run: need 0 <= step <= total >= 1.")
        return min(1.0, max(0.0, self.alpha(step, total_steps)))


def cosine() -> PrefixSchedule:
    """Return ``(1 + cos(pi t/N)) / 2``: from the whole response to none (TrOPD, arXiv 2606.01249)."""
    return PrefixSchedule(name="cosine", alpha=lambda t, n: (1.0 + math.cos(math.pi * t / n)) / 2.0)


def linear() -> PrefixSchedule:
    """Return ``1 - t/N``."""
    return PrefixSchedule(name="linear", alpha=lambda t, n: 1.0 - t / n)


def constant(fraction: float) -> PrefixSchedule:
    """Return the same share of the response at every step."""
    if not 0.0 <= fraction <= 1.0:
        raise ConfigError(f"constant prefix fraction must lie in [0, 1], got {fraction}.")
    return PrefixSchedule(name="constant", alpha=lambda t, n: fraction)


def unguided() -> PrefixSchedule:
    """Schedule no teacher prefix: every sequence is the student's own."""
    return PrefixSchedule(name="none", alpha=lambda t, n: 0.0, guided=False)


def teacher_batches(on_policy_fraction: float) -> PrefixSchedule:
    """Schedule whole batches of one kind: a share ``on_policy_fraction`` by the student, the others the teacher's
    responses.

    Spaced evenly instead of drawn, so that a resumed run needs no memory of past draws (GKD, arXiv 2306.13649).
    """
    if not 0.0 <= on_policy_fraction <= 1.0:
        raise ConfigError(f"on_policy_fraction must lie in [0, 1], got {on_policy_fraction}.")
    if on_policy_fraction == 1.0:
        return unguided()

    def alpha(step: int, total_steps: int) -> float:
        on_policy = math.floor((step + 1) * on_policy_fraction) > math.floor(step * on_policy_fraction)
        return 0.0 if on_policy else 1.0

    return PrefixSchedule(name="teacher_batches", alpha=alpha)
