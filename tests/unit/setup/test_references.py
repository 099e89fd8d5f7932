"""What cannot be graded against is found before a model is loaded: refused, or counted and named."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_tropd.config.sections import (
    CodeConfig,
    ColumnsConfig,
    DataConfig,
    EvaluateConfig,
    SourceConfig,
    SuiteConfig,
)
from megatron_tropd.data.prompts import read_sources
from megatron_tropd.data.rows import Source
from megatron_tropd.data.table import table_of
from megatron_tropd.data.templates import row_template
from megatron_tropd.errors import ConfigError, DataError
from megatron_tropd.evaluate.code_tests import read_code_reference
from megatron_tropd.evaluate.suites import rule_of_source
from megatron_tropd.setup.datasets import complete_suites
from megatron_tropd.setup.references import answer_template, check_problem_answers, check_training_answers
from megatron_tropd.train.metrics import _accuracy_by_source
from megatron_tropd.types import Prompt
from tests.unit.setup.test_datasets import Letters


def table(*answers: str | None, source: str = "") -> Any:
    return table_of(
        Prompt(index=i, token_ids=np.array([1, 2]), text="q", answer=answer, source=source)
        for i, answer in enumerate(answers)
    )


def suite(grader: str, **options: Any) -> SuiteConfig:
    data = DataConfig(prompts=(Path("p"),))
    asked = EvaluateConfig(prompts=(Path("h"),), suites=(SuiteConfig(name="s", grader=grader, **options),))
    return complete_suites(asked, data, budget=9)[0]


def test_a_reference_of_an_evaluation_that_cannot_be_used_is_refused_with_its_row_and_count():
    with pytest.raises(
        DataError, match=r"s: 2 of 3 reference answers cannot be graded against.\n  memory:1: .* 'some'"
    ):
        check_problem_answers(suite("final_number"), table("some", "3", "nan"), allow_code=False)
    with pytest.raises(DataError, match=r"1 of 2 problems have no reference answer .* first is memory:2"):
        check_problem_answers(suite("exact"), table("a", None), allow_code=False)


def test_mathematics_that_cannot_be_read_is_counted_and_named_and_all_of_it_refused(caplog):
    with caplog.at_level(logging.WARNING):
        check_problem_answers(suite("math", timeout_s=60), table("3", "$$", r"\frac{1}{2}"), allow_code=False)
    assert (
        "s: 1 of 3 reference answers cannot be read" in caplog.text and "memory:2: reference answer '$$'" in caplog.text
    )
    with pytest.raises(DataError, match="2 of 2 reference answers cannot be graded against"):
        check_problem_answers(suite("math", timeout_s=60), table("", "$"), allow_code=False)


def test_tests_that_any_program_passes_are_refused_before_anything_runs():
    fine, useless = "assert f(1) == 2", "try:\n    assert f(1) == 2\nexcept NameError:\n    pass"
    check_problem_answers(suite("code", timeout_s=60), table(fine), allow_code=True)
    with pytest.raises(DataError, match=r"memory:2: the tests .* would let every program pass: .*empty program"):
        check_problem_answers(suite("code", timeout_s=60), table(fine, useless), allow_code=True)


def test_references_of_training_that_cannot_be_used_are_counted_by_source(caplog):
    data = DataConfig(
        sources=(
            SourceConfig(name="a", prompts=(Path("p"),), grader="choice"),
            SourceConfig(name="b", prompts=(Path("q"),)),
        )
    )
    check_training_answers(data, table("A", "B", source="a"), allow_code=False)
    assert not caplog.text
    check_training_answers(data, table("A", None, "Z", source="a"), allow_code=False)
    assert (
        "a: 1 of 3 prompts have no reference answer: accuracy_train leaves them out. The first is memory:2"
        in caplog.text
    )
    assert "a: 1 of 2 reference answers cannot be graded against by 'choice'" in caplog.text
    assert "memory:3: reference answer 'Z' is not a choice" in caplog.text
    with pytest.raises(ConfigError, match="which is not allowed here"):
        check_training_answers(DataConfig(prompts=(Path("p"),), grader="code"), table("assert f"), allow_code=False)


def test_training_grades_by_the_extraction_and_the_blocks_of_its_source():
    own = SourceConfig(name="own", prompts=(Path("p"),), extract="x", code=CodeConfig(blocks="last"))
    other = SourceConfig(name="other", prompts=(Path("q"),))
    data = DataConfig(sources=(own, other), extract="y", grader="code")
    rules = [rule_of_source(data, name) for name in ("own", "other")]
    assert [(rule.extract, rule.blocks) for rule in rules] == [("x", "last"), ("y", "definitions")]
    with pytest.raises(ValueError, match="is not a regular expression"):
        DataConfig(prompts=(Path("p"),), extract="(")


def test_training_accuracy_leaves_out_what_it_cannot_tell():
    right = np.array([[1, 0], [np.nan, np.nan], [1, 1], [np.nan, np.nan]])
    # by hand: (1 + 0 + 1 + 1) / 4 and, of a alone, 1/2
    assert _accuracy_by_source(right, ["a", "a", "b", "b"], {"a", "b"}) == {
        "accuracy_train": 0.75, "accuracy_train/a": 0.5, "accuracy_train/b": 1.0,
    }  # fmt: skip
    # a source of which nothing is known leaves no accuracy of all
    assert _accuracy_by_source(right, ["a", "a", "b", "b"], {"a", "b", "c"}).keys() == {
        "accuracy_train/a", "accuracy_train/b",
    }  # fmt: skip
    assert _accuracy_by_source(right[1:2], [""], {""}) == {}


def test_columns_beside_the_tests_become_part_of_the_reference():
    code = CodeConfig(entry_point="meta.name", prelude="prompt")
    made = answer_template(None, code=code)
    assert made is not None
    row = {"answer": "def check(f):\n    assert f(1) == 2", "meta": {"name": "inc"}, "prompt": "import math\n"}
    reference = read_code_reference(row_template(made).render(row))
    assert reference.form == "check(entry_point)" and reference.tests[1] == "check(inc)"
    assert reference.prelude == "import math\n" and "inc" in reference.wanted
    assert row_template(made).render({**row, "answer": None}) == ""
    assert answer_template("{{ x }}", code=CodeConfig()) == "{{ x }}" and answer_template(None, code=None) is None
    with pytest.raises(ConfigError, match=r"answer_template and code.entry_point both say"):
        answer_template("{{ x }}", code=code)


def test_tests_are_taken_as_they_stand_in_text_and_lists(tmp_path):
    made = answer_template(None, code=CodeConfig())
    rows = [{"test_list": ["assert f(1) == 2"]}, {"test_list": "assert f(1) > 2"}, {"test_list": None}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": "q", **row}) + "\n" for row in rows))
    columns = ColumnsConfig(**ColumnsConfig(answer="test_list").model_dump())
    source = Source(paths=(tmp_path / "p.jsonl",), columns=columns, answer_template=made)
    answers = [prompt.answer for prompt in read_sources([source], Letters()).prompts]
    assert read_code_reference(answers[0] or "").form == "list of assertions"
    assert answers[1:] == ["assert f(1) > 2", None]
