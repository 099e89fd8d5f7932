"""EOPD: policy gradient everywhere, plus a forward KL where the teacher is uncertain (arXiv 2603.07079)."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_tropd.losses import gates, terms
from megatron_tropd.losses.support import Tail
from megatron_tropd.methods.base import Method, Preset
from megatron_tropd.methods.options import choice, integer, number, option
from megatron_tropd.types import SupportKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of ``eopd``."""

    alpha: float = option(1.0, number(at_least=0.0), "weight of the forward KL; 0 leaves clipped opd")
    entropy: float = option(0.8, number(at_least=0.0), "teacher entropy above which the forward KL acts, nats")
    k: int = option(16, integer(at_least=1), "size of the support")
    tail: Tail = option("none", choice("none", "bucket", "renorm"), "what it does with the mass outside the support")
    support: SupportKind = option(
        "teacher", choice("teacher", "student", "union", "teacher_and_sampled"), "whose top k tokens"
    )
    ppo_clip: float | None = option(
        0.2, number(above=0.0, below=1.0, optional=True), "PPO clip range, for rollouts used more than once"
    )


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
