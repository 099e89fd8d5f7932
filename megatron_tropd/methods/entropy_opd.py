"""OPD on the most uncertain tokens only: a baseline row of arXiv 2606.01249."""

from __future__ import annotations

from megatron_tropd.config.sections import Real, key
from megatron_tropd.losses import gates, terms
from megatron_tropd.methods.base import Method, Preset
from megatron_tropd.methods.options import MethodOptions, PpoClip


class EntropyOpdOptions(MethodOptions):
    """Options of ``entropy_opd``."""

    fraction: Real = key(0.2, "share of tokens that learn, by student entropy", gt=0, lt=1)
    ppo_clip: PpoClip = None


def entropy_opd(options: EntropyOpdOptions) -> Method:
    """Give tokens below the entropy quantile no loss; they still count in the mean."""
    return Method(gate=gates.entropy_top(options.fraction), trusted=terms.k1_pg(clip=options.ppo_clip))


PRESET = Preset(
    summary="opd on the tokens of highest student entropy",
    source="arXiv 2606.01249, baseline",
    options=EntropyOpdOptions,
    build=entropy_opd,
)
