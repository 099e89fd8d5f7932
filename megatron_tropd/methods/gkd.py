"""Generalized knowledge distillation: a Jensen-Shannon divergence on own and teacher sequences (arXiv 2306.13649)."""

from __future__ import annotations

from megatron_tropd.config.sections import Real, key
from megatron_tropd.losses import gates, terms
from megatron_tropd.methods import schedule
from megatron_tropd.methods.base import Method, Preset
from megatron_tropd.methods.options import MethodOptions


class GkdOptions(MethodOptions):
    """Options of ``gkd``."""

    beta: Real = key(0.5, "0: forward KL, 1: reverse KL, between: JSD", ge=0, le=1)
    on_policy_fraction: Real = key(0.5, "share of batches that the student writes", ge=0, le=1)


def gkd(options: GkdOptions) -> Method:
    """Give every token the same term, whoever wrote it."""
    term = terms.jsd_full(beta=options.beta)
    return Method(
        gate=gates.ALL, trusted=term, prefix=term, schedule=schedule.teacher_batches(options.on_policy_fraction)
    )


PRESET = Preset(
    summary="Jensen-Shannon divergence on student and teacher sequences",
    source="arXiv 2306.13649",
    options=GkdOptions,
    build=gkd,
    defaults={"temperature": 0.9},
)
