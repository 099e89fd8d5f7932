"""The moments of training at which a session does something of its own."""

from __future__ import annotations


class Hooks:
    """Do nothing at any of them; a session overrides what it wants. All ranks call, at the same moments."""

    def step_finished(self, step: int) -> None:
        """Follow ``step`` finished steps: the weights are published and the metrics written, no checkpoint yet."""

    def may_leave(self, step: int) -> None:
        """Leave by raising, where wanted: the weights are those of ``step`` finished steps.

        Called after every step, and within one after rollouts, which are the longest part of it.
        """
