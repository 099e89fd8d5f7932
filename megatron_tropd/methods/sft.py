"""Supervised fine-tuning: imitate the whole teacher response. For training a model before it can be distilled."""

from __future__ import annotations

from megatron_tropd.losses import gates, terms
from megatron_tropd.methods import schedule
from megatron_tropd.methods.base import Method, Preset
from megatron_tropd.methods.options import MethodOptions


class SftOptions(MethodOptions):
    """``sft`` has no options of its own."""


def sft(options: SftOptions) -> Method:
    """Learn the teacher's sequences; should one be continued, its continuation carries no loss."""
    return Method(gate=gates.NOTHING, trusted=terms.NONE, prefix=terms.nll(), schedule=schedule.constant(1.0))


PRESET = Preset(
    summary="negative log-likelihood of the teacher's response", source="baseline", options=SftOptions, build=sft
)
