"""The package as a library: a program trains and evaluates in its own process, and follows what happens."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.run_inputs import ROOT, Task, assert_metrics_agree, commands, make_task, steady_metrics

QUIET = {"report": {"samples": 0, "html": False}}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def by_command(task: Task) -> Path:
    """The same run by the command line, from the file of prompts."""
    run_dir = task.directory / "by-command"
    wishes = ("report.samples=0", "report.html=false", "evaluate.every=3", f"run_dir={run_dir}", "checkpoint.every=4")
    commands().run("train", task.config, *wishes, f"export.hf={run_dir}/export").expect_success()
    return run_dir


def train_as_a_program_does(config: str, run_dir: str, prompts: str, diary: str, tensor: int) -> None:
    """What a user's script does, on every rank; runs in a process of its own."""
    import os

    from megatron_tropd import Callbacks, Config, evaluate, train

    class Diary(Callbacks):
        def __init__(self) -> None:
            self.entries: list[list[Any]] = []

        def on_rollouts(self, step: int, prompts: Sequence[Any], rollouts: Sequence[Any]) -> None:
            self.entries.append(["rollouts", step, len(prompts), len(rollouts)])

        def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
            self.entries.append(["step", step, metrics["step"], metrics["loss"]])

        def on_evaluate(self, evaluations: Sequence[Any]) -> None:
            self.entries.append(["evaluate", *(f"{e.model} {e.suite} {e.accuracy}" for e in evaluations)])

        def on_checkpoint(self, step: int, checkpoint: Path) -> None:
            assert any(checkpoint.iterdir())
            self.entries.append(["checkpoint", step, checkpoint.name])

    layout = {"parallel": {"tensor": tensor}}
    settings = Config(
        config,
        "checkpoint.every=4",
        run_dir=run_dir,
        student=layout,
        teacher=layout,
        evaluate={"every": 3},
        export={"hf": f"{run_dir}/export"},
        **QUIET,
    )
    rows = [json.loads(line) for line in Path(prompts).read_text().splitlines()]
    diary_of_it = Diary()
    result = train(settings, callbacks=diary_of_it, prompts=iter(rows))
    again = Diary()
    assert train(settings, callbacks=again, prompts=rows).metrics == result.metrics  # there is nothing left to do
    graded = evaluate(settings, limit=3)
    assert [one.problems for one in graded] == [3, 3, 3, 3]
    if os.environ.get("RANK", "0") == "0":
        found = {"entries": diary_of_it.entries, "again": again.entries, "export": str(result.export)}
        Path(diary).write_text(json.dumps(found | {"evaluations": len(result.evaluations)}))


def test_a_program_trains_on_its_own_rows_as_the_command_does_on_a_file(task: Task, by_command: Path, tmp_path: Path):
    arguments = (str(task.config), str(tmp_path / "run"), str(task.prompts), str(tmp_path / "diary.json"), 1)
    outcome = commands().start_call(train_as_a_program_does, *arguments).wait().expect_success()
    assert "rows to train on" in outcome.output and "Warning" not in outcome.output
    assert steady_metrics(tmp_path / "run") == steady_metrics(by_command)
    weights = [(run_dir / "export" / "model.safetensors").read_bytes() for run_dir in (tmp_path / "run", by_command)]
    assert weights[0] == weights[1]
    found = json.loads((tmp_path / "diary.json").read_text())
    losses = [row["loss"] for row in steady_metrics(by_command)]
    recorded = json.loads((by_command / "evaluation.json").read_text())

    def graded(model: str, step: int | None) -> list[str]:
        taken = [row for row in recorded if (row["model"], row["step"]) == (model, step)]
        return ["evaluate", *(f"{row['model']} {row['suite']} {row['accuracy']}" for row in taken)]

    expected: list[list[Any]] = [graded("student before", 0), graded("teacher", None)]
    for step, loss in enumerate(losses, start=1):
        expected += [["rollouts", step, 3, 9], ["step", step, step, loss]]
        expected += [graded("student", 3)] if step == 3 else []
        expected += [["checkpoint", step, f"step-{step:08d}"]] if step in (4, 6) else []
    assert found["entries"] == [*expected, graded("student after", 6)]
    assert found["again"] == [graded("student after", 6)]
    assert found["export"] == str(tmp_path / "run" / "export") and found["evaluations"] == len(recorded)


def test_every_rank_of_a_launch_calls_the_same_program(task: Task, by_command: Path, tmp_path: Path):
    arguments = (str(task.config), str(tmp_path / "run"), str(task.prompts), str(tmp_path / "diary.json"), 2)
    outcome = commands().start_call(train_as_a_program_does, *arguments, ranks=2).wait().expect_success()
    assert outcome.outputs[1] == ""
    assert_metrics_agree(steady_metrics(tmp_path / "run"), steady_metrics(by_command))


def train_on_rows_of_its_own_order(config: str, run_dir: str) -> None:
    import os

    from megatron_tropd import Config, train

    rows = [{"prompt": "1+1=", "answer": "2", "response": "2"}, {"prompt": "2+3=", "answer": "5", "response": "5"}]
    train(Config(config, run_dir=run_dir, **QUIET), prompts=rows if os.environ["RANK"] == "0" else rows[::-1])


def test_ranks_that_give_other_rows_are_refused(task: Task, tmp_path: Path):
    outcome = commands().start_call(train_on_rows_of_its_own_order, str(task.config), str(tmp_path), ranks=2).wait()
    assert outcome.status and "rank 1 has read 2 prompts" in outcome.output
    assert "all ranks the same rows in the same order" in outcome.output


def run_the_page(code: str) -> None:
    exec(compile(code, "docs/library.md", "exec"), {"__name__": "__main__"})


def test_the_program_of_the_page_on_the_library_runs(task: Task, tmp_path: Path):
    page = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    (tmp_path / "my.yaml").write_text(task.config.read_text())
    (tmp_path / "mine.jsonl").write_text("".join(task.prompts.read_text().splitlines(keepends=True)[:5]))
    call = json.dumps([code])
    function = f"{run_the_page.__module__}:{run_the_page.__qualname__}"
    outcome = commands().start(call, function=function, cwd=tmp_path).wait().expect_success()
    assert outcome.output.count("reverse KL") >= 6 and "runs/mine/student" in outcome.output
    assert (tmp_path / "runs" / "mine" / "student" / "model.safetensors").is_file()
