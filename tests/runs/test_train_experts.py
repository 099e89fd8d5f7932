"""`tropd train` with a student of experts: they are dealt out in any way, and the run is that of one rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.long import few
from tests.support.run_inputs import (
    POSITIONS,
    Task,
    assert_metrics_agree,
    assert_weights_agree,
    commands,
    make_task,
    steady_metrics,
)
from tests.support.tiny_families import save_family

QUIET = ("train.steps=3", "checkpoint.every=0", "evaluate.prompts=null", "report.samples=0", "report.html=false")
EP2 = ("student.parallel.expert=2",)
LAYOUTS = {
    "EP2": (2, EP2),
    "CP2 EP2": (2, (*EP2, "student.parallel.context=2", "teacher.parallel.tensor=2")),
    "PP2 VPP2 EP2": (4, (*EP2, "student.parallel.pipeline=2", "student.parallel.virtual_pipeline=2")),
}


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """The usual task with a Qwen3-MoE of four layers and four experts as its student."""
    task = make_task(tmp_path_factory.mktemp("task"))
    vocab_size = json.loads((task.student / "config.json").read_text())["vocab_size"]
    sizes = {"vocab_size": vocab_size, "num_hidden_layers": 4, "max_position_embeddings": POSITIONS}
    save_family(task.student, "qwen3-moe", sizes=sizes)
    return task


def train(task: Task, run_dir: Path, *overrides: str, ranks: int = 0) -> list[dict[str, Any]]:
    command = ("train", task.config, f"run_dir={run_dir}", *QUIET, f"export.hf={run_dir}/hf", *overrides)
    commands().run(*command, ranks=ranks).expect_success()
    return steady_metrics(run_dir)


@pytest.fixture(scope="module")
def alone(task: Task, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    run_dir = tmp_path_factory.mktemp("alone")
    return run_dir, train(task, run_dir)


@pytest.mark.parametrize("name", few(LAYOUTS, "PP2 VPP2 EP2"))
def test_experts_on_several_ranks_train_as_on_one(name, task, alone, tmp_path):
    ranks, overrides = LAYOUTS[name]
    assert_metrics_agree(train(task, tmp_path, *overrides, ranks=ranks), alone[1])
    assert_weights_agree(tmp_path / "hf", alone[0] / "hf")


def test_tensor_ranks_without_sequence_parallelism_are_refused_for_experts(task, tmp_path):
    outcome = commands().run("train", task.config, f"run_dir={tmp_path}", "student.parallel.tensor=2", ranks=2)
    assert outcome.status == 2
    assert "student.parallel: tensor parallel size 2 without sequence parallelism" in outcome.output
