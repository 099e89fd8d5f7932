"""What every teacher must do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_tropd.types import Pack, Signal


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalSpec:
    """What to ask of the teacher for each valid prediction, besides the log-prob of the target."""

    top_k: int = 0
    entropy: bool = True
    hidden_states: bool = False


class Teacher(Protocol):
    """Scores packs. Collective: every rank calls with the same packs."""

    def score(self, packs: Sequence[Sequence[Pack]], spec: SignalSpec) -> list[Signal | None]:
        """Signals for this rank's own replica of the student.

        Args:
            packs: ``packs[r]`` are the packs student replica ``r`` trains on.

        Returns:
            One Signal per pack of this rank's replica; None on ranks that do not compute the loss.
        """
        ...
