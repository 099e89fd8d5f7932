"""ExOPD: aim beyond the teacher, along its difference from a base model (arXiv 2602.12125)."""

from __future__ import annotations

from megatron_tropd.config.sections import Real, key
from megatron_tropd.losses import gates, terms
from megatron_tropd.methods.base import Method, Preset
from megatron_tropd.methods.options import MethodOptions, PpoClip


class ExopdOptions(MethodOptions):
    """Options of ``exopd``."""

    lam: Real = key(1.25, "1 is opd, above 1 extrapolates", ge=0)
    ppo_clip: PpoClip = None


def exopd(options: ExopdOptions) -> Method:
    """Build the policy gradient of opd with an extrapolated reward."""
    return Method(gate=gates.ALL, trusted=terms.extrapolated_pg(lam=options.lam, clip=options.ppo_clip))


PRESET = Preset(
    summary="policy gradient toward an extrapolation from base model through teacher",
    source="arXiv 2602.12125",
    options=ExopdOptions,
    build=exopd,
)
