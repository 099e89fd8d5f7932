"""Train from a configuration in which nothing is open: ``tropd train``."""

from __future__ import annotations

from megatron_tropd.commands.responses import with_responses
from megatron_tropd.config.run import RunConfig
from megatron_tropd.setup.build import Run
from megatron_tropd.train.session import run_training


def train(config: RunConfig) -> Run | None:
    """Train, after the teacher has written what guidance lacks. Collective; see :func:`run_training`."""
    return run_training(config, responses=with_responses)
