"""Exports while a run trains, the best weights, and a run that ends when there is no gain."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.run_inputs import Task, commands, make_task, steady_metrics


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tmp_path_factory.mktemp("task"))


def test_a_run_without_gain_ends_and_leaves_its_exports_and_the_best(task: Task, tmp_path: Path):
    run_dir = tmp_path / "run"
    wishes = ("evaluate.every=2", "train.stop_after_no_gain=1", "export.every=2", "export.best=true")
    quiet = ("report.samples=0", "report.html=false", "evaluate.teacher=false", "evaluate.before=false")
    command = ("train", task.config, f"run_dir={run_dir}", f"export.hf={run_dir}/export", *wishes, *quiet)
    outcome = commands().run(*command).expect_success()
    # random models answer nothing right: the first evaluation is the best, and the second no gain
    assert outcome.output.count("ending after 4 of 6 steps: 1 evaluations were no better than that after 2") == 1
    assert [row["step"] for row in steady_metrics(run_dir)] == [1, 2, 3, 4]
    exports = {path.name: (path / "model.safetensors").read_bytes() for path in (run_dir / "exports").iterdir()}
    assert sorted(exports) == ["best", "step-00000002", "step-00000004"]
    assert exports["best"] == exports["step-00000002"] != exports["step-00000004"]
    assert (run_dir / "export" / "model.safetensors").read_bytes() == exports["step-00000004"]
    cards = {name: (run_dir / "exports" / name / "README.md").read_text() for name in exports}
    assert "2 of 6 steps" in cards["best"] and "| student, step 2 | sampled | 0.0 " in cards["best"]
    assert "4 of 6 steps" in cards["step-00000004"] and "| method.k | 7 |" in cards["step-00000004"]

    again = commands().run(*command).expect_success()
    assert "(4 steps done)" in again.output and "ending after 4 of 6 steps" in again.output
    assert [row["step"] for row in steady_metrics(run_dir)] == [1, 2, 3, 4]
