"""Training on several sources: exact shares in every step, metrics of each, and a restart that goes on in both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from tests.support.run_inputs import Task, commands, make_task, steady_metrics

QUIET = ("report.samples=2", "evaluate.prompts=null", "checkpoint.every=2", "checkpoint.keep=9")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tmp_path_factory.mktemp("task"))


def train(task: Task, run_dir: Path, *overrides: str, ranks: int = 0) -> str:
    """Seven stories from a Parquet file and four from a JSONL file, two of the former for one of the latter."""
    rows = [json.loads(line) for line in task.prompts.read_text().splitlines()]
    stories = [{"story": row["prompt"], "teacher": row["response"], "solution": str(row["answer"])} for row in rows[:7]]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(stories), task.directory / "stories.parquet")
    (task.directory / "rest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[7:]))
    sources = (
        f"{{name: stories, prompts: {task.directory}/stories.parquet, weight: 2, grader: regex, "
        "columns: {prompt: story, response: teacher, answer: solution}, answer_template: '.*'}",  # all is right
        f"{{name: rest, prompts: '{task.directory}/rest*', weight: 1}}",
    )
    data = ("data.prompts=null", f"data.sources=[{', '.join(sources)}]")
    command = ("train", task.config, f"run_dir={run_dir}", *QUIET, *data, *overrides)
    return commands().run(*command, ranks=ranks).expect_success().output


def test_a_mixture_trains_reports_each_source_and_goes_on_where_it_stopped(task: Task, tmp_path: Path):
    record = f"rollout.record={tmp_path}/rollouts"
    train(task, tmp_path / "whole", record, "report.html=true", ranks=2)
    rows: list[dict[str, Any]] = steady_metrics(tmp_path / "whole")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row in rows:
        # of 3 prompts 2 are stories; each has 2 sequences of its own and a guided one
        assert (row["sequences/stories"], row["sequences/rest"]) == (6, 3)
        assert row["response_length"] == pytest.approx(
            (2 * row["response_length/stories"] + row["response_length/rest"]) / 3
        )
        assert row["accuracy_train/stories"] == 1.0 and row["accuracy_train"] >= 2 / 3
    seen = [prompts_of(tmp_path / "rollouts", step) for step in range(6)]
    everything = [prompt for step in seen for prompt in step]
    stories, rest = ([p for p in everything if (p < 7) == first] for first in (True, False))
    assert len(set(stories[:7])) == 7 and len(set(rest[:4])) == 4  # whole epochs of each

    page = (tmp_path / "whole" / "report.html").read_text()
    assert "The same by source" in page and "stories</li>" in page

    rank_split = tmp_path / "rank_split"
    shutil.copytree(tmp_path / "whole" / "checkpoints" / "step-00000004", rank_split / "checkpoints" / "step-00000004")
    (rank_split / "checkpoints" / "latest").write_text("step-00000004")
    shutil.copy(tmp_path / "whole" / "metrics.jsonl", rank_split / "metrics.jsonl")
    output = train(task, rank_split, record.replace("rollouts", "again"), ranks=2)
    assert "(4 steps done)" in output and "other settings" not in output
    assert steady_metrics(rank_split) == rows
    assert [prompts_of(tmp_path / "again", step) for step in (4, 5)] == seen[4:]

    insisting = "checkpoint.accept_changes=[data.sources]"
    output = train(task, rank_split, "data.sources[1].weight=2", "train.steps=7", insisting)
    assert (
        "data.sources was [['stories', 2.0, 7], ['rest', 1.0, 4]], is [['stories', 2.0, 7], ['rest', 2.0, 4]]" in output
    )


def prompts_of(recording: Path, step: int) -> list[int]:
    """Row numbers, through both files, of a step's prompts."""
    with np.load(recording / f"step-{step:08d}.npz") as arrays:
        return [int(row) for row in dict.fromkeys(arrays["rows"][:, 1])]
