"""What every source of rollouts must do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from megatron_tropd.types import Rollout, RolloutRequest, SamplingParams


class Sampler(Protocol):
    """Continues sequences with the newest weights it was given. Collective: every rank calls, every rank gets all."""

    def generate(
        self, requests: Sequence[RolloutRequest], params: SamplingParams, *, seed: int, step: int
    ) -> list[Rollout]:
        """One rollout per request, in the order of the requests.

        The random numbers of a sequence depend on ``(seed, step, sequence_id)`` alone.
        """
        ...

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Takes whole tensors under Hugging Face names; later rollouts carry ``version``."""
        ...
