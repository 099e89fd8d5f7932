"""On-policy distillation: policy gradient of the sampled-token reverse KL, no baseline (Thinking Machines)."""

from __future__ import annotations

from typing import Literal

from megatron_tropd.config.sections import key
from megatron_tropd.losses import gates, terms
from megatron_tropd.methods.base import Method, Preset
from megatron_tropd.methods.options import K3Bound, MethodOptions, PpoClip, RewardShape


class OpdOptions(MethodOptions):
    """Options of ``opd``."""

    trusted: Literal["k1_pg", "k2", "k3"] = key("k1_pg", "estimator of reverse KL at the sampled token")
    k3_bound: K3Bound = terms.K3_BOUND
    ppo_clip: PpoClip = None
    reward: RewardShape = "ratio"


def opd(options: OpdOptions) -> Method:
    """Give every sampled token the same term."""
    estimators = {
        "k1_pg": terms.k1_pg(clip=options.ppo_clip, shape=options.reward),
        "k2": terms.k2(),
        "k3": terms.k3(bound=options.k3_bound),
    }
    return Method(gate=gates.ALL, trusted=estimators[options.trusted])


PRESET = Preset(
    summary="sampled-token reverse KL on every token",
    source="Thinking Machines, On-Policy Distillation",
    options=OpdOptions,
    build=opd,
)
