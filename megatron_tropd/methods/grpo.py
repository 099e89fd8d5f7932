"""The reward of whole answers alone: what is learned beside a teacher, without one (GRPO, arXiv 2402.03300)."""

from __future__ import annotations

from megatron_tropd.losses import gates, terms
from megatron_tropd.methods.base import Method, Preset
from megatron_tropd.methods.options import MethodOptions


class GrpoOptions(MethodOptions):
    """``grpo`` has no options of its own: those of every method weigh rewards."""


def grpo(options: GrpoOptions) -> Method:
    """Leave the teacher out of the loss; the reward is added as to every method."""
    return Method(gate=gates.NOTHING, trusted=terms.NONE)


PRESET = Preset(
    summary="policy gradient of the answers' rewards, and no distillation",
    source="arXiv 2402.03300",
    options=GrpoOptions,
    build=grpo,
    defaults={"reward_weight": 1.0},
)
