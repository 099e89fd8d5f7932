"""Suites: GSM8K's own solutions are all right, corrupted ones all wrong; files, overrides, and a model graded."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from megatron_tropd.config.loading import load_config, load_suite
from megatron_tropd.config.sections import DataConfig, EvaluateConfig, SuiteConfig
from megatron_tropd.data.tokenizer import load_tokenizer
from megatron_tropd.errors import ConfigError, DataError
from megatron_tropd.evaluate.grader_pool import GraderPool, Item
from megatron_tropd.evaluate.rules import GradingRule
from megatron_tropd.setup.datasets import complete_suites, read_problems
from tests.runs.test_commands import read_rows
from tests.support.run_inputs import Task, commands, make_task
from tests.unit.data.test_data_chat_templates import TEMPLATES, save_with_bos

ROOT = Path(__file__).resolve().parents[3]
SUITES = ROOT / "examples" / "suites"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tmp_path_factory.mktemp("task"))


def gsm8k() -> Path:
    named = os.environ.get("MEGATRON_TROPD_GSM8K")
    directory = Path(named) if named else ROOT.parent / "shared" / "data" / "gsm8k"
    if not named and not directory.exists():
        pytest.skip("needs GSM8K: set MEGATRON_TROPD_GSM8K to the directory that holds its test.jsonl and train.jsonl")
    return directory


def complete(suite: SuiteConfig) -> tuple[SuiteConfig, ...]:
    data = DataConfig(prompts=(Path("none"),))
    return complete_suites(EvaluateConfig(suites=(suite,)), data, budget=512)


def problems_of(suite: SuiteConfig, tokenizer: Any, *, allow_code: bool = False) -> Any:
    return read_problems(complete(suite), DataConfig(prompts=(Path("none"),)), tokenizer, allow_code=allow_code)


# --------------------------------------------------------------------------- the examples


def corrupted(solution: str) -> str:
    """The same solution with another number behind its marker."""
    reasoning, _, number = solution.rpartition("####")
    return f"{reasoning}#### {int(number.replace(',', '')) + 1}"


def test_gsm8k_grades_its_own_solutions_right_and_corrupted_ones_wrong(tmp_path, monkeypatch):
    directory = gsm8k()
    monkeypatch.setenv("GSM8K", str(directory))
    tokenizer = load_tokenizer(save_with_bos(tmp_path, chat_template=TEMPLATES["chatml"]))
    suite = load_suite(SUITES / "gsm8k.yaml")
    problems = problems_of(suite, tokenizer)["gsm8k"]
    rows = [json.loads(line) for line in (directory / "test.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(problems) == len(rows) == 1319
    assert problems[0].text.startswith(rows[0]["question"]) and "#### " in problems[0].text
    rule, pool = GradingRule(kind="final_number"), GraderPool()
    for change, share in ((str, 1.0), (corrupted, 0.0)):
        items = [Item(rule=rule, response=change(p.answer), answer=p.answer) for p in problems]
        assert np.mean([grade.correct for grade in pool.grade(items)]) == share
    # an independent grader agrees, on some of them
    some = [problems[row] for row in range(0, 1319, 41)]
    items = [Item(rule=GradingRule(kind="math"), response=f"${p.answer.split()[-1]}$", answer=p.answer) for p in some]
    assert all(grade.correct for grade in pool.grade(items))
    pool.close()


def test_the_other_examples_read_the_columns_they_name(tmp_path, monkeypatch):
    tokenizer = load_tokenizer(save_with_bos(tmp_path, chat_template=TEMPLATES["chatml"]))
    (tmp_path / "mc.jsonl").write_text(json.dumps({"question": "Which is odd?", "choices": ["2", "3"], "answer": 1}))
    test = "def check(f):\n    assert f(2) == 3\n"
    row = {"prompt": "def inc(x):\n", "test": test, "entry_point": "inc"}
    (tmp_path / "code.jsonl").write_text(json.dumps(row))
    monkeypatch.setenv("MULTIPLE_CHOICE", str(tmp_path / "mc.jsonl"))
    monkeypatch.setenv("CODE_PROBLEMS", str(tmp_path / "code.jsonl"))
    (question,) = problems_of(load_suite(SUITES / "multiple_choice.yaml"), tokenizer)["multiple choice"]
    assert question.answer == "B" and "Which is odd?\nA. 2\nB. 3\nFinish with" in question.text
    code = load_suite(SUITES / "code.yaml")
    with pytest.raises(ConfigError, match="which is not allowed here"):
        problems_of(code, tokenizer)
    (function,) = problems_of(code, tokenizer, allow_code=True)["code"]
    pool, rule = GraderPool(workers=1, allow_code=True), GradingRule(kind="code")
    answers = ("```python\ndef inc(x):\n    return x + 1\n```", "```python\ndef inc(x):\n    return x\n```")
    found = pool.grade([Item(rule=rule, response=answer, answer=function.answer) for answer in answers])
    pool.close()
    assert [grade.correct for grade in found] == [True, False] and found[1].note == "AssertionError"


# --------------------------------------------------------------------------- files and keys


def test_a_suite_file_goes_under_the_keys_beside_it(task: Task, tmp_path: Path):
    (tmp_path / "suite.yaml").write_text(
        f"name: from file\nprompts: {task.prompts}\ngrader: math\nsamples: 3\npass_at: [1, 3]\ntemperature: 0.5\n"
    )
    config = load_config(task.config, [f"evaluate.suites=[{{file: {tmp_path}/suite.yaml, samples: 4, name: mine}}]"])
    (suite,) = config.evaluate.suites
    assert (suite.name, suite.samples, suite.pass_at, suite.grader) == ("mine", 4, (1, 3), "math")
    assert load_suite(tmp_path / "suite.yaml", ["top_p=0.5"]).top_p == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("grader=maths", "grader = 'maths': must be one of final_number, exact, math, choice, regex, code."),
        ("pass_at=[3]", "pass_at holds 3 of 1 samples. Raise samples, or leave 3 out."),
        ("extract='('", "extract = '(' is not a regular expression"),
        ("prompts=gone.jsonl", "prompts = 'gone.jsonl': there is nothing at"),
        ("promts=x", "promts is not a key. Did you mean prompts?"),
    ],
)
def test_a_mistake_in_a_suite_is_named(task: Task, tmp_path: Path, change: str, message: str):
    (tmp_path / "suite.yaml").write_text(f"name: a\nprompts: {task.prompts}\n")
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_suite(tmp_path / "suite.yaml", [change])


def test_a_reference_that_cannot_be_graded_against_is_found_first(task: Task, tmp_path: Path):
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt": "How many apples are left?", "answer": "3"}\n{"prompt": "How many?", "answer": "some"}\n'
    )
    tokenizer = load_tokenizer(save_with_bos(tmp_path / "t"))
    with pytest.raises(DataError, match=r"p.jsonl:2: reference answer 'some' is not a number"):
        problems_of(SuiteConfig(name="a", prompts=(path,)), tokenizer)


# --------------------------------------------------------------------------- a model


def test_a_model_is_graded_on_suites_alone_and_by_two_ranks(task: Task, tmp_path: Path):
    # three of five reference answers are what the student says
    said = tmp_path / "said.jsonl"
    options = ("--max-new-tokens", 11, "--temperature", 0, "--dtype", "fp32")
    commands().run("generate", task.student, task.directory / "heldout.jsonl", said, *options).expect_success()
    rows = [
        {"prompt": row["prompt"], "answer": row["response"].strip() if number < 3 else "never"}
        for number, row in enumerate(read_rows(said))
    ]
    (tmp_path / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "exact.yaml").write_text(f"name: exact\nprompts: {tmp_path}/problems.jsonl\ngrader: exact\n")
    (tmp_path / "found.yaml").write_text(
        f"name: found\nprompts: {tmp_path}/problems.jsonl\ngrader: regex\nanswer_template: '.'\n"
        "extract: '(?s).*'\nsamples: 2\npass_at: [1, 2]\ntemperature: 1\n"
    )
    suites = ("--suite", tmp_path / "exact.yaml", "--suite", tmp_path / "found.yaml")
    fixed = ("--dtype", "fp32", "--max-new-tokens", 11)
    alone = commands().run("evaluate", task.student, *suites, *fixed, "--out", tmp_path / "one").expect_success()
    assert "60.0 [23.1, 88.2]" in alone.output  # Wilson's interval of 3 out of 5
    assert "student, found: mean length 11 tokens" in alone.output and "pass@2 100.0 [" in alone.output
    assert "student: 15 answers of at most 11 tokens (exact: 5 problems x 1 x 11 tokens, found: " in alone.output
    kept = read_rows(tmp_path / "one" / "answers-student-exact.jsonl")
    assert sum(row["correct"] for row in kept) == 3 and {row["tokens"] for row in kept} <= set(range(12))
    results = json.loads((tmp_path / "one" / "evaluation.json").read_text())
    assert [(row["model"], row["suite"], row["accuracy"]) for row in results] == [
        ("student", "exact", 0.6), ("student", "found", 1.0),
    ]  # fmt: skip
    assert results[1]["pass_at"]["2"][0] == 1.0 and results[0]["timed_out"] == 0
    both = commands().run("evaluate", task.student, *suites, *fixed, "--out", tmp_path / "two", ranks=2)
    both.expect_success()
    assert json.loads((tmp_path / "two" / "evaluation.json").read_text()) == results

    # the same suites of a configuration
    within = commands().run("evaluate", task.config, *suites, f"run_dir={tmp_path}/run", "--limit", 2).expect_success()
    assert "teacher: 6 answers of at most " in within.output
    assert "student before, exact: " in within.output and "teacher, found: " in within.output
    missing = commands().run("evaluate", task.student)
    assert missing.status == 2 and "a model is graded on suites: give --suite" in missing.output


def test_a_model_that_gives_no_numbers_is_refused_before_it_is_asked(task: Task, tmp_path: Path):
    broken = shutil.copytree(task.student, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "suite.yaml").write_text(f"name: a\nprompts: {task.directory}/heldout.jsonl\ngrader: exact\n")
    outcome = commands().run(
        "evaluate", broken, "--suite", tmp_path / "suite.yaml", "--max-new-tokens", 3, "--out", tmp_path / "out"
    )
    assert outcome.status != 0 and "its weights or its precision are broken" in outcome.output
    assert not (tmp_path / "out").exists()
