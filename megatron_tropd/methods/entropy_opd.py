"""OPD on the most uncertain tokens only: a baseline row of arXiv 2606.01249."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megatron_tropd.losses import gates, terms
from megatron_tropd.methods.base import Method, Preset
from megatron_tropd.methods.options import PpoClip, number


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of ``entropy_opd``."""

    fraction: Annotated[float, number(above=0.0, below=1.0), "share of tokens that learn, by student entropy"] = 0.2
    ppo_clip: PpoClip = None


def entropy_opd(options: Options) -> Method:
    """Tokens below the entropy quantile carry no loss but still count in the mean."""
    return Method(gate=gates.entropy_top(options.fraction), trusted=terms.k1_pg(clip=options.ppo_clip))


PRESET = Preset(
    summary="opd on the tokens of highest student entropy",
    source="arXiv 2606.01249, baseline",
    options=Options,
    build=entropy_opd,
)
