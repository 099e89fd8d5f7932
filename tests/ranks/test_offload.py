"""What is idle leaves the device whole and comes back bit for bit: nothing that a run computes tells the difference."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tropd.config.loading import load_config
from megatron_tropd.engine import offload
from megatron_tropd.engine.offload import OffloadedTensors, OffloadStats, device_bytes
from megatron_tropd.errors import ConfigError, EngineError
from tests.support.distributed import run_on_ranks
from tests.support.layout_cases import Case, save_models
from tests.support.long import few
from tests.support.offload_cases import compare
from tests.support.run_inputs import Task, commands, make_task, split_prompts, steady_metrics, weights_of
from tests.support.tiny_families import save_family
from tests.support.tiny_models import STUDENT, Objective

CPU = torch.device("cpu")


def leaving(
    monkeypatch: pytest.MonkeyPatch, contents: Any
) -> tuple[OffloadedTensors, list[torch.Tensor], OffloadStats]:
    """Five tensors over three storages of odd sizes, in slabs that cut through them."""
    monkeypatch.setattr(offload, "_SLAB_BYTES", 1536)
    flat, half = torch.randn(1001), torch.nn.Parameter(torch.randn(33).bfloat16())
    scalar = torch.tensor(3.0)
    tensors = [flat, flat[10:500].view(7, 70), flat[500:], half, scalar]
    stats = OffloadStats()
    return (
        OffloadedTensors("a thing", lambda: tensors, CPU, contents=contents, offload_stats=stats),
        tensors,
        stats,
    )


def test_storages_are_emptied_under_their_views_and_filled_again(monkeypatch):
    movable, tensors, stats = leaving(monkeypatch, "changing")
    before = [tensor.detach().clone() for tensor in tensors]
    for turn in (1, 2):
        tensors[0].mul_(turn)
        before[:3] = [tensor.clone() for tensor in tensors[:3]]
        assert device_bytes(tensors) == 4 * 1001 + 2 * 33 + 4
        movable.offload()
        assert movable.away and device_bytes(tensors) == 0
        movable.offload()  # twice is once
        movable.onload()
        assert not movable.away and all(map(torch.equal, tensors, before))
        assert (stats.to_host, stats.to_device) == (turn * 4074, turn * 4074)
    assert tensors[1].data_ptr() == tensors[0].data_ptr() + 40
    assert stats.take_seconds() > 0 and stats.take_seconds() == 0


def test_what_never_changes_is_copied_once_and_scratch_never(monkeypatch):
    for contents, copied in (("constant", 4074), ("scratch", 0)):
        movable, tensors, stats = leaving(monkeypatch, contents)
        before = [tensor.detach().clone() for tensor in tensors]
        movable.offload()
        for _ in range(3):
            with movable.present(), movable.present():  # within a block it is there already
                assert device_bytes(tensors) == 4074
                expected = before if contents == "constant" else [torch.zeros_like(tensor) for tensor in before]
                assert all(map(torch.equal, tensors, expected))
            assert movable.away
        assert (stats.to_host, stats.to_device) == (copied, 3 * copied)


def test_what_is_away_is_refused_by_name():
    movable = OffloadedTensors("a thing", lambda: [torch.ones(3)], CPU)
    movable.check()
    with movable.present():
        pass
    assert not movable.away  # it was not before
    movable.offload()
    with pytest.raises(EngineError, match="a thing was used while in host memory"):
        movable.check()


# --------------------------------------------------------------------------- trainings

TP2, PP2, TP2_SP = {"tensor": 2}, {"pipeline": 2}, {"tensor": 2, "sequence": True}
VPP2 = PP2 | {"virtual_pipeline": 2}
OPD, FULL, EXOPD = Objective(name="opd"), Objective(name="fkl"), Objective(name="exopd")
ALL = [
    Case(name="tp2-tied-minibatches", ranks=2, student=TP2_SP, teacher=PP2, tied=True, minibatches=2, pack_tokens=64),
    Case(name="pp2-tied-distributed", ranks=2, student=PP2, teacher=TP2, tied=True, distributed_optimizer=True),
    Case(name="dp2-distributed-bf16", ranks=2, distributed_optimizer=True, dtype="bf16", objective=OPD),
    Case(name="vpp2-bf16", ranks=2, student=VPP2, deep=True, dtype="bf16", objective=OPD, pack_tokens=64),
    Case(name="full-vocabulary", ranks=2, student=TP2, teacher=PP2, objective=FULL),
    Case(name="base", ranks=2, student=PP2, base=TP2, objective=EXOPD),
    Case(name="experts", ranks=2, student={"expert": 2}, models=("moe", "teacher"), distributed_optimizer=True),
]


CASES = few(ALL, "tp2-tied-minibatches", "pp2-tied-distributed", "vpp2-bf16", "base", "experts")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_models(tmp_path_factory.mktemp("models"))
    save_family(directory / "moe", "qwen3-moe", sizes={"vocab_size": STUDENT["vocab_size"]})
    return directory


@pytest.fixture(scope="module")
def found(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = str(tmp_path_factory.mktemp("checkpoints"))

    @cache  # a failure too: it would be the same for every case
    def together() -> list[dict[str, Any]] | Exception:
        try:
            return run_on_ranks(compare, CASES, str(models), folder, world_size=2, timeout_s=500)
        except Exception as error:
            return error

    def ranks() -> list[dict[str, Any]]:
        found = together()
        if isinstance(found, Exception):
            raise found
        return found

    return ranks


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_training_with_all_offloads_is_that_without_bit_for_bit(case, found):
    for rank in found():
        assert rank[case.name]["steps"] and rank[case.name]["weights"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_between_updates_nothing_idle_is_on_the_device(case, found):
    for rank in found():
        assert set(rank[case.name]["bytes"]) == {0}
        assert min(rank[case.name]["moved"]) > 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_checkpoint_of_what_is_in_host_memory_is_whole(case, found):
    for rank in found():
        assert rank[case.name]["resumed"]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_in_host_memory_cannot_be_used(case, found):
    for rank in found():
        assert rank[case.name]["refusals"] == 3


# --------------------------------------------------------------------------- whole runs

OFF = ("teacher.offload=true", "optimizer.offload=true")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    task = make_task(tmp_path_factory.mktemp("task"))
    split_prompts(task, first=6)
    usual = "  name: tropd\n  k: 7\n  beta: 0.3\n"
    config = task.config.read_text()
    assert usual in config
    task.config.write_text(config.replace(usual, "  name: exopd\n  ppo_clip: 0.2\n"))
    return task


def settings(task: Task, run_dir: Path, *more: str) -> list[str]:
    """Two teachers, a base model, rollouts ahead, accuracies of student and teacher, a checkpoint every second step."""
    sources = [f"{{name: one, prompts: {task.directory}/first.jsonl}}"]
    sources += [f"{{name: two, prompts: {task.directory}/second.jsonl, teacher: other}}"]
    return [
        *("train", str(task.config), f"run_dir={run_dir}", f"export.hf={run_dir}/export"),
        *("data.prompts=null", f"data.sources=[{', '.join(sources)}]"),
        f"teachers=[{{name: other, model: {task.student}, parallel: {{pipeline: 1}}}}]",
        *("rollout.ahead=1", "rollout.guided_per_prompt=0"),
        *("train.steps=3", "train.minibatches=2", "checkpoint.every=2", "checkpoint.keep=9", "report.html=false"),
        *("evaluate.max_problems=2", "evaluate.suites=[{name: greedy}]", "evaluate.every=2", "report.samples=1"),
        *("student.parallel.tensor=2", "teacher.parallel.pipeline=2", *more),
    ]


def test_a_run_with_all_offloads_is_that_without(task, tmp_path):
    plain, moved = tmp_path / "plain", tmp_path / "moved"
    commands().run(*settings(task, plain), ranks=2).expect_success()
    # the second half from the checkpoint of a run without, whose settings count as its own
    (moved / "checkpoints").mkdir(parents=True)
    shutil.copytree(plain / "checkpoints" / "step-00000002", moved / "checkpoints" / "step-00000002")
    (moved / "checkpoints" / "latest").write_text("step-00000002")
    for name in ("metrics.jsonl", "evaluation.json"):
        shutil.copy(plain / name, moved / name)
    outcome = commands().run(*settings(task, moved, *OFF), ranks=2).expect_success()
    assert "(2 steps done)" in outcome.output and "other settings" not in outcome.output
    whole = tmp_path / "whole"
    commands().run(*settings(task, whole, *OFF), ranks=2).expect_success()
    for run_dir in (moved, whole):
        assert steady_metrics(run_dir) == steady_metrics(plain)
        assert json.loads((run_dir / "evaluation.json").read_text()) == json.loads(
            (plain / "evaluation.json").read_text()
        )
        found, expected = weights_of(run_dir / "export"), weights_of(plain / "export")
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < row["time_offload"] < row["time_step"] for row in rows)
    assert "time_offload" not in (plain / "metrics.jsonl").read_text()


def test_vllm_moves_its_own_weights(task):
    with pytest.raises(ConfigError, match="the weights of Megatron's teacher, got engine = 'vllm'"):
        load_config(task.config, ["teacher.engine=vllm", "teacher.offload=true"])
