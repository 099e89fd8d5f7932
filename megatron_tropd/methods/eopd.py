"""EOPD: policy gradient everywhere, plus a forward KL where the teacher is uncertain (arXiv 2603.07079)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megatron_tropd.losses import gates, terms
from megatron_tropd.methods.base import Method, Preset
from megatron_tropd.methods.options import PpoClip, Support, SupportSize, TailKind, number


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of ``eopd``."""

    alpha: Annotated[float, number(at_least=0.0), "weight of the forward KL; 0 leaves clipped opd"] = 1.0
    entropy: Annotated[float, number(at_least=0.0), "teacher entropy above which the forward KL acts, nats"] = 0.8
    k: SupportSize = 16
    tail: TailKind = "none"
    support: Support = "teacher"
    ppo_clip: PpoClip = 0.2


def eopd(options: Options) -> Method:
    """The forward KL is added to the policy gradient; it does not replace it."""
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
    options=Options,
    build=eopd,
)
