"""The protocols of a source of rollouts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from megatron_tropd.errors import EngineError
from megatron_tropd.types import Rollout, RolloutRequest, SamplingParams


class Sampler(Protocol):
    """Continue sequences with the newest weights it was given. Collective: every rank calls, every rank gets all."""

    def generate(
        self, requests: Sequence[RolloutRequest], params: SamplingParams, *, seed: int, step: int
    ) -> list[Rollout]:
        """Write one rollout per request, in the order of the requests.

        The random numbers of a sequence depend on ``(seed, step, sequence_id)`` alone.
        """
        ...

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Take whole tensors under Hugging Face names; later rollouts carry ``version``.

        ``tensors`` may be iterated over again, later: a server that comes back needs them. Iterating is collective.
        """
        ...

    def close(self) -> None:
        """Release the engines and connections it holds. Collective."""
        ...


class GenerationHandle(Protocol):
    """Rollouts that are being written while the caller does something else."""

    @property
    def ended_at(self) -> float | None:
        """Return ``time.perf_counter()`` when the last of them was there; None where that is not known."""
        ...

    def collect(self) -> list[Rollout]:
        """Wait for all of them: what ``generate`` returns. Collective."""
        ...


@runtime_checkable
class AsyncSampler(Protocol):
    """A sampler that computes elsewhere, so that generation need not be waited for at once."""

    def start(
        self, requests: Sequence[RolloutRequest], params: SamplingParams, *, seed: int, step: int
    ) -> GenerationHandle:
        """Start what ``generate`` does. Weights must not change before all that was started is collected."""
        ...


def check_finite(rollouts: Sequence[Rollout], params: SamplingParams, model: str) -> None:
    """Raise EngineError when a model gave log-probs that are no numbers: whatever it wrote means nothing.

    Args:
        model: what it is called in the message.
    """
    for rollout in rollouts:
        logprob = rollout.model_logprob if params.model_logprob else rollout.sampling_logprob
        bad = np.flatnonzero(~np.isfinite(logprob))
        if bad.size:
            raise EngineError(
                f"{model} gives a log-prob of {logprob[bad[0]]} to token {bad[0]} of its answer to prompt "
                f"{rollout.prompt_index}: its weights or its precision are broken. Check the checkpoint, or compute "
                "in fp32."
            )
