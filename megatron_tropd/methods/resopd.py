"""Residual OPD: exact reverse KL on the teacher's top k, the sampled token for the rest (arXiv 2610.04882)."""

from __future__ import annotations

from megatron_tropd.methods.base import Preset
from megatron_tropd.methods.rkl import RklOptions, rkl

PRESET = Preset(
    summary="unbiased reverse KL from the teacher's top k and the sampled token",
    source="arXiv 2610.04882",
    options=RklOptions,
    build=rkl,
    defaults={"form": "topk", "tail": "sampled"},
)
