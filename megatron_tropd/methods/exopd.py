"""ExOPD: aim beyond the teacher, along its difference from a base model (arXiv 2602.12125)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megatron_tropd.losses import gates, terms
from megatron_tropd.methods.base import Method, Preset
from megatron_tropd.methods.options import PpoClip, number


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of ``exopd``."""

    lam: Annotated[float, number(at_least=0.0), "1 is opd, above 1 extrapolates"] = 1.25
    ppo_clip: PpoClip = None


def exopd(options: Options) -> Method:
    """The policy gradient of opd with an extrapolated reward."""
    return Method(gate=gates.ALL, trusted=terms.extrapolated_pg(lam=options.lam, clip=options.ppo_clip))


PRESET = Preset(
    summary="policy gradient towards an extrapolation from base model through teacher",
    source="arXiv 2602.12125",
    options=Options,
    build=exopd,
)
