"""Reducing while backward goes on and gathering while forward does change when, and not what: against one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.engine.checkpoint import load_model_weights, save_checkpoint
from megatron_tropd.engine.score import pack_alone, score_packs
from megatron_tropd.engine.weights import hf_tensors
from megatron_tropd.parallel.groups import GroupBuilder
from megatron_tropd.report.stopwatch import Stopwatch
from megatron_tropd.train.loop import score_and_pack
from megatron_tropd.train.rollout_queue import score_rollouts
from tests.support.distributed import run_on_ranks
from tests.support.layout_cases import (
    VOCAB,
    Case,
    assemble,
    config_of,
    gather_gradients,
    save_models,
    whole_gradients,
)
from tests.support.long import few
from tests.support.tiny_families import save_family
from tests.support.tiny_models import STUDENT, random_rollouts, relative_error

TP2, PP2, EP2 = {"tensor": 2, "sequence": True}, {"pipeline": 2}, {"expert": 2}
VPP2 = PP2 | {"virtual_pipeline": 2}
EXPERTS = ("moe", "teacher")


def case(name: str, **facts: Any) -> Case:
    # eps: Adam would turn the rounding of a vanishing gradient into whole steps
    return Case(name=name, overlap=True, pack_tokens=64, adam_eps=1e-5, **facts)


ALL = [
    case("dp2", ranks=2, tied=True),
    case("dp2-distributed-offload", ranks=2, distributed_optimizer=True, minibatches=2, offload=True),
    case("ep2-distributed", ranks=2, student=EP2, models=EXPERTS, distributed_optimizer=True, minibatches=2),
    case("tp2-dp2", ranks=4, student=TP2, tied=True),
    case("tp2-dp2-distributed", ranks=4, student=TP2, distributed_optimizer=True, minibatches=2),
    case("pp2-dp2", ranks=4, student=PP2, minibatches=2),
    case("pp2-dp2-tied-distributed", ranks=4, student=PP2, tied=True, distributed_optimizer=True, minibatches=2),
    case("vpp2-dp2", ranks=4, student=VPP2, deep=True, tied=True),
    case("vpp2-dp2-distributed", ranks=4, student=VPP2, deep=True, distributed_optimizer=True, minibatches=2),
]


CASES = few(ALL, "dp2-distributed-offload", "ep2-distributed", "tp2-dp2", "vpp2-dp2-distributed")


def alone(one: Case) -> Case:
    """The same on one rank, where nothing overlaps anything."""
    name = f"{one.tied} {one.deep} {one.minibatches} {one.models}"  # what the numbers depend on
    changes = {"name": name, "ranks": 1, "student": {}, "pack_tokens": 4096}
    return replace(one, **changes, overlap=False, offload=False, distributed_optimizer=False)


def train(cases: Sequence[Case], models: str, folder: str) -> dict[str, dict[str, Any]]:
    """On the ranks: of every case losses and gradients, and the weights that everyone reads right after an update."""
    builder = GroupBuilder()
    return {one.name: _train(one, models, Path(folder) / one.name, builder) for one in cases}


def _train(one: Case, models: str, folder: Path, builder: GroupBuilder) -> dict[str, Any]:
    run = assemble(config_of(one, Path(models)), builder)
    found: dict[str, Any] = {"loss": [], "grad_norm": []}
    buckets = [len(module.bucket_groups) for module in run.trainer.optimization.wrapped]
    for step in range(one.steps):
        scored = score_rollouts(run, random_rollouts(step, vocab_size=VOCAB), watch=Stopwatch())
        minibatches = score_and_pack(run, scored, step=step, watch=Stopwatch())
        if step == 0:
            for _ in range(2):  # the second time buckets go as they fill
                run.trainer.probe(minibatches[0])
            if one.distributed_optimizer:
                gather_gradients(run.trainer.optimization)
            found["gradients"] = whole_gradients(run.student)
        for number, packs in enumerate(minibatches):
            result = run.trainer.step(packs, update=step * one.minibatches + number)
            found["loss"].append(result.loss)
            found["grad_norm"].append(result.grad_norm)
        if step % 2:
            run.trainer.end_step()
    # three steps: the last one has not rested, so that each of these readers would be the first to see the new weights
    packs = pack_alone(random_rollouts(0, vocab_size=VOCAB)[0].token_ids, run.student.groups.layout)[0]
    score = score_packs(run.student, packs, vocab_size=VOCAB)[0]
    found["weights"] = {name: tensor.clone() for name, tensor in hf_tensors(run.student)}
    found["scores"] = None if score is None else score.logprob_N
    found["buckets"] = max(buckets)
    found["behind"] = _read_first(run, folder, minibatches)
    return found if dist.get_rank() == 0 else {key: found[key] for key in ("loss", "scores", "weights", "behind")}


def _read_first(run: Any, folder: Path, minibatches: Any) -> list[bool]:
    """Whether weights saved, and scored, right after one more update each are those that all ranks then have."""
    same = []
    packs = pack_alone(random_rollouts(0, vocab_size=VOCAB)[0].token_ids, run.student.groups.layout)[0]
    for update, read in ((0, "save"), (1, "score")):
        run.trainer.step(minibatches[0], update=update)
        if read == "save":
            checkpoint = save_checkpoint(folder, run.student, run.trainer.optimization, step=1, state={})
            before = {name: tensor.clone() for name, tensor in hf_tensors(run.student)}
            load_model_weights(checkpoint, run.student)
            after = {name: tensor.clone() for name, tensor in hf_tensors(run.student)}
            same.append(all(torch.equal(before[name], after[name]) for name in before))
        else:
            first = score_packs(run.student, packs, vocab_size=VOCAB)[0]
            run.trainer.end_step()
            second = score_packs(run.student, packs, vocab_size=VOCAB)[0]
            same.append(first is None or torch.equal(first.logprob_N, second.logprob_N))
    return same


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_models(tmp_path_factory.mktemp("models"))
    save_family(directory / "moe", "qwen3-moe", sizes={"vocab_size": STUDENT["vocab_size"]})
    return directory


@pytest.fixture(scope="module")
def outcome(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = str(tmp_path_factory.mktemp("checkpoints"))
    cases = {
        2: [c for c in CASES if c.ranks == 2],
        4: [c for c in CASES if c.ranks == 4],
        1: [*{alone(c).name: alone(c) for c in CASES}.values()],
    }

    @cache  # a failure too: it would be the same for every case
    def together(ranks: int) -> list[dict[str, Any]] | Exception:
        try:
            return run_on_ranks(train, cases[ranks], str(models), folder, world_size=ranks, timeout_s=400)
        except Exception as error:
            return error

    def of(one: Case) -> list[dict[str, Any]]:
        found = together(one.ranks)
        if isinstance(found, Exception):
            raise found
        return [rank[one.name] for rank in found]

    return of


@pytest.mark.parametrize("one", CASES, ids=lambda one: one.name)
def test_every_step_is_that_of_one_rank(one, outcome):
    ranks, [truth] = outcome(one), outcome(alone(one))
    assert ranks[0]["buckets"] > 1
    # means of terms of either sign: as large as the largest of the steps, however little a step leaves of them
    largest = max(abs(loss) for loss in truth["loss"])
    assert ranks[0]["loss"] == pytest.approx(truth["loss"], rel=0, abs=1e-5 * largest)
    assert ranks[0]["grad_norm"] == pytest.approx(truth["grad_norm"], rel=1e-5)
    _assert_close(ranks[0]["gradients"], truth["gradients"])
    for rank in ranks:
        assert rank["loss"] == ranks[0]["loss"]
        _assert_close(rank["weights"], truth["weights"])


def _assert_close(found: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert found.keys() == truth.keys()
    errors = {name: relative_error(found[name], truth[name]) for name in truth}
    assert {name: error for name, error in errors.items() if error > 1e-5} == {}


@pytest.mark.parametrize("one", CASES, ids=lambda one: one.name)
def test_whoever_reads_weights_after_an_update_reads_the_new_ones(one, outcome):
    ranks, [truth] = outcome(one), outcome(alone(one))
    for rank in ranks:
        assert rank["behind"] == [True, True]
        if rank["scores"] is not None:
            torch.testing.assert_close(rank["scores"], truth["scores"], rtol=0, atol=1e-4)
