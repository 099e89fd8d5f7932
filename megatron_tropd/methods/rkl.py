"""Reverse KL on every sampled token: exact, or on a support."""

from __future__ import annotations

from megatron_tropd.losses import gates, terms
from megatron_tropd.methods.base import Method, Preset
from megatron_tropd.methods.fkl import DivergenceOptions


def rkl(options: DivergenceOptions) -> Method:
    """Build KL(student || teacher)."""
    if options.form == "full":
        return Method(gate=gates.ALL, trusted=terms.rkl_full())
    term = terms.rkl_topk(k=options.k, tail=options.tail, support=options.support)
    return Method(gate=gates.ALL, trusted=term)


PRESET = Preset(summary="reverse KL on every token", source="exact divergence", options=DivergenceOptions, build=rkl)
