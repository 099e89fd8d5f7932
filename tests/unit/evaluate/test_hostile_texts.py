"""No text makes grading slow: what is graded in place takes time in proportion to its length."""

from __future__ import annotations

import time
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_tropd.config.sections import Grader
from megatron_tropd.evaluate import grader_pool
from megatron_tropd.evaluate.choices import chosen_letter
from megatron_tropd.evaluate.mathematics import exact_number, last_box, tidied
from megatron_tropd.evaluate.numbers import final_answer, plain_number
from megatron_tropd.evaluate.programs import blocks_of, program_of
from megatron_tropd.evaluate.rules import GradingRule, grade
from megatron_tropd.evaluate.thinking import final_part

PIECES = (
    "\n", " ", "\t", "answer", "answer is", "answer:", "option ", "A", "A ", "*", "_", "(", ")", "{", "}", "\\", "$",
    "\\boxed{", "\\boxed ", "\\text{", "####", "#### ", "=", "x=", "1", "1,", "1 234 ", ".", "<<", ">>", "e", "-", ",",
    "```", "~~~", "```python\n", "\n```\n", "def f():\n", "<think>", "</think>", "\u7b54\u6848", "\u00b2", "\u00bd",
    "and ", "if", "%", "#",
)  # fmt: skip
IN_PLACE_KINDS = {"choice": "B", "exact": "x", "final_number": "3"}
IN_PLACE = (chosen_letter, final_answer, plain_number, final_part, last_box, tidied, exact_number)


@pytest.mark.slow
@pytest.mark.parametrize("function", [*IN_PLACE, blocks_of], ids=lambda function: function.__name__)
def test_time_grows_with_the_length_alone(function):
    """Twelve times the text takes far less than the 144 times of a quadratic rule, whatever is repeated."""
    slow = []
    for piece in PIECES:
        for start in ("", "answer", "```\n"):
            text = start + piece * (30_000 // len(piece)) + "!"
            began = time.process_time()
            function(text)
            spent = time.process_time() - began
            if spent > 4.0:  # tens of milliseconds where it is linear, more under load; ten seconds where it is not
                slow.append((start, piece, spent))
    assert not slow


# any character there is, halves of characters too: what no list of pieces thinks of
ANY = st.text(st.characters(exclude_categories=()), min_size=1, max_size=3)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(st.one_of(st.sampled_from(PIECES), ANY), max_size=12), st.integers(1, 400))
def test_no_text_raises_or_takes_long(pieces, times):
    text = "".join(pieces) * times
    began = time.process_time()
    for function in (*IN_PLACE, blocks_of, program_of):
        function(text)
    assert time.process_time() - began < 5.0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.one_of(st.sampled_from(PIECES), ANY),
    st.one_of(st.sampled_from(PIECES), ANY),
    st.sampled_from(sorted(IN_PLACE_KINDS)),
)
def test_every_rule_that_is_applied_in_place_takes_linear_time(before, piece, kind):
    """Of 100,000 characters: a rule that looks at all pairs of them takes minutes."""
    text = before + piece * (100_000 // len(piece)) + "!"
    began = time.process_time()
    grade(kind, text, IN_PLACE_KINDS[kind])
    assert time.process_time() - began < 3.0


def test_every_rule_is_applied_in_place_or_has_a_limit():
    assert set(IN_PLACE_KINDS) == set(grader_pool._BOUNDED)
    for kind in get_args(Grader):
        assert (kind in IN_PLACE_KINDS) != grader_pool._is_slow(GradingRule(kind=kind))
        assert grader_pool._is_slow(GradingRule(kind=kind, extract="x"))  # an expression of the user's
