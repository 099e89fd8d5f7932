"""Reverse KL on every sampled token: exact, or on a support."""

from __future__ import annotations

from typing import Literal

from megatron_tropd.config.sections import key
from megatron_tropd.losses import gates, terms
from megatron_tropd.methods.base import Method, Preset
from megatron_tropd.methods.options import MethodOptions, ReverseTailKind, Support, SupportSize


class RklOptions(MethodOptions):
    """Options of ``rkl`` and of ``resopd``."""

    form: Literal["full", "topk"] = key("full", "over the full vocabulary, or over a support")
    k: SupportSize = 64
    tail: ReverseTailKind = "bucket"
    support: Support = "teacher"


def rkl(options: RklOptions) -> Method:
    """Build KL(student || teacher)."""
    if options.form == "full":
        return Method(gate=gates.ALL, trusted=terms.rkl_full())
    term = terms.rkl_topk(k=options.k, tail=options.tail, support=options.support)
    return Method(gate=gates.ALL, trusted=term)


PRESET = Preset(summary="reverse KL on every token", source="exact divergence", options=RklOptions, build=rkl)
