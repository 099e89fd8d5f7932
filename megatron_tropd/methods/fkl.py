"""Forward KL on every sampled token: exact, or on a support."""

from __future__ import annotations

from typing import Literal

from megatron_tropd.config.sections import key
from megatron_tropd.losses import gates, terms
from megatron_tropd.methods.base import Method, Preset
from megatron_tropd.methods.options import MethodOptions, Support, SupportSize, TailKind


class FklOptions(MethodOptions):
    """Options of ``fkl``."""

    form: Literal["full", "topk"] = key("full", "over the full vocabulary, or over a support")
    k: SupportSize = 64
    tail: TailKind = "bucket"
    support: Support = "teacher"


def fkl(options: FklOptions) -> Method:
    """Build KL(teacher || student)."""
    if options.form == "full":
        return Method(gate=gates.ALL, trusted=terms.fkl_full())
    term = terms.fkl_topk(k=options.k, tail=options.tail, support=options.support)
    return Method(gate=gates.ALL, trusted=term)


PRESET = Preset(summary="forward KL on every token", source="exact divergence", options=FklOptions, build=fkl)
