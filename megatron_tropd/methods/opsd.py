"""On-policy self-distillation: the student against itself, which reads more than it does (arXiv 2601.18734)."""

from __future__ import annotations

from typing import Literal

from megatron_tropd.config.sections import Real, key
from megatron_tropd.losses import gates, terms
from megatron_tropd.methods.base import Method, Preset
from megatron_tropd.methods.options import MethodOptions, Support, SupportSize, TailKind


class OpsdOptions(MethodOptions):
    """Options of ``opsd`` and ``sdft``."""

    beta: Real = key(0.5, "0: forward KL, 1: reverse KL, between: JSD", ge=0, le=1)
    form: Literal["full", "topk"] = key("full", "over the full vocabulary, or over a support")
    k: SupportSize = 100
    tail: TailKind = "bucket"
    support: Support = "teacher"


def opsd(options: OpsdOptions) -> Method:
    """Take the same divergence on every sampled token; whose prompt the teacher reads is the data's to say."""
    if options.form == "full":
        return Method(gate=gates.ALL, trusted=terms.jsd_full(beta=options.beta))
    term = terms.jsd_topk(k=options.k, beta=options.beta, tail=options.tail, support=options.support)
    return Method(gate=gates.ALL, trusted=term)


PRESET = Preset(
    summary="Jensen-Shannon divergence to a teacher that reads more, such as the student itself",
    source="arXiv 2601.18734",
    options=OpsdOptions,
    build=opsd,
)
