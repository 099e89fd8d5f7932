"""What every source of rollouts must do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from megatron_tropd.types import Float32Array, Int64Array, Rollout, RolloutRequest, SamplingParams


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
        """Takes whole tensors under Hugging Face names; later rollouts carry ``version``.

        ``tensors`` may be iterated over again, later: a server that comes back asks for them. Iterating is collective.
        """
        ...

    def close(self) -> None:
        """Lets go of engines and connections it holds. Collective."""
        ...


@runtime_checkable
class Probed(Protocol):
    """A sampler whose engines can be asked whether new weights have arrived."""

    def probe(self, token_ids: Int64Array) -> Mapping[str, Float32Array]:
        """``[L - 1]`` log-prob of every token after the first, nats, by every engine this rank speaks for."""
        ...
