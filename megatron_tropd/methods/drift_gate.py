"""OPD on reused rollouts, blocks weighted by how far the student has drifted since (arXiv 2606.24084)."""

from __future__ import annotations

from megatron_tropd.methods.base import Preset
from megatron_tropd.methods.opd import OpdOptions, opd

PRESET = Preset(
    summary="opd with the drift_gate multiplier, which every method takes",
    source="arXiv 2606.24084",
    options=OpdOptions,
    build=opd,
    defaults={"multiplier": "drift_gate"},
)
