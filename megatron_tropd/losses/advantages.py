"""From rewards of whole answers to advantages: what a reward is measured against, over all samples of a prompt.

To be called with the rewards of every replica's answers: a group may be split over replicas.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_tropd.errors import ConfigError

Advantage = Literal["group_mean", "leave_one_out", "normalized", "raw"]
ADVANTAGES: tuple[Advantage, ...] = ("group_mean", "leave_one_out", "normalized", "raw")
_EPS = 1e-6  # beside the standard deviation


def advantages(reward_PS: npt.NDArray[np.float64], kind: Advantage) -> npt.NDArray[np.float64]:
    """Return, ``[P, S]``, the advantage of every answer of every prompt's group, fp64; 0 where the reward is nan.

    With r the rewards of the n answers of a group that have one:

        raw            r
        group_mean     r - mean(r)
        normalized     (r - mean(r)) / (std(r) + 1e-6), std with n - 1 (GRPO, arXiv 2402.03300)
        leave_one_out  r - mean of the others = n / (n - 1) (r - mean(r)) (RLOO, arXiv 2402.14740)

    A group with one such answer has nothing to compare it with: 0, but for ``raw``.

    Raises:
        ConfigError: no such kind.
    """
    if kind not in ADVANTAGES:
        raise ConfigError(f"reward.advantage={kind!r} must be one of {', '.join(ADVANTAGES)}.")
    known_PS = ~np.isnan(reward_PS)
    reward_PS = np.where(known_PS, reward_PS, 0.0)
    if kind == "raw":
        return reward_PS
    count_P1 = known_PS.sum(axis=1, keepdims=True)
    mean_P1 = reward_PS.sum(axis=1, keepdims=True) / np.maximum(count_P1, 1)
    centered_PS = np.where(known_PS, reward_PS - mean_P1, 0.0)
    others_P1 = np.maximum(count_P1 - 1, 1)
    if kind == "leave_one_out":
        return centered_PS * count_P1 / others_P1
    if kind == "normalized":
        std_P1 = np.sqrt((centered_PS**2).sum(axis=1, keepdims=True) / others_P1)
        return centered_PS / (std_P1 + _EPS)
    return centered_PS
