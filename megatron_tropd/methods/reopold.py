"""REOPOLD: a floor under the reward, and two stages of token selection (arXiv 2603.11137)."""

from __future__ import annotations

import math
from typing import Literal

from megatron_tropd.config.sections import Real, Whole, key
from megatron_tropd.errors import ConfigError
from megatron_tropd.losses import gates, terms
from megatron_tropd.losses.gates import Gate
from megatron_tropd.methods.base import Method, Preset
from megatron_tropd.methods.options import MethodOptions, PpoClip


class ReopoldOptions(MethodOptions):
    """Options of ``reopold``."""

    lam: Real = key(0.1, "the floor's lambda", gt=0, lt=1)
    floor_reading: Literal["log(lam)/(1-lam)", "log(lam/(1-lam))"] = key(
        "log(lam)/(1-lam)", "which reading of the floor's formula"
    )
    stages: Whole = key(2, "2: floor first, entropy later; 1: only clip the reward", ge=1, le=2)
    switch: Real = key(0.5, "share of the run after which stage 2 starts", ge=0, le=1)
    fraction: Real = key(0.2, "stage 2: share of tokens kept, by student entropy", gt=0, lt=1)
    ppo_clip: PpoClip = None


def reward_floor(lam: float, *, reading: str) -> float:
    """Return the least reward, nats: negative, or it would reward tokens that the teacher dislikes."""
    floor = math.log(lam) / (1.0 - lam) if reading == "log(lam)/(1-lam)" else math.log(lam / (1.0 - lam))
    if floor >= 0.0:
        raise ConfigError(
            f"method 'reopold': lam={lam} with floor_reading='{reading}' gives the floor {floor:.3g}, "
            "which must be negative: choose lam < 0.5."
        )
    return floor


def reopold(options: ReopoldOptions) -> Method:
    """Give tokens that a stage leaves out no loss."""
    floor = reward_floor(options.lam, reading=options.floor_reading)
    return Method(gate=_gate(options, floor), trusted=terms.k1_pg(clip=options.ppo_clip, floor=floor))


def _gate(options: ReopoldOptions, floor: float) -> Gate:
    if options.stages == 1:
        return gates.ALL
    early, late = gates.log_ratio_above(floor), gates.entropy_top(options.fraction)
    return gates.staged(early, late, switch=options.switch)


PRESET = Preset(
    summary="reward floor; first tokens above it, later the most uncertain ones",
    source="arXiv 2603.11137",
    options=ReopoldOptions,
    build=reopold,
)
