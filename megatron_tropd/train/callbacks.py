"""Methods of a user's own program that a run calls while it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_tropd.errors import ConfigError
from megatron_tropd.report.records import Evaluation
from megatron_tropd.types import Prompt, Rollout

_PREFIX = "on_"


class Callbacks:
    """Do nothing; a subclass overrides what it wants to follow.

    Every rank calls its own object, at the same moments and with the same values, so that what communicates may do so.
    What is to be written or printed once is for the first rank. What a method raises ends the run.
    """

    def on_rollouts(self, step: int, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> None:
        """Follow the rollouts of step ``step`` (from 1): those of each prompt in turn, as many for each."""

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Follow a finished step, with the metrics that ``metrics.jsonl`` has of it; seconds are this rank's own."""

    def on_evaluate(self, evaluations: Sequence[Evaluation]) -> None:
        """Follow the results of one model on all suites, before, during and after training."""

    def on_checkpoint(self, step: int, checkpoint: Path) -> None:
        """Follow a checkpoint of ``step`` finished steps, which is whole on disk."""


def check_callbacks(callbacks: object) -> Callbacks:
    """Return the object that is given as callbacks, when all of its ``on_...`` methods will be called.

    Raises:
        ConfigError: it is no ``Callbacks``, or has a method that nothing calls.
    """
    known = sorted(name for name in vars(Callbacks) if name.startswith(_PREFIX))
    if not isinstance(callbacks, Callbacks):
        raise ConfigError(
            f"callbacks is {type(callbacks).__name__}: give an object whose class derives from "
            f"megatron_tropd.Callbacks and overrides any of {', '.join(known)}."
        )
    strange = sorted(name for name in dir(callbacks) if name.startswith(_PREFIX) and name not in known)
    if strange:
        raise ConfigError(
            f"callbacks has {', '.join(strange)}, which nothing calls. The moments are {', '.join(known)}; give other "
            "methods another name."
        )
    return callbacks
