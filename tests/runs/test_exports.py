"""Exports while a run trains, the best weights, and a run that ends when there is no gain."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from megatron_tropd.convert.source import open_weights
from megatron_tropd.types import ModelSource
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


def test_the_student_comes_out_as_a_checkpoint_for_megatrons_own_trainers(task: Task, tmp_path: Path):
    """The same bits as in the Hugging Face directory, which is compared with `transformers` elsewhere."""
    quiet = ("train.steps=2", "checkpoint.every=0", "report.samples=0", "report.html=false", "evaluate.prompts=null")
    parallel = ("student.parallel.tensor=2", "student.parallel.pipeline=2", "teacher.parallel.tensor=2")
    for layout in ("megatron-lm", "bridge"):
        run_dir = tmp_path / layout
        exports = (f"export.hf={run_dir}/hf", f"export.megatron={run_dir}/out", f"export.megatron_layout={layout}")
        # the second run on one rank
        given = (*quiet, *exports, *(parallel if layout == "megatron-lm" else ()))
        ranks = 4 if layout == "megatron-lm" else 0
        outcome = commands().run("train", task.config, f"run_dir={run_dir}", *given, ranks=ranks).expect_success()
        assert f"trained student, as a checkpoint for {layout}: {run_dir}/out" in outcome.output
        weights = open_weights(ModelSource(run_dir / "out", run_dir / "hf"))
        truth = load_file(run_dir / "hf" / "model.safetensors")
        assert weights.keys() == truth.keys() and all(weights[name][:].equal(truth[name]) for name in truth)
        assert list((run_dir / "out").rglob("tokenizer/tokenizer.json"))
    # what is somebody's own stays, and the run does not begin
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    command = ("train", task.config, f"run_dir={tmp_path / 'no'}", *quiet, f"export.megatron={tmp_path / 'mine'}")
    outcome = commands().run(*command)
    assert outcome.status == 2 and "export.megatron" in outcome.output, outcome.output
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
