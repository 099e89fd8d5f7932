"""The smallest run: models and prompts named on the command line, no configuration, no responses in the data."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.run_inputs import POSITIONS, Task, assert_metrics_agree, commands, make_task, steady_metrics

RUN = Path("runs", "student-from-teacher-tropd")
# what is a matter of seconds, and of the sizes of these models, not of the one line
SMALL = (
    *("seed=7", "dtype=fp32", "train.steps=4", "train.prompts_per_step=2", "rollout.samples_per_prompt=1"),
    *("optimizer.lr=2.0e-3", "optimizer.eps=1.0e-5", "method.k=7", "checkpoint.every=1", "report.samples=0"),
    *("evaluate.suites=[{name: greedy}]", "data.max_prompt_tokens=60"),
)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    task = make_task(tmp_path_factory.mktemp("task"))
    rows = [json.loads(line) for line in task.prompts.read_text().splitlines()]
    task.prompts.write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    return task


def one_line(task: Task, *changes: str) -> tuple[str, ...]:
    named = ("--student", str(task.student), "--teacher", str(task.teacher), "--prompts", str(task.prompts))
    return ("train", *named, *SMALL, *changes)


@pytest.fixture(scope="module")
def whole(task: Task, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run from its beginning to its end: where it was started, and what it printed."""
    place, problems = tmp_path_factory.mktemp("whole"), f"evaluate.prompts={task.directory}/heldout.jsonl"
    return place, commands().run(*one_line(task, problems), cwd=place).expect_success().output


def rows_of(place: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / RUN / "responses" / "prompts.jsonl").read_text().splitlines()]


def test_one_line_trains_evaluates_exports_and_says_what_it_chose(task: Task, whole: tuple[Path, str]):
    from transformers import AutoModelForCausalLM

    place, output = whole
    left = POSITIONS - 60
    assert f"chosen, as nothing is set: rollout.max_new_tokens={left}, " in output
    config = yaml.safe_load((place / RUN / "config.yaml").read_text())
    assert (config["data"]["max_prompt_tokens"], config["rollout"]["max_new_tokens"]) == (60, left)
    assert config["student"]["parallel"]["tensor"] == 1 and config["train"]["pack_tokens"] >= POSITIONS
    assert config["data"]["prompts"] == [str(RUN / "responses" / "prompts.jsonl")]
    assert [row["step"] for row in steady_metrics(place / RUN)] == [1, 2, 3, 4]
    found = {(one["model"], one["step"]) for one in json.loads((place / RUN / "evaluation.json").read_text())}
    assert len(found) == 3  # the student before and after, and the teacher
    model = AutoModelForCausalLM.from_pretrained(place / RUN / "student")
    before = AutoModelForCausalLM.from_pretrained(task.student)
    assert any(not a.equal(b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_the_teacher_answers_as_many_prompts_as_the_steps_ask_and_says_so_once(task: Task, whole: tuple[Path, str]):
    place, output = whole
    given = [json.loads(line)["prompt"] for line in task.prompts.read_text().splitlines()]
    rows = rows_of(place)
    assert len(rows) == 8 and len(given) == 11  # four steps of two prompts
    assert [row["prompt"] for row in rows] == [text for text in given if text in {row["prompt"] for row in rows}][:8]
    assert all(row["generated"]["ids"] and isinstance(row["response"], str) for row in rows)
    said = r"the teacher writes responses to 8 of 11 prompts, as many as 4 steps ask, once"
    assert len(re.findall(said, output)) == 1
    # in the first steps the whole prefix is the teacher's: the response is what it wrote
    assert steady_metrics(place / RUN)[0]["prefix_length"] > 0


def test_a_killed_run_resumes_with_the_very_responses_and_ends_as_if_nothing_had_happened(
    task: Task, whole: tuple[Path, str], tmp_path: Path
):
    job = commands().start(*one_line(task), cwd=tmp_path)
    job.until(lambda: any((tmp_path / RUN / "checkpoints").glob("step-*2/*")))
    job.kill()
    file = tmp_path / RUN / "responses" / "prompts.jsonl"
    written = file.stat()

    outcome = commands().run(*one_line(task), cwd=tmp_path).expect_success()

    assert "resuming from" in outcome.output and "the teacher writes responses" not in outcome.output
    assert (file.stat().st_mtime_ns, file.stat().st_ino) == (written.st_mtime_ns, written.st_ino)
    assert steady_metrics(tmp_path / RUN) == steady_metrics(whole[0] / RUN)
    # other prompts, or none of the responses, are refused before anything is written
    other = tmp_path / "other.jsonl"
    other.write_text("".join(task.prompts.read_text().splitlines(keepends=True)[1:]))
    words = [str(other) if word == str(task.prompts) else word for word in one_line(task)]
    refused = commands().run(*words, cwd=tmp_path)
    assert refused.status == 2 and "were written for other data.prompts than this run" in refused.output
    file.rename(tmp_path / "kept.jsonl")
    lost = commands().run(*one_line(task), cwd=tmp_path)
    assert lost.status == 2 and "are lost" in lost.output and "Put it back" in lost.output
    assert not file.exists()


def test_two_ranks_write_the_same_responses_and_learn_the_same(task: Task, whole: tuple[Path, str], tmp_path: Path):
    outcome = commands().run(*one_line(task), ranks=2, cwd=tmp_path).expect_success()
    assert "student.parallel=" in outcome.output
    assert rows_of(tmp_path) == rows_of(whole[0])
    assert_metrics_agree(steady_metrics(tmp_path / RUN), steady_metrics(whole[0] / RUN))
