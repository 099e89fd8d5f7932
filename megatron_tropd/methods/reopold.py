"""REOPOLD: a floor under the reward, and two stages of token selection (arXiv 2603.11137)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated

from megatron_tropd.errors import ConfigError
from megatron_tropd.losses import gates, terms
from megatron_tropd.losses.gates import Gate
from megatron_tropd.methods.base import Method, Preset
from megatron_tropd.methods.options import PpoClip, choice, integer, number


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Options of ``reopold``."""

    lam: Annotated[float, number(above=0.0, below=1.0), "the floor's lambda"] = 0.1
    floor_reading: Annotated[
        str, choice("log(lam)/(1-lam)", "log(lam/(1-lam))"), "which reading of the floor's formula"
    ] = "log(lam)/(1-lam)"
    stages: Annotated[int, integer(at_least=1, at_most=2), "2: floor first, entropy later; 1: only clip the reward"] = 2
    switch: Annotated[float, number(at_least=0.0, at_most=1.0), "share of the run after which stage 2 begins"] = 0.5
    fraction: Annotated[float, number(above=0.0, below=1.0), "stage 2: share of tokens kept, by student entropy"] = 0.2
    ppo_clip: PpoClip = None


def reward_floor(lam: float, *, reading: str) -> float:
    """The least reward, nats: negative, or it would reward tokens that the teacher dislikes."""
    floor = math.log(lam) / (1.0 - lam) if reading == "log(lam)/(1-lam)" else math.log(lam / (1.0 - lam))
    if floor >= 0.0:
        raise ConfigError(
            f"method 'reopold': lam={lam} with floor_reading='{reading}' gives the floor {floor:.3g}, "
            "which must be negative: choose lam < 0.5."
        )
    return floor


def reopold(options: Options) -> Method:
    """Tokens that a stage leaves out carry no loss."""
    floor = reward_floor(options.lam, reading=options.floor_reading)
    return Method(gate=_gate(options, floor), trusted=terms.k1_pg(clip=options.ppo_clip, floor=floor))


def _gate(options: Options, floor: float) -> Gate:
    if options.stages == 1:
        return gates.ALL
    early, late = gates.log_ratio_above(floor), gates.entropy_top(options.fraction)
    return gates.staged(early, late, switch=options.switch)


PRESET = Preset(
    summary="reward floor; first tokens above it, later the most uncertain ones",
    source="arXiv 2603.11137",
    options=Options,
    build=reopold,
)
