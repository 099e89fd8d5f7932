"""TrOPD with an exact reverse KL as the trusted term, which restores the student's tails (our derivation)."""

from __future__ import annotations

from megatron_tropd.methods.base import Preset
from megatron_tropd.methods.tropd import TropdOptions, tropd

PRESET = Preset(
    summary="tropd with exact reverse KL on trusted tokens",
    source="derived here",
    options=TropdOptions,
    build=tropd,
    defaults={"trusted": "rkl_full"},
)
