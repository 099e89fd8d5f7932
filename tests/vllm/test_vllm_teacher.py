"""A teacher that vLLM runs says what Megatron's says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_tropd.teacher.store import Store
from tests.support.run_inputs import Task, make_task, save_model, steady_metrics
from tests.support.vllm_servers import KEY, ServerProcess
from tests.support.vllm_support import SIZES, TEACHER, needs_vllm, vllm_commands
from tests.support.vllm_teacher_cases import in_process, over_http

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


@pytest.fixture(scope="module")
def server(task: Task) -> Iterator[ServerProcess]:
    """Tells all ids of the task's teacher."""
    all_ids = ("teacher.engine=vllm_server", "teacher.vllm_server.urls=['http://x']", "teacher.whole_vocabulary=true")
    settings = (*SMALL, *all_ids, "rollout.max_new_tokens=64")
    found = ServerProcess(task.config, task.directory / "server.log", settings, role="teacher")
    try:
        found.start()
        found.wait_until_ready()
        yield found
    finally:
        found.kill()


def test_a_server_grades_as_megatron_does(task, server):
    vllm_commands().call(over_http, str(task.teacher), [server.url], KEY, ranks=2)


def test_a_run_with_a_server_for_its_teacher_has_the_losses_of_megatron_s(task, server, tmp_path):
    union = ("method.support=union", "method.tail=bucket")
    asking = (
        "teacher.engine=vllm_server",
        f"teacher.vllm_server.urls={json.dumps([server.url])}",
        "teacher.whole_vocabulary=true",
    )
    runs = {"server": asking, "megatron": ()}
    for name, settings in runs.items():
        changes = (*SHORT, *union, *settings, f"run_dir={tmp_path}/{name}")
        vllm_commands().run("train", task.config, *changes, TROPD_API_KEY=KEY).expect_success()
    found, expected = steady_metrics(tmp_path / "server"), steady_metrics(tmp_path / "megatron")
    for a, b in zip(found, expected, strict=True):
        assert a["teacher_entropy"] and a == pytest.approx(b, rel=1e-4, abs=1e-4)

    other = save_model(tmp_path / "other", TEACHER, tied=False, seed=99)  # of the same sizes
    for change, said in (
        ("dtype=bf16", "has dtype=float32, this run needs bfloat16"),
        (f"teacher.model={other}", "has weights="),
    ):
        changes = (*SHORT, *union, *asking, change, f"run_dir={tmp_path}/no")
        outcome = vllm_commands().run("train", task.config, *changes, TROPD_API_KEY=KEY)
        assert outcome.status == 2 and said in outcome.output, outcome.output


def test_a_server_s_grades_of_responses_are_written_as_megatron_s_are(task, server, tmp_path):
    asking = (
        "teacher.engine=vllm_server",
        f"teacher.vllm_server.urls={json.dumps([server.url])}",
        "teacher.whole_vocabulary=true",
    )
    stores = []
    for name, settings in {"server": asking, "megatron": ()}.items():
        target = tmp_path / name
        changes = ("teacher.record_values=fp32", *settings, f"teacher.record={target}")
        vllm_commands().run("score", task.config, *changes, TROPD_API_KEY=KEY).expect_success()
        stores.append(Store(target))
    facts = [(tmp_path / name / "recording.json").read_text() for name in ("server", "megatron")]
    assert facts[0] == facts[1], "either can stand in for the other"
    keys = stores[0].keys()
    assert len(keys) == 11 and set(stores[1].keys()) == set(keys)
    for key in keys:
        (ours,), (theirs,) = (store.find(key) for store in stores)
        assert ours.rows == theirs.rows > 3
        for name in ("logprob", "topk_logprob", "entropy"):
            found, expected = stores[0].read(ours, name), stores[1].read(theirs, name)
            np.testing.assert_allclose(found, expected, atol=1e-4)
