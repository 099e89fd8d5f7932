"""Who takes new weights, and how their arrival is verified."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from megatron_tropd.types import Float32Array, Int64Array


@runtime_checkable
class ProbeableSampler(Protocol):
    """A sampler whose engines can be probed for the arrival of new weights."""

    def probe(self, token_ids: Int64Array) -> Mapping[str, Float32Array]:
        """Return ``[L - 1]`` log-prob of every token after the first, nats, by every engine this rank speaks for."""
        ...
