"""EOPD: policy gradient everywhere, plus a forward KL where the teacher is uncertain (arXiv 2603.07079)."""

from __future__ import annotations

from megatron_tropd.config.sections import Real, key
from megatron_tropd.losses import gates, terms
from megatron_tropd.methods.base import Method, Preset
from megatron_tropd.methods.options import MethodOptions, PpoClip, Support, SupportSize, TailKind


class EopdOptions(MethodOptions):
    """Options of ``eopd``."""

    alpha: Real = key(1.0, "weight of the forward KL; 0 leaves clipped opd", ge=0)
    entropy: Real = key(0.8, "teacher entropy above which the forward KL acts, nats", ge=0)
    k: SupportSize = 16
    tail: TailKind = "none"
    support: Support = "teacher"
    ppo_clip: PpoClip = 0.2


def eopd(options: EopdOptions) -> Method:
    """Add the forward KL to the policy gradient; it does not replace it."""
    forward = terms.fkl_topk(k=options.k, tail=options.tail, support=options.support)
    uncertain = terms.where_teacher_uncertain(forward, entropy=options.entropy)
    return Method(
        gate=gates.ALL,
        trusted=terms.k1_pg(clip=options.ppo_clip),
        extra=terms.scaled(uncertain, options.alpha),
    )


PRESET = Preset(
    summary="clipped policy gradient plus forward KL where the teacher is uncertain",
    source="arXiv 2603.07079",
    options=EopdOptions,
    build=eopd,
)
