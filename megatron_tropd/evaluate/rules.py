"""Decide whether a response is right, one at a time; ``grader_pool`` applies the rules to many, within time limits."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from megatron_tropd.errors import ConfigError, DataError
from megatron_tropd.evaluate.choices import chosen_letter
from megatron_tropd.evaluate.code_tests import read_code_reference
from megatron_tropd.evaluate.mathematics import check_math_reference, grade_math
from megatron_tropd.evaluate.numbers import final_answer, plain_number
from megatron_tropd.evaluate.programs import BlockRule
from megatron_tropd.evaluate.thinking import final_part

CODE = "code"  # graded by running it, which only ``evaluate.grader_pool`` does
UNFINISHED = "the answer ends within its thinking"
NO_PROGRAM = "the answer holds no program"


@dataclass(frozen=True, slots=True, kw_only=True)
class GradingRule:
    """The rule by which the responses of one data set are graded."""

    kind: str = "final_number"
    extract: str | None = None  # regular expression; its last match that is not empty (group 1 if any) is graded
    seconds: float = 10.0  # for one response; what takes longer is wrong
    blocks: BlockRule = "definitions"  # which blocks of a response are the program (``programs.program_of``)


def grade(kind: str, response: str, answer: str, *, extract: str | None = None) -> bool:
    """Say whether ``response`` is right. What it holds before the end of its thinking does not count.

    Kinds:
        final_number: ``final_answer(response)`` equals the reference, a number or a text that ends in ``#### number``.
        exact: same text, white space at both ends aside.
        math: the last box, or else the final answer, is mathematically equal (``mathematics.grade_math``).
        choice: ``chosen_letter(response)`` is the reference, a letter from A to J.
        regex: ``answer`` is a regular expression that must be found in ``response``.

    Raises:
        ConfigError: unknown kind, or one that needs ``evaluate.grader_pool``.
        DataError: the reference cannot be used with this kind.
    """
    if kind not in _GRADERS:
        raise ConfigError(f"unknown grading kind {kind!r}: use one of {', '.join(sorted((*_GRADERS, CODE)))}.")
    graded = graded_part(response, extract)
    # also a response that cannot be right says so when its reference is of no use
    return _GRADERS[kind](graded or "", answer) and graded is not None


def graded_part(response: str, extract: str | None = None) -> str | None:
    """Return what of a response is graded: what follows its thinking, cut down by ``extract``; None without any."""
    answer = final_part(response)
    if answer is None:
        return None
    cut = extracted(answer, extract)
    if cut or extract is None or not response.endswith(answer):
        return cut
    # a pattern may name the mark that ends the thinking, as in `</think>(.*)`: what it finds must still stand behind
    begin, found = len(response) - len(answer), ""
    for match in re.finditer(extract, response):
        part = next((i for i, group in enumerate(match.groups(), start=1) if group is not None), 0)
        found = match.group(part) if match.group() and match.start(part) >= begin else found
    return found


def extracted(response: str, pattern: str | None) -> str:
    """Return the last match of a pattern that is not empty, of one with groups the first group that took part in it.

    It is empty where the pattern is not found.

    Raises:
        ConfigError: the pattern is not a regular expression.
    """
    if pattern is None:
        return response
    last: re.Match[str] | None = None
    try:
        for match in re.finditer(pattern, response):
            last = match if match.group() else last
    except re.error as error:
        raise ConfigError(f"extract = {pattern!r} is not a regular expression: {error}.") from None
    if last is None:
        return ""
    groups = last.groups()
    return next((group for group in groups if group is not None), "") if groups else last.group()


def check_reference(kind: str, answer: str) -> None:
    """Raise DataError when ``answer`` cannot be what responses are graded against under this kind."""
    if kind == CODE:
        read_code_reference(answer)
    elif kind == "math":
        check_math_reference(answer)
    else:
        grade(kind, "", answer)


def _grade_final_number(response: str, answer: str) -> bool:
    reference = plain_number(answer)
    reference = final_answer(answer) if reference is None else reference
    if reference is None:
        raise DataError(f"reference answer {answer!r} is not a number: give a number or '... #### number'.")
    return final_answer(response) == reference


def _grade_exact(response: str, answer: str) -> bool:
    if not answer.strip():
        raise DataError(f"reference answer {answer!r} is empty: a response without any text would be right.")
    return response.strip() == answer.strip()


def _grade_choice(response: str, answer: str) -> bool:
    reference = answer.strip().strip("().")
    if not re.fullmatch("[A-J]", reference):
        raise DataError(f"reference answer {answer!r} is not a choice: give one letter from A to J.")
    return chosen_letter(response) == reference


def _grade_regex(response: str, answer: str) -> bool:
    if answer.strip().lower() in ("", "nan"):
        raise DataError(f"reference answer {answer!r} is not a regular expression, but a missing value.")
    try:
        return re.search(answer, response) is not None
    except re.error as error:
        raise DataError(f"reference answer {answer!r} is not a regular expression: {error}.") from error


_GRADERS: dict[str, Callable[[str, str], bool]] = {
    "final_number": _grade_final_number,
    "exact": _grade_exact,
    "math": grade_math,
    "choice": _grade_choice,
    "regex": _grade_regex,
}
