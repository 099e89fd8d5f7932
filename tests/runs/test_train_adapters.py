"""Runs of a student with adapters, from the configuration to exports: killed and resumed, and beside its own base."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from megatron_tropd.convert.megatron.stored import read_table
from tests.support.run_inputs import (
    Task,
    assert_metrics_agree,
    assert_weights_agree,
    commands,
    make_task,
    steady_metrics,
    weights_of,
)

LORA = ("student.lora.rank=4", "student.lora.alpha=12", "student.lora.dropout=0.1")
TP2_SP = ("student.parallel.tensor=2", "student.parallel.sequence=true", "teacher.parallel.tensor=2")
QUIET = ("report.samples=0", "report.html=false", "evaluate.prompts=null")
MATRICES = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tmp_path_factory.mktemp("task"))


def arguments(task: Task, run_dir: Path, *overrides: str) -> tuple[str, ...]:
    where = (f"run_dir={run_dir}", f"export.hf={run_dir}/merged", f"export.adapter={run_dir}/adapter")
    train = ("train.steps=4", "optimizer.lr=2e-2")
    return ("train", str(task.config), *where, *QUIET, *LORA, *train, *overrides)


@pytest.fixture(scope="module")
def unbroken(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("unbroken")
    commands().run(*arguments(task, run_dir, *TP2_SP), ranks=2).expect_success()
    return run_dir


def test_a_killed_run_resumes_bit_for_bit(task: Task, unbroken: Path, tmp_path: Path):
    run_dir = tmp_path
    job = commands().start(*arguments(task, run_dir, *TP2_SP), ranks=2)
    job.until((run_dir / "checkpoints" / "latest").exists)
    job.kill()
    commands().run(*arguments(task, run_dir, *TP2_SP), ranks=2).expect_success()
    assert steady_metrics(run_dir) == steady_metrics(unbroken)
    for read in (weights_of, lambda path: load_file(path.parent / "adapter" / MATRICES)):
        found, expected = read(run_dir / "merged"), read(unbroken / "merged")
        assert found.keys() == expected.keys()
        assert all(found[name].equal(tensor) for name, tensor in expected.items())


def test_it_resumes_under_another_layout(task: Task, unbroken: Path, tmp_path: Path):
    shutil.copytree(unbroken / "checkpoints", tmp_path / "checkpoints")
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000004")
    (tmp_path / "checkpoints" / "latest").write_text("step-00000002")
    lines = (unbroken / "metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "metrics.jsonl").write_text("".join(lines[:3]))
    commands().run(*arguments(task, tmp_path)).expect_success()
    assert_metrics_agree(steady_metrics(tmp_path), steady_metrics(unbroken))
    assert_weights_agree(tmp_path / "merged", unbroken / "merged")


def test_exports_are_the_base_and_an_update_of_low_rank(task: Task, unbroken: Path):
    base, merged = weights_of(task.student), weights_of(unbroken / "merged")
    matrices = load_file(unbroken / "adapter" / MATRICES)
    assert merged.keys() == base.keys()
    changed = {name for name in base if not base[name].equal(merged[name])}
    assert changed == {name for name in base if name.endswith("_proj.weight")}
    for name in changed:
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        up, down = (matrices[f"{prefix}.lora_{which}.weight"].double() for which in "BA")
        expected = (base[name].double() + 12 / 4 * up @ down).float()
        # both round a sum in fp64 once
        assert (merged[name] - expected).abs().max() <= torch.finfo(torch.float32).eps * expected.abs().max()
    settings = json.loads((unbroken / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (4, 12, 0.1)


def test_checkpoints_hold_adapters_alone_and_are_no_model(task: Task, unbroken: Path, tmp_path: Path):
    checkpoint = unbroken / "checkpoints" / "step-00000004"
    facts = json.loads((checkpoint / "complete.json").read_text())["run"]
    assert facts["student.lora"]["rank"] == 4 and facts["student.weights"]
    stored = read_table(checkpoint).tensors
    names, weights = load_file(unbroken / "adapter" / MATRICES), {n for n in stored if not n.startswith("optimizer.")}
    assert weights == names.keys()
    assert all(any(name in key for name in names) for key in stored)
    config = (str(task.config), f"run_dir={tmp_path}/run", *QUIET)
    as_model = commands().run("train", *config, f"student.model={checkpoint}", f"student.like={task.student}")
    assert as_model.status and "holds the adapters of a run" in as_model.output
    other = commands().run(*arguments(task, unbroken, "student.lora.rank=5", "train.steps=5"))
    assert other.status and "student.lora" in other.output and "of another run" in other.output


def started_from(adapter: Path, *, dropout: float) -> tuple[str, ...]:
    own = ("student.lora.rank=null", "student.lora.alpha=null", f"student.lora.dropout={dropout}")
    return (f"student.lora.path={adapter}", *own)


def test_a_run_starts_from_an_adapter(task: Task, unbroken: Path, tmp_path: Path):
    # a rate that moves nothing: what comes out is what went in
    start = (*started_from(unbroken / "adapter", dropout=0.1), "optimizer.lr=1e-30", "train.steps=2")
    commands().run(*arguments(task, tmp_path, *start)).expect_success()
    found, given = (load_file(path / "adapter" / MATRICES) for path in (tmp_path, unbroken))
    assert found.keys() == given.keys() and all(found[key].equal(matrix) for key, matrix in given.items())
    merged, before = weights_of(tmp_path / "merged"), weights_of(unbroken / "merged")
    assert all(merged[name].equal(tensor) for name, tensor in before.items())


def test_the_frozen_base_is_base_model_and_teacher_and_the_sampler_has_the_merged_weights(
    task: Task, unbroken: Path, tmp_path: Path
):
    """As a copy of the student's directory, which is loaded as a model of its own."""
    copy = shutil.copytree(task.student, tmp_path / "copy")
    config = tmp_path / "exopd.yaml"
    config.write_text(task.config.read_text().replace("  name: tropd\n  k: 7\n  beta: 0.3\n", "  name: exopd\n"))
    same, apart = tmp_path / "same", tmp_path / "apart"
    for run_dir, teacher, base in ((same, task.student, "null"), (apart, copy, str(copy))):
        models = (f"teacher.model={teacher}", f"base.model={base}")
        start = (*started_from(unbroken / "adapter", dropout=0), "train.steps=3")
        _, _, *rest = arguments(task, run_dir, *models, *start)
        commands().run("train", str(config), *rest).expect_success()
    rows = steady_metrics(same)
    assert rows == steady_metrics(apart)
    assert all(row["loss"] for row in rows)  # the student begins as another model than its base
    assert max(row["logprob_gap_max"] for row in rows) < 1e-4
