"""On-policy distillation: policy gradient of the sampled-token reverse KL, no baseline (Thinking Machines)."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_tropd.losses import gates, terms
from megatron_tropd.methods.base import Method, Preset
from megatron_tropd.methods.options import choice, number, option


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of ``opd``."""

    trusted: str = option("k1_pg", choice("k1_pg", "k2", "k3"), "estimator of reverse KL at the sampled token")
    ppo_clip: float | None = option(
        None, number(above=0.0, below=1.0, optional=True), "k1_pg: PPO clip range, for rollouts used more than once"
    )


def opd(options: Options) -> Method:
    """Every sampled token gets the same term."""
    estimators = {"k1_pg": terms.k1_pg(clip=options.ppo_clip), "k2": terms.k2(), "k3": terms.k3()}
    return Method(gate=gates.ALL, trusted=estimators[options.trusted])


PRESET = Preset(
    summary="sampled-token reverse KL on every token",
    source="Thinking Machines, On-Policy Distillation",
    options=Options,
    build=opd,
)
