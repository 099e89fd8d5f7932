"""Trust-region on-policy distillation (arXiv 2606.01249).

Sampled tokens pass the acceptance test of speculative decoding or count as outliers. Trusted ones get the reverse-KL
policy gradient, outliers a forward KL that shows the teacher's alternatives; guided sequences start with a
teacher-written prefix, learned by a little imitation.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import Annotated, Literal, get_args

from pydantic import BeforeValidator

from megatron_tropd.config.sections import Real, Whole, key
from megatron_tropd.errors import ConfigError
from megatron_tropd.losses import gates, terms
from megatron_tropd.losses.gates import Gate
from megatron_tropd.losses.support import ReverseTail, Tail
from megatron_tropd.losses.terms import NONE, Term
from megatron_tropd.methods import schedule
from megatron_tropd.methods.base import Method, Preset
from megatron_tropd.methods.options import (
    K3Bound,
    MethodOptions,
    PpoClip,
    ReverseTailKind,
    RewardShape,
    Support,
    SupportSize,
    TailKind,
)

REWARD_FLOOR = math.log(0.1) / 0.9  # REOPOLD's floor at lam = 0.1; TrOPD publishes none

GateName = Literal[
    "bernoulli",
    "soft",
    "threshold",
    "probability_gap",
    "teacher_topk",
    "teacher_topp",
    "entropy_top",
    "correct",
    "all",
    "none",
]
TrustedTerm = Literal["k1_pg", "k2", "k3", "rkl_full", "fkl_full", "jsd_full", "rkl_topk", "fkl_topk", "nll", "none"]


def _as_list(value: object) -> object:
    """Make a list of one of a single name."""
    return (value,) if isinstance(value, str) else value


GateNames = Annotated[tuple[GateName, ...], BeforeValidator(_as_list)]


class TropdOptions(MethodOptions):
    """Options of ``tropd`` and of every method derived from it."""

    gate: GateNames = key(("bernoulli",), "who is trusted; a list: who passes all of it", min_length=1)
    gate_threshold: Real = key(0.5, "gate threshold: trusted when p/q >= this", gt=0)
    gate_gap: Real = key(0.0, "gate probability_gap: trusted when p-q > this", ge=-1, lt=1)
    gate_k: Whole = key(16, "gate teacher_topk: ranks that are trusted, at most k", ge=1)
    gate_p: Real = key(0.9, "gate teacher_topp: mass of the nucleus", gt=0, le=1)
    gate_fraction: Real = key(0.2, "gate entropy_top: share that is trusted", gt=0, lt=1)
    gate_reward: Real = key(0.5, "gate correct: least reward of an answer that is trusted")
    trusted: TrustedTerm = key("k1_pg", "term of trusted tokens")
    trusted_tail: ReverseTailKind = "bucket"
    jsd_beta: Real = key(0.5, "beta of a trusted jsd_full", ge=0, le=1)
    k3_bound: K3Bound = terms.K3_BOUND
    ppo_clip: PpoClip = None
    reward: RewardShape = "ratio"
    outlier: Literal["fkl_topk", "mask", "clip"] = key("fkl_topk", "term of outliers")
    outlier_gradient: Literal["direct", "pg_scalar"] = key(
        "direct", "fkl_topk: its own gradient, or (script) a detached advantage"
    )
    floor: Real = key(REWARD_FLOOR, "outlier clip: least reward, nats", le=0)
    k: SupportSize = 64
    tail: TailKind = "none"
    support: Support = "teacher"
    beta: Real = key(0.001, "weight of the prefix term", ge=0)
    prefix_gradient: Literal["nll", "pg_scalar"] = key(
        "nll", "prefix term: imitation, or (script) a detached advantage"
    )
    prefix_schedule: Literal["cosine", "linear", "constant", "none"] = key(
        "cosine", "share of the teacher's response given, over steps"
    )
    prefix_fraction: Real = key(0.5, "prefix_schedule constant: the share", ge=0, le=1)


def tropd(options: TropdOptions) -> Method:
    """Build the method of the given parts. A gate that is constant drops the term it never selects."""
    gate = reduce(gates.both, (_gate(name, options) for name in options.gate))
    prefix_schedule = _schedule(options)
    return Method(
        gate=gate,
        trusted=NONE if gate is gates.NOTHING else _trusted(options),
        outlier=NONE if gate is gates.ALL else _outlier(options),
        prefix=_prefix(options) if prefix_schedule.guided else NONE,
        schedule=prefix_schedule,
    )


_PLAIN_GATES = {"bernoulli": gates.bernoulli(), "soft": gates.soft(), "all": gates.ALL, "none": gates.NOTHING}


def _gate(name: str, options: TropdOptions) -> Gate:
    if name in _PLAIN_GATES:
        return _PLAIN_GATES[name]
    match name:
        case "correct":
            return gates.correct(options.gate_reward)
        case "threshold":
            return gates.threshold(options.gate_threshold)
        case "probability_gap":
            return gates.probability_gap(options.gate_gap)
        case "teacher_topk":
            if options.gate_k > options.k:
                raise ConfigError(f"gate_k={options.gate_k} exceeds k={options.k}, the ids requested: raise k.")
            return gates.teacher_topk(options.gate_k, support=options.support)
        case "teacher_topp":
            return gates.teacher_topp(options.gate_p, k=options.k, support=options.support)
        case "entropy_top":
            return gates.entropy_top(options.gate_fraction)
    raise ConfigError(f"gate={name!r} is none of {', '.join(get_args(GateName))}.")


def _trusted(options: TropdOptions) -> Term:
    k, tail, support = options.k, options.trusted_tail, options.support
    match options.trusted:
        case "k1_pg":
            return terms.k1_pg(clip=options.ppo_clip, shape=options.reward)
        case "k2":
            return terms.k2()
        case "k3":
            return terms.k3(bound=options.k3_bound)
        case "rkl_full":
            return terms.rkl_full()
        case "fkl_full":
            return terms.fkl_full()
        case "jsd_full":
            return terms.jsd_full(beta=options.jsd_beta)
        case "rkl_topk":
            return terms.rkl_topk(k=k, tail=tail, support=support)
        case "fkl_topk":
            return terms.fkl_topk(k=k, tail=_forward(tail), support=support)
        case "nll":
            return terms.nll()
    return NONE


def _forward(tail: ReverseTail) -> Tail:
    if tail == "sampled":
        raise ConfigError("trusted_tail=sampled corrects a reverse KL, which fkl_topk is not: set trusted=rkl_topk.")
    return tail


def _outlier(options: TropdOptions) -> Term:
    if options.outlier == "mask":
        return NONE
    if options.outlier == "clip":
        return terms.k1_pg(clip=options.ppo_clip, floor=options.floor)
    forward = terms.fkl_topk if options.outlier_gradient == "direct" else terms.fkl_pg_scalar
    return forward(k=options.k, tail=options.tail, support=options.support)


def _prefix(options: TropdOptions) -> Term:
    imitation = terms.nll() if options.prefix_gradient == "nll" else terms.prefix_pg_scalar()
    return terms.scaled(imitation, options.beta)


def _schedule(options: TropdOptions) -> schedule.PrefixSchedule:
    match options.prefix_schedule:
        case "cosine":
            return schedule.cosine()
        case "linear":
            return schedule.linear()
        case "constant":
            return schedule.constant(options.prefix_fraction)
    return schedule.unguided()


PRESET = Preset(
    summary="acceptance-tested tokens get reverse KL, outliers forward KL, prefixes a little imitation",
    source="arXiv 2606.01249",
    options=TropdOptions,
    build=tropd,
)
