"""Is a response right, and how sure can we be of an accuracy?"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Callable
from decimal import Decimal
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_tropd.errors import ConfigError, DataError

_Z95 = NormalDist().inv_cdf(0.975)

_NUMBER = r"\$?[-+\u2212]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?"
_FINAL = re.compile(rf"####\s*({_NUMBER})(?![\w/^*]|[.,:]\d)")  # "#### 1/2" and "#### 1,23" are not plain numbers
_ONLY_NUMBER = re.compile(_NUMBER)


# --------------------------------------------------------------------------- one response


def final_answer(text: str) -> Decimal | None:
    """The number behind the last ``####`` (GSM8K's convention), or None when there is none.

    Signs, dollar signs, thousands separators and decimals are understood: ``#### -$1,234.50`` is -1234.50.
    Text may follow the number (``#### 42 apples``).
    """
    marker = text.rfind("####")
    match = _FINAL.match(text, marker) if marker >= 0 else None
    return _to_decimal(match.group(1)) if match else None


def grade(kind: str, response: str, answer: str) -> bool:
    """Whether ``response`` is right.

    Kinds:
        final_number: ``final_answer(response)`` equals the reference, a number or a text that ends in ``#### number``.
        exact: same text, white space at both ends aside.
        math: mathematically equal, by the library math-verify (LaTeX, fractions, sets, ...).
        regex: ``answer`` is a regular expression that must be found in ``response``.

    Raises:
        ConfigError: unknown kind.
        DataError: the reference cannot be used with this kind.
    """
    if kind not in _GRADERS:
        raise ConfigError(f"unknown grading kind {kind!r}: use one of {', '.join(sorted(_GRADERS))}.")
    return _GRADERS[kind](response, answer)


def _to_decimal(number: str) -> Decimal | None:
    plain = number.replace(",", "").replace("$", "").replace("\u2212", "-")
    return Decimal(plain) if any(character.isdigit() for character in plain) else None


def _grade_final_number(response: str, answer: str) -> bool:
    whole = _ONLY_NUMBER.fullmatch(answer.strip())
    reference = _to_decimal(whole.group()) if whole else final_answer(answer)
    if reference is None:
        raise DataError(f"reference answer {answer!r} is not a number: give a number or '... #### number'.")
    return final_answer(response) == reference


def _grade_exact(response: str, answer: str) -> bool:
    return response.strip() == answer.strip()


def _grade_regex(response: str, answer: str) -> bool:
    try:
        return re.search(answer, response) is not None
    except re.error as error:
        raise DataError(f"reference answer {answer!r} is not a regular expression: {error}.") from error


def _grade_math(response: str, answer: str) -> bool:
    from math_verify import parse, verify  # type: ignore[import-untyped,unused-ignore]

    # math-verify limits its time with a signal, which exists on the main thread only.
    seconds = 5 if threading.current_thread() is threading.main_thread() else None
    reference = answer.rpartition("####")[2].strip()
    anchored = reference if "$" in reference or "\\boxed" in reference else f"${reference}$"
    gold = parse(anchored, parsing_timeout=seconds)
    if not gold:
        raise DataError(f"reference answer {answer!r} is not an expression math-verify can read.")
    return bool(verify(gold, parse(response, parsing_timeout=seconds), timeout_seconds=seconds))


_GRADERS: dict[str, Callable[[str, str], bool]] = {
    "final_number": _grade_final_number,
    "exact": _grade_exact,
    "math": _grade_math,
    "regex": _grade_regex,
}


# --------------------------------------------------------------------------- many responses


class Accuracy(NamedTuple):
    """Mean accuracy with its 95 % interval, all in [0, 1]."""

    mean: float
    low: float
    high: float


def accuracy_interval(correct_per_problem: npt.ArrayLike) -> Accuracy:
    """95 % interval of the accuracy on problems like these.

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


def _effective_samples(correct_PN: npt.NDArray[np.float64], mean: float) -> float:
    problems, samples = correct_PN.shape
    if samples == 1 or problems == 1 or mean in (0.0, 1.0):
        return problems  # no spread between problems to be seen: each counts once
    variance_of_mean = correct_PN.mean(axis=1).var(ddof=1) / problems
    independent = problems * samples  # samples cannot tell more than that
    return independent if variance_of_mean == 0 else min(mean * (1 - mean) / variance_of_mean, independent)


def _wilson(mean: float, count: float) -> tuple[float, float]:
    shrink = 1 + _Z95**2 / count
    centre = (mean + _Z95**2 / (2 * count)) / shrink
    half = _Z95 / shrink * math.sqrt(mean * (1 - mean) / count + _Z95**2 / (4 * count**2))
    return max(centre - half, 0.0), min(centre + half, 1.0)


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased chance that at least one of ``k`` samples is right, from ``n`` samples of which ``c`` are.

    ``1 - C(n-c, k) / C(n, k)`` in exact integers (Chen et al. 2021, arXiv 2107.03374, equation 1).

    Raises:
        ConfigError: ``k`` is not in 1..n.
    """
    if not 1 <= k <= n:
        raise ConfigError(f"pass@{k} needs 1 <= k <= samples per problem, got {n} samples: draw more, or lower k.")
    if not 0 <= c <= n:
        raise DataError(f"{c} right samples of {n} is impossible.")
    return 1 - math.comb(n - c, k) / math.comb(n, k)
