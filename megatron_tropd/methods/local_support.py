"""Local support matching: reverse KL on the teacher's top k, both sides renormalized there (arXiv 2603.25562).

The paper reports that training without renormalization collapses early and that k < 5 is unstable.
"""

from __future__ import annotations

from megatron_tropd.losses import gates, terms
from megatron_tropd.methods.base import Method, Preset
from megatron_tropd.methods.options import MethodOptions, ReverseTailKind, Support, SupportSize


class LocalSupportOptions(MethodOptions):
    """Options of ``local_support``."""

    k: SupportSize = 32
    tail: ReverseTailKind = "renorm"
    support: Support = "teacher"


def local_support(options: LocalSupportOptions) -> Method:
    """Match the teacher on its support at every sampled position."""
    term = terms.rkl_topk(k=options.k, tail=options.tail, support=options.support)
    return Method(gate=gates.ALL, trusted=term)


PRESET = Preset(
    summary="renormalized reverse KL on the teacher's top k",
    source="arXiv 2603.25562",
    options=LocalSupportOptions,
    build=local_support,
    defaults={"special_tokens": "mask"},
)
