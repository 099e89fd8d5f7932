"""Forward KL on every sampled token: exact, or on a support."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from megatron_tropd.losses import gates, terms
from megatron_tropd.methods.base import Method, Preset
from megatron_tropd.methods.options import Support, SupportSize, TailKind, choice


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of ``fkl`` and ``rkl``."""

    form: Annotated[str, choice("full", "topk"), "over the whole vocabulary, or over a support"] = "full"
    k: SupportSize = 64
    tail: TailKind = "bucket"
    support: Support = "teacher"


def fkl(options: Options) -> Method:
    """KL(teacher || student)."""
    if options.form == "full":
        return Method(gate=gates.ALL, trusted=terms.fkl_full())
    term = terms.fkl_topk(k=options.k, tail=options.tail, support=options.support)
    return Method(gate=gates.ALL, trusted=term)


PRESET = Preset(summary="forward KL on every token", source="exact divergence", options=Options, build=fkl)
