"""Trust-region on-policy distillation (arXiv 2606.01249).

Sampled tokens pass the acceptance test of speculative decoding or count as outliers. Trusted ones get the reverse-KL
policy gradient, outliers a forward KL that shows the teacher's alternatives; guided sequences start with a
teacher-written prefix, learnt by a little imitation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import reduce
from typing import Annotated

from megatron_tropd.errors import ConfigError
from megatron_tropd.losses import gates, terms
from megatron_tropd.losses.gates import Gate
from megatron_tropd.losses.terms import NONE, Term
from megatron_tropd.methods import schedule
from megatron_tropd.methods.base import Method, Preset
from megatron_tropd.methods.options import PpoClip, Support, SupportSize, TailKind, choice, choices, integer, number

REWARD_FLOOR = math.log(0.1) / 0.9  # REOPOLD's floor at lam = 0.1; TrOPD publishes none

_GATES = (
    "bernoulli",
    "soft",
    "threshold",
    "probability_gap",
    "teacher_topk",
    "teacher_topp",
    "entropy_top",
    "all",
    "none",
)
_TRUSTED = ("k1_pg", "k2", "k3", "rkl_full", "fkl_full", "jsd_full", "rkl_topk", "fkl_topk", "nll", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of ``tropd`` and of every method derived from it."""

    gate: Annotated[tuple[str, ...], choices(*_GATES), "who is trusted; a list: who passes all of it"] = ("bernoulli",)
    gate_threshold: Annotated[float, number(above=0.0), "gate threshold: trusted when p/q >= this"] = 0.5
    gate_gap: Annotated[float, number(at_least=-1.0, below=1.0), "gate probability_gap: trusted when p-q > this"] = 0.0
    gate_k: Annotated[int, integer(at_least=1), "gate teacher_topk: ranks that are trusted, at most k"] = 16
    gate_p: Annotated[float, number(above=0.0, at_most=1.0), "gate teacher_topp: mass of the nucleus"] = 0.9
    gate_fraction: Annotated[float, number(above=0.0, below=1.0), "gate entropy_top: share that is trusted"] = 0.2
    trusted: Annotated[str, choice(*_TRUSTED), "term of trusted tokens"] = "k1_pg"
    trusted_tail: TailKind = "bucket"
    jsd_beta: Annotated[float, number(at_least=0.0, at_most=1.0), "beta of a trusted jsd_full"] = 0.5
    ppo_clip: PpoClip = None
    outlier: Annotated[str, choice("fkl_topk", "mask", "clip"), "term of outliers"] = "fkl_topk"
    outlier_gradient: Annotated[
        str, choice("direct", "pg_scalar"), "fkl_topk: its own gradient, or (script) a detached advantage"
    ] = "direct"
    floor: Annotated[float, number(at_most=0.0), "outlier clip: least reward, nats"] = REWARD_FLOOR
    k: SupportSize = 64
    tail: TailKind = "none"
    support: Support = "teacher"
    beta: Annotated[float, number(at_least=0.0), "weight of the prefix term"] = 0.001
    prefix_gradient: Annotated[
        str, choice("nll", "pg_scalar"), "prefix term: imitation, or (script) a detached advantage"
    ] = "nll"
    prefix_schedule: Annotated[
        str, choice("cosine", "linear", "constant", "none"), "share of the teacher's response given, over steps"
    ] = "cosine"
    prefix_fraction: Annotated[float, number(at_least=0.0, at_most=1.0), "prefix_schedule constant: the share"] = 0.5


def tropd(options: Options) -> Method:
    """The method of the given parts. A gate that is constant drops the term it never selects."""
    gate = reduce(gates.both, (_gate(name, options) for name in options.gate))
    prefix_schedule = _schedule(options)
    return Method(
        gate=gate,
        trusted=NONE if gate is gates.NOTHING else _trusted(options),
        outlier=NONE if gate is gates.ALL else _outlier(options),
        prefix=_prefix(options) if prefix_schedule.guided else NONE,
        schedule=prefix_schedule,
    )


def _gate(name: str, options: Options) -> Gate:
    match name:
        case "bernoulli":
            return gates.bernoulli()
        case "soft":
            return gates.soft()
        case "threshold":
            return gates.threshold(options.gate_threshold)
        case "probability_gap":
            return gates.probability_gap(options.gate_gap)
        case "teacher_topk":
            if options.gate_k > options.k:
                raise ConfigError(f"gate_k={options.gate_k} exceeds k={options.k}, the ids asked for: raise k.")
            return gates.teacher_topk(options.gate_k, support=options.support)
        case "teacher_topp":
            return gates.teacher_topp(options.gate_p, k=options.k, support=options.support)
        case "entropy_top":
            return gates.entropy_top(options.gate_fraction)
        case "none":
            return gates.NOTHING
    return gates.ALL


def _trusted(options: Options) -> Term:
    k, tail, support = options.k, options.trusted_tail, options.support
    match options.trusted:
        case "k1_pg":
            return terms.k1_pg(clip=options.ppo_clip)
        case "k2":
            return terms.k2()
        case "k3":
            return terms.k3()
        case "rkl_full":
            return terms.rkl_full()
        case "fkl_full":
            return terms.fkl_full()
        case "jsd_full":
            return terms.jsd_full(beta=options.jsd_beta)
        case "rkl_topk":
            return terms.rkl_topk(k=k, tail=tail, support=support)
        case "fkl_topk":
            return terms.fkl_topk(k=k, tail=tail, support=support)
        case "nll":
            return terms.nll()
    return NONE


def _outlier(options: Options) -> Term:
    if options.outlier == "mask":
        return NONE
    if options.outlier == "clip":
        return terms.k1_pg(clip=options.ppo_clip, floor=options.floor)
    forward = terms.fkl_topk if options.outlier_gradient == "direct" else terms.fkl_pg_scalar
    return forward(k=options.k, tail=options.tail, support=options.support)


def _prefix(options: Options) -> Term:
    imitation = terms.nll() if options.prefix_gradient == "nll" else terms.prefix_pg_scalar()
    return terms.scaled(imitation, options.beta)


def _schedule(options: Options) -> schedule.PrefixSchedule:
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
    options=Options,
    build=tropd,
)
