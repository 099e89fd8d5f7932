"""TrOPD with the gate's mean in place of its draw: same expectation, less variance (our derivation)."""

from __future__ import annotations

from megatron_tropd.methods.base import Preset
from megatron_tropd.methods.tropd import TropdOptions, tropd

PRESET = Preset(
    summary="tropd with the soft gate",
    source="derived here",
    options=TropdOptions,
    build=tropd,
    defaults={"gate": "soft"},
)
