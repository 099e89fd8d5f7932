"""Checks as rows: each says what must be known for it, and runs as soon as that is known.

A run's inputs are read one after another (method, models, tokenizer, data), and a mistake is reported before the next
one, which may take minutes, is read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that a user can have wrong."""

    name: str  # completes "checks ..."
    needs: tuple[str, ...]  # names of findings, which ``function`` is given in this order
    function: Callable[..., None]  # raises a TropdError


class Findings:
    """Everything known about a run so far, and the checks that still wait for more."""

    def __init__(self, checks: Sequence[Check]) -> None:
        self._waiting = list(checks)
        self._known: dict[str, Any] = {}

    def learn(self, **found: Any) -> None:
        """Remember what was found, and run the checks that needed no more than it, in the order of their rows.

        Raises:
            TropdError: whatever the first of them that fails has to say.
        """
        self._known |= found
        ready = [check for check in self._waiting if self._known.keys() >= set(check.needs)]
        self._waiting = [check for check in self._waiting if check not in ready]
        for check in ready:
            check.function(*(self._known[name] for name in check.needs))

    def finish(self) -> None:
        """Make sure that no check was left out for want of something that nobody has found."""
        left = {check.name: sorted(set(check.needs) - self._known.keys()) for check in self._waiting}
        assert not left, f"checks that never ran, and what they wait for: {left}"
