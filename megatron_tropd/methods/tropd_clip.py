"""TrOPD's ablation: outliers keep the policy gradient, their reward not below a floor (arXiv 2606.01249)."""

from __future__ import annotations

from megatron_tropd.methods.base import Preset
from megatron_tropd.methods.tropd import TropdOptions, tropd

PRESET = Preset(
    summary="tropd with outlier rewards clipped from below",
    source="arXiv 2606.01249, ablation",
    options=TropdOptions,
    build=tropd,
    defaults={"outlier": "clip"},
)
