"""Forward KL on every sampled token: exact, or on a support."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_tropd.losses import gates, terms
from megatron_tropd.losses.support import Tail
from megatron_tropd.methods.base import Method, Preset
from megatron_tropd.methods.options import choice, integer, option
from megatron_tropd.types import SupportKind


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of ``fkl`` and ``rkl``."""

    form: str = option("full", choice("full", "topk"), "over the whole vocabulary, or over a support")
    k: int = option(64, integer(at_least=1), "topk: size of the support")
    tail: Tail = option("bucket", choice("none", "bucket", "renorm"), "topk: what is done with the mass outside")
    support: SupportKind = option(
        "teacher", choice("teacher", "student", "union", "teacher_and_sampled"), "topk: whose top k tokens"
    )


def fkl(options: Options) -> Method:
    """KL(teacher || student)."""
    if options.form == "full":
        return Method(gate=gates.ALL, trusted=terms.fkl_full())
    term = terms.fkl_topk(k=options.k, tail=options.tail, support=options.support)
    return Method(gate=gates.ALL, trusted=term)


PRESET = Preset(summary="forward KL on every token", source="exact divergence", options=Options, build=fkl)
