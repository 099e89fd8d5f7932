"""Rewards of your own: reward.function=examples/rewards.py:NAME (docs/rewards.md).

A function is called once per prompt, with all responses to it, and returns a number for each. It takes what it names.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence


def right_and_short(
    responses: Sequence[str], answer: str | None, tokens: Sequence[int], finished: Sequence[bool]
) -> list[float | None]:
    """Reward a right last number by 1, less a tenth per hundred tokens; an answer that was cut off has no bonus."""
    if answer is None:
        return [None] * len(responses)  # nothing to compare with: no reward, which is not the reward 0
    wanted = last_number(answer)
    rewards: list[float | None] = []
    for response, length, ended in zip(responses, tokens, finished, strict=True):
        right = ended and last_number(response) == wanted
        rewards.append((1.0 if right else 0.0) - 0.001 * length)
    return rewards


def last_number(text: str) -> float | None:
    """Return the last number of a text."""
    found = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return float(found[-1]) if found else None


def varied(responses: Sequence[str]) -> list[float]:
    """Reward an answer by the entropy of its characters, nats: one that repeats itself has little."""
    return [entropy(list(Counter(response).values())) for response in responses]


def entropy(counts: Sequence[int]) -> float:
    """Return the entropy of frequencies, nats; 0 without any."""
    total = sum(counts)
    return -sum(count / total * math.log(count / total) for count in counts)
