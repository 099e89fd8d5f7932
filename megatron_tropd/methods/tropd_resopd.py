"""TrOPD with residual OPD as the trusted term: the reverse KL's tails without hidden states (arXiv 2610.04882)."""

from __future__ import annotations

from megatron_tropd.methods.base import Preset
from megatron_tropd.methods.tropd import TropdOptions, tropd

PRESET = Preset(
    summary="tropd with resopd's term on trusted tokens",
    source="derived here",
    options=TropdOptions,
    build=tropd,
    defaults={"trusted": "rkl_topk", "trusted_tail": "sampled"},
)
