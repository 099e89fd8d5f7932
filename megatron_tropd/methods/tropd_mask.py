"""TrOPD's ablation: outliers carry no loss (arXiv 2606.01249)."""

from __future__ import annotations

from megatron_tropd.methods.base import Preset
from megatron_tropd.methods.tropd import TropdOptions, tropd

PRESET = Preset(
    summary="tropd with masked outliers",
    source="arXiv 2606.01249, ablation",
    options=TropdOptions,
    build=tropd,
    defaults={"outlier": "mask"},
)
