"""The moments of training at which a session does something of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_tropd.types import Prompt, Rollout


class Hooks:
    """Do nothing at any of them; a session overrides what it wants. All ranks call, at the same moments."""

    def rollouts_ready(self, step: int, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> None:
        """Follow the rollouts that step ``step`` (from 1) learns from, before it does."""

    def batch_scored(self, step: int, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> None:
        """Follow what step ``step`` (from 1) is about to learn from; no score is being waited for."""

    def step_measured(self, step: int, metrics: Mapping[str, float]) -> None:
        """Follow the metrics of step ``step`` (from 1)."""

    def step_finished(self, step: int) -> None:
        """Follow ``step`` finished steps: the weights are published and the metrics written, no checkpoint yet."""

    def checkpoint_saved(self, step: int, checkpoint: Path) -> None:
        """Follow a checkpoint of ``step`` finished steps, which is whole on disk."""

    def is_over(self, step: int) -> bool:
        """Say, the same on all ranks, whether ``step`` finished steps are enough, be they fewer than there were to be.

        Called before the first step, and after every one.
        """
        return False

    def may_leave(self, step: int) -> None:
        """Leave by raising, where wanted: the weights are those of ``step`` finished steps.

        Called after every step, and within one after rollouts, which are the longest part of it.
        """
