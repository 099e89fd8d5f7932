"""Engines in the trainer's own processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.run_inputs import Task, make_task, steady_metrics
from tests.support.vllm_cases import in_process
from tests.support.vllm_support import SIZES, SMALL, TEACHER, needs_vllm, small_model, vllm_commands

pytestmark = needs_vllm
TP2 = ("student.parallel.tensor=2", "teacher.parallel.tensor=2")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tmp_path_factory.mktemp("task"), student=SIZES, teacher=TEACHER)


@pytest.mark.parametrize(
    ("ranks", "tensor", "engine_tensor"),
    [(2, 2, 1), (2, 1, 2)],
    ids=["train tp2, engines tp1", "train dp2, engine tp2"],
)
def test_engine_and_trainer_agree_on_every_log_prob_after_every_publish(tmp_path, ranks, tensor, engine_tensor):
    paths = [str(small_model(tmp_path / name, tied=name == "tied")) for name in ("tied", "untied")]
    vllm_commands().call(in_process, paths, tensor, engine_tensor, ranks=ranks)


def evaluations(run_dir: Path) -> dict[tuple[str, str], dict[str, Any]]:
    rows = json.loads((run_dir / "evaluation.json").read_text())
    return {(row["model"], row["suite"]): row for row in rows}


def test_a_run_with_engines_in_its_processes_trains_and_evaluates_as_with_the_embedded_sampler(task, tmp_path):
    for engine in ("vllm", "megatron"):
        settings = (*TP2, *SMALL, f"run_dir={tmp_path}/{engine}", f"rollout.engine={engine}", "train.steps=2")
        vllm_commands().run("train", task.config, *settings, ranks=2).expect_success()
    rows = steady_metrics(tmp_path / "vllm")
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["logprob_gap_max"] < 1e-4 and row["sequences"] == 9 for row in rows)
    ours, theirs = evaluations(tmp_path / "vllm"), evaluations(tmp_path / "megatron")
    # greedy answers of the same weights need no random numbers: they are the same answers
    assert ours["student before", "greedy"] == theirs["student before", "greedy"]
    assert ours.keys() == theirs.keys()


def test_what_is_patched_of_vllm_is_there_to_be_patched():
    from megatron_tropd.engine.patches.table import PATCHES
    from tests.unit.engine.test_patches import resolved

    targets = [patch.target for patch in PATCHES if patch.target.startswith("vllm.")]
    assert targets and all(callable(resolved(target)) for target in targets)
