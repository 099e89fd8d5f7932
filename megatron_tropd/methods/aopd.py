"""AOPD: policy gradient where the teacher likes the token more than the student, forward KL elsewhere (2605.06387)."""

from __future__ import annotations

from megatron_tropd.methods.base import Preset
from megatron_tropd.methods.tropd import TropdOptions, tropd

PRESET = Preset(
    summary="policy gradient where p > q, forward KL elsewhere, mean per sequence",
    source="arXiv 2605.06387",
    options=TropdOptions,
    build=tropd,
    defaults={"gate": "probability_gap", "prefix_schedule": "none", "normalization": "sequence"},
)
