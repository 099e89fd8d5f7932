"""Decide whether a response is right, one at a time; ``grader_pool`` applies the rules to many, within time limits."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal

from megatron_tropd.errors import ConfigError, DataError

_NUMBER = r"\$?[-+\u2212]?\$?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?"
_FINAL = re.compile(rf"####\s*({_NUMBER})(?![\w/^*]|[.,:]\d)")  # "#### 1/2" and "#### 1,23" are not plain numbers
_ONLY_NUMBER = re.compile(_NUMBER)
CODE = "code"  # graded by running it, which only ``evaluate.grader_pool`` does


@dataclass(frozen=True, slots=True, kw_only=True)
class GradingRule:
    """How the responses of one data set are graded."""

    kind: str = "final_number"
    extract: str | None = None  # regular expression; its last match that is not empty (group 1 if any) is graded
    seconds: float = 10.0  # for one response; what takes longer is wrong


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
        choice: ``chosen_letter(response)`` is the reference, a letter from A to J.
        regex: ``answer`` is a regular expression that must be found in ``response``.

    Raises:
        ConfigError: unknown kind, or one that needs ``evaluate.grader_pool``.
        DataError: the reference cannot be used with this kind.
    """
    if kind not in _GRADERS:
        raise ConfigError(f"unknown grading kind {kind!r}: use one of {', '.join(sorted((*_GRADERS, CODE)))}.")
    return _GRADERS[kind](response, answer)


def extracted(response: str, pattern: str | None) -> str:
    """The part of a response that is graded; empty where the pattern is not found.

    Raises:
        ConfigError: the pattern is not a regular expression.
    """
    if pattern is None:
        return response
    try:
        matches = [match for match in re.finditer(pattern, response) if match.group()]
    except re.error as error:
        raise ConfigError(f"extract = {pattern!r} is not a regular expression: {error}.") from None
    if not matches:
        return ""
    return matches[-1].group(1 if matches[-1].re.groups else 0) or ""


# in the order in which they are believed; the last match of the first that is found counts
_CHOICES = tuple(
    re.compile(pattern)
    for pattern in (
        r"\\boxed\{\s*(?:\\(?:text|mathrm|mathbf|textbf)\{)?\s*\(?([A-J])\)?\s*\}",
        r"####\s*\(?([A-J])\b",
        r"(?i:answer|choice|option)(?i:\s+is)?\s*:?\s*[*_\"'(\[]{0,3}([A-J])\b(?![\w'])",
        r"^\W{0,3}([A-J])(?:[.):]|\W{0,3}$)",
        r"(?m:^\W{0,3}([A-J])\W{0,3}$)",
    )
)


def chosen_letter(response: str) -> str | None:
    """The letter, A to J, that a response to a multiple-choice question settles on.

    Believed in this order: ``\\boxed{B}``; ``#### B``; "the answer is (B)"; a response that begins with the letter
    ("B) because ..."); a line that holds nothing else. Only capital letters count: "a" is mostly a word.
    """
    for pattern in _CHOICES:
        matches = pattern.findall(response)
        if matches:
            return str(matches[-1])
    return None


_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


def program_of(response: str) -> str:
    """The program in a response: its last Python block, or its last block without a language, or all of it."""
    blocks = [(language.lower(), code) for language, code in _FENCE.findall(response)]
    for languages in (("python", "python3", "py"), ("",)):
        found = [code for language, code in blocks if language in languages]
        if found:
            return found[-1]
    return response


def check_reference(kind: str, answer: str) -> None:
    """Raises DataError when ``answer`` cannot be what responses are graded against under this kind."""
    if kind == CODE:
        try:
            compile(answer, "tests", "exec")
        except (SyntaxError, ValueError) as error:
            raise DataError(f"reference answer {answer[:80]!r} is not a Python program of tests: {error}.") from None
    else:
        grade(kind, "", answer)


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


def _grade_choice(response: str, answer: str) -> bool:
    reference = answer.strip().strip("().")
    if not re.fullmatch("[A-J]", reference):
        raise DataError(f"reference answer {answer!r} is not a choice: give one letter from A to J.")
    return chosen_letter(response) == reference


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
    "choice": _grade_choice,
    "regex": _grade_regex,
}
