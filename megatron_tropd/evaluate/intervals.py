"""Bound accuracies: intervals over problems, and pass@k."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_tropd.errors import ConfigError, DataError

_Z95 = NormalDist().inv_cdf(0.975)


class Accuracy(NamedTuple):
    """Mean accuracy with its 95 % interval, all in [0, 1]."""

    mean: float
    low: float
    high: float


def accuracy_interval(correct_per_problem: npt.ArrayLike) -> Accuracy:
    """Return the mean accuracy with its 95 % interval on problems like these.

    One sample per problem: Wilson's interval. Several (mean@n): samples of one problem are alike, so the *problems*
    are the independent draws; the standard error of their means gives an effective number of independent samples,
    with which Wilson's formula is used. For many problems that is the normal interval over problem means, but it stays
    inside [0, 1] and does not collapse when every problem is solved.

    Args:
        correct_per_problem: [problems] or [problems, samples], 1 (True) where right.

    Source: Wilson 1927; effective sample size as in Korn and Graubard 1998.
    """
    correct_PN = np.asarray(correct_per_problem, dtype=np.float64)
    if correct_PN.ndim not in (1, 2) or correct_PN.size == 0:
        raise DataError(f"accuracy needs [problems] or [problems, samples], got shape {correct_PN.shape}.")
    mean = float(correct_PN.mean())
    low, high = _wilson(mean, _effective_samples(correct_PN.reshape(len(correct_PN), -1), mean))
    return Accuracy(mean, low, high)


def pass_at_k_interval(correct_PN: npt.ArrayLike, k: int) -> Accuracy:
    """Return the mean of ``pass_at_k`` over problems, with the 95 % interval on problems like these.

    The problems' estimates are independent draws in [0, 1]: as in ``accuracy_interval`` their spread says how many
    yes-or-no draws they are worth, and Wilson's formula does the rest, also where all or none are solved.

    Args:
        correct_PN: [problems, samples], 1 (True) where right.
    """
    right_PN = np.asarray(correct_PN)
    if right_PN.ndim != 2 or right_PN.size == 0:
        raise DataError(f"pass@k needs [problems, samples], got shape {right_PN.shape}.")
    problems, samples = right_PN.shape
    estimate_P = np.array([pass_at_k(samples, int(count), k) for count in right_PN.sum(axis=1)])
    mean = float(estimate_P.mean())
    variance_of_mean = float(estimate_P.var(ddof=1)) / problems if problems > 1 else 0.0
    worth: float = problems  # no spread to be seen: each counts once
    if variance_of_mean > 0:
        worth = min(mean * (1 - mean) / variance_of_mean, problems * samples)
    return Accuracy(mean, *_wilson(mean, worth))


def _effective_samples(correct_PN: npt.NDArray[np.float64], mean: float) -> float:
    problems, samples = correct_PN.shape
    if samples == 1 or problems == 1 or mean in (0.0, 1.0):
        return problems  # no spread between problems to be seen: each counts once
    variance_of_mean = correct_PN.mean(axis=1).var(ddof=1) / problems
    independent = problems * samples  # samples cannot tell more than that
    return independent if variance_of_mean == 0 else min(mean * (1 - mean) / variance_of_mean, independent)


def _wilson(mean: float, count: float) -> tuple[float, float]:
    shrink = 1 + _Z95**2 / count
    center = (mean + _Z95**2 / (2 * count)) / shrink
    half = _Z95 / shrink * math.sqrt(mean * (1 - mean) / count + _Z95**2 / (4 * count**2))
    return max(center - half, 0.0), min(center + half, 1.0)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Estimate without bias the chance that of ``k`` samples one or more are right, from ``n`` of which ``c`` are.

    ``1 - C(n-c, k) / C(n, k)`` in exact integers (Chen et al. 2021, arXiv 2107.03374, equation 1).

    Raises:
        ConfigError: ``k`` is not in 1..n.
    """
    if not 1 <= k <= n:
        raise ConfigError(f"pass@{k} needs 1 <= k <= samples per problem, got {n} samples: draw more, or lower k.")
    if not 0 <= c <= n:
        raise DataError(f"{c} right samples of {n} is impossible.")
    return 1 - math.comb(n - c, k) / math.comb(n, k)
