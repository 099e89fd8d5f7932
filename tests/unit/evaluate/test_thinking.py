"""What stands before the end of a response's thinking is never graded, and a response cut within it has no answer."""

from __future__ import annotations

import pytest

from megatron_tropd.evaluate.grader_pool import GraderPool, Item
from megatron_tropd.evaluate.rules import UNFINISHED, GradingRule, grade
from megatron_tropd.evaluate.thinking import THINKING_MARKS, final_part, opened_thinking


@pytest.mark.parametrize(("opening", "closing"), THINKING_MARKS)
def test_only_what_follows_the_thinking_is_the_answer(opening, closing):
    assert final_part(f"{opening}\nmaybe 3\n{closing}\n\n5") == "\n\n5"
    assert final_part(f"maybe 3\n{closing}5") == "5"  # the prompt opened it
    assert final_part(f"{opening}one{closing} two {opening}three{closing} four") == " four"
    assert final_part(f"{opening}first try 3, hmm") is None
    assert final_part(f"{opening}a{closing}5{opening}again") is None
    assert final_part(f"{opening}{closing}") == ""


def test_a_response_without_thinking_is_all_answer():
    assert final_part("so 5 > 3 and x</b>") == "so 5 > 3 and x</b>" and final_part("") == ""


def test_a_prompt_that_opens_the_thinking_is_seen_at_its_end_only():
    assert opened_thinking("<|assistant|>\n<think>\n") == "<think>"
    assert opened_thinking("Write <think> first.\n<|assistant|>\n") == ""
    assert opened_thinking("<think>\n\n</think>\n\n") == ""  # templates with thinking switched off


@pytest.mark.parametrize(
    ("kind", "response", "reference", "right"),
    [
        ("choice", "<think>The answer is A? No.</think>\n\nB", "B", True),
        ("choice", r"<think>Try \boxed{A}.</think> The answer is (B).", "B", True),
        ("choice", "<think>The answer is A, I guess, or", "A", False),
        ("math", r"<think>maybe \boxed{3}</think> The answer is $5$.", "5", True),
        ("math", r"<think>maybe \boxed{3}</think> The answer is $5$.", "3", False),
        ("math", r"<think>first try \boxed{3}, hmm", "3", False),
        ("final_number", "<think>so #### 3 ... wait", "3", False),
        ("final_number", "#### 3 ... wait</think>#### 4", "4", True),
        ("exact", "<think>hm</think>\nyes", "yes", True),
        ("regex", "<think>42? no</think> 43", r"\b42\b", False),
        ("regex", "<think>42", ".*", False),
    ],
)
def test_every_rule_grades_the_answer_alone(kind, response, reference, right):
    assert grade(kind, response, reference) is right


def test_extraction_and_programs_look_at_the_answer_alone():
    assert not grade("exact", "<think>Answer: 4</think>none", "4", extract=r"Answer: (\d)")
    assert grade("exact", "<think>Answer: 3</think>Answer: 4", "4", extract=r"Answer: (\d)")
    first, second = (f"```python\ndef f():\n    return {number}\n```" for number in (1, 2))
    pool = GraderPool(workers=1, allow_code=True)
    responses = (f"<think>{first}</think>{second}", f"<think>{second}", "<think>#### 2")
    rules = (GradingRule(kind="code", seconds=60), GradingRule(kind="code", seconds=60), GradingRule())
    rows = zip(rules, responses, ("assert f() == 2", "assert f() == 2", "2"), strict=True)
    found = pool.grade([Item(rule=rule, response=response, answer=answer) for rule, response, answer in rows])
    pool.close()
    assert [one.correct for one in found] == [True, False, False]
    assert [one.note for one in found] == ["", UNFINISHED, UNFINISHED]
