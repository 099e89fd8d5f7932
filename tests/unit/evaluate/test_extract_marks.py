"""A pattern may name the mark that ends the thinking; what is graded stands behind it all the same."""

from __future__ import annotations

import pytest

from megatron_tropd.evaluate.rules import graded_part


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("(?s).*</think>(.*)", "y = 7"),
        ("</think>.*?([0-9])", "7"),
        ("x = ([0-9])", ""),  # it stands in the thinking alone
        ("(?s)<think>(.*)</think>", ""),
        ("y = ([0-9])", "7"),
    ],
)
def test_a_pattern_that_names_the_mark_finds_what_follows_it(pattern: str, expected: str):
    assert graded_part("<think>x = 3</think>y = 7", pattern) == expected
