"""A teacher that vLLM runs says what Megatron's says."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_inputs import Task, make_task, save_model, steady_metrics
from vllm_support import SIZES, TEACHER, needs_vllm, vllm_commands

# the cases import nothing of vLLM before they are called
from vllm_teacher_cases import in_process

pytestmark = needs_vllm
SMALL = ("teacher.vllm.cache_mib=16", "teacher.vllm.max_sequences=16", "teacher.vllm.options={block_size: 32}")
SHORT = ("train.steps=2", "evaluate.prompts=null", "report.samples=0", "report.html=false", "checkpoint.every=0")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More ids than candidates."""
    return save_model(tmp_path_factory.mktemp("teacher"), SIZES, tied=False, seed=4, vocab_size=211)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tmp_path_factory.mktemp("task"), student=SIZES, teacher=TEACHER)


def test_an_engine_in_the_process_grades_as_megatron_does_under_every_student_layout(teacher):
    vllm_commands().call(in_process, str(teacher), ranks=2)


def test_a_run_with_the_teacher_s_engine_over_two_ranks_has_the_losses_of_megatron_s(task, tmp_path):
    two = ("student.parallel.tensor=2", "teacher.parallel.tensor=2")
    for engine in ("vllm", "megatron"):
        settings = (*SMALL, *SHORT, *two, f"teacher.engine={engine}", f"run_dir={tmp_path}/{engine}")
        vllm_commands().run("train", task.config, *settings, ranks=2).expect_success()
    found, expected = steady_metrics(tmp_path / "vllm"), steady_metrics(tmp_path / "megatron")
    for a, b in zip(found, expected, strict=True):
        assert "teacher_entropy" not in a and "teacher_entropy_bound" not in b
        assert a.pop("teacher_entropy_bound") > b.pop("teacher_entropy") - 1e-4
        assert a == pytest.approx(b, rel=1e-4, abs=1e-4)
