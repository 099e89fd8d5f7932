"""An answer that names two things settles on none of them, and one that is written another way is still that answer."""

from __future__ import annotations

import pytest

from megatron_tropd.evaluate.rules import grade


@pytest.mark.parametrize(
    ("kind", "response", "reference", "correct"),
    [
        ("final_number", "#### 42 or 43", "42", False),
        ("final_number", "#### 42 or 43", "43", False),
        ("final_number", "#### 42 and $43", "42", False),
        ("final_number", "#### 42 or 42.0", "42", True),
        ("final_number", "#### 42 apples and 3 pears", "42", True),  # as GSM8K reads it: what the line begins with
        ("final_number", "#### 1.2 million", "1200000", True),
        ("final_number", "#### 1.2 million", "1.2", False),
        ("final_number", "#### $3 thousand.", "3000", True),
        ("final_number", "#### 3 dozen", "3", True),
        ("choice", "The answer is A or B", "A", False),
        ("choice", "The answer is A or B", "B", False),
        ("choice", "Answer: **A** and **B**", "A", False),
        ("choice", "\\boxed{A or B}", "A", False),
        ("choice", "\\boxed{\\text{A} and \\text{B}}", "A", False),
        ("choice", "First C. The answer is A or B.", "C", False),
        ("choice", "The answer is A and B is wrong", "A", True),
        ("choice", "The answer is A and I am sure", "A", True),
        ("choice", "The answer is: \\textbf{(A)}", "A", True),
        ("choice", "(b)", "B", True),
        ("choice", "The answer is (b)", "B", True),
        ("choice", "b", "B", False),
    ],
)
def test_the_answer_that_is_settled_on_is_graded(kind: str, response: str, reference: str, correct: bool):
    assert grade(kind, response, reference) is correct
