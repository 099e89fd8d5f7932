"""Generalised knowledge distillation: a Jensen-Shannon divergence on own and teacher sequences (arXiv 2306.13649)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megatron_tropd.losses import gates, terms
from megatron_tropd.methods import schedule
from megatron_tropd.methods.base import Method, Preset
from megatron_tropd.methods.options import number


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of ``gkd``."""

    beta: Annotated[float, number(at_least=0.0, at_most=1.0), "0: forward KL, 1: reverse KL, between: JSD"] = 0.5
    on_policy_fraction: Annotated[
        float, number(at_least=0.0, at_most=1.0), "share of batches that the student writes"
    ] = 0.5


def gkd(options: Options) -> Method:
    """One term for whoever wrote the token."""
    term = terms.jsd_full(beta=options.beta)
    return Method(
        gate=gates.ALL, trusted=term, prefix=term, schedule=schedule.teacher_batches(options.on_policy_fraction)
    )


PRESET = Preset(
    summary="Jensen-Shannon divergence on student and teacher sequences",
    source="arXiv 2306.13649",
    options=Options,
    build=gkd,
    defaults={"temperature": 0.9},
)
