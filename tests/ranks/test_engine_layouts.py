"""One batch, one answer: losses, gradients and optimizer steps under every layout, against plain autograd in fp64."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_tropd.types import Region
from tests.support.distributed import run_on_ranks
from tests.support.layout_cases import (
    ADAM,
    CERTAIN,
    VOCAB,
    Case,
    learning_rates,
    run_cases,
    run_chain,
    save_models,
    self_checks,
    student_directory,
)
from tests.support.long import few
from tests.support.tiny_models import (
    Objective,
    Reference,
    hf_logprobs,
    load_hf,
    random_rollouts,
    relative_error,
)

OPD, FKL = Objective(name="opd"), Objective(name="fkl")
# what the student asks about: as a bucketed divergence either way, whose tails leave out just the candidates
STUDENT_TOP = Objective(name="rkl", support="student", k=5)
UNION = Objective(name="fkl", support="union", k=5)
UNION_RENORM = Objective(name="rkl", support="union", k=9, tail="renorm")
STUDENT_NONE = Objective(name="fkl", support="student", k=3, tail="none")
EXOPD = Objective(name="exopd")
SAMPLED = Objective(name="fkl", support="teacher_and_sampled", k=4)
OPD_ENDS, FKL_ENDS = Objective(name="opd", ends=(0, 35, 96)), Objective(name="fkl", ends=(0, 35, 96))
RKL_ENDS = Objective(name="rkl", support="union", k=5, ends=(0, 35, 96))
TP2, PP2 = {"tensor": 2}, {"pipeline": 2}
TP2_SP = {"tensor": 2, "sequence": True}
TP2_PP2, TP2_SP_PP2 = TP2 | PP2, TP2_SP | PP2
CP2 = {"context": 2}
VPP2 = PP2 | {"virtual_pipeline": 2}

ONE_RANK = [
    Case(name="tp1"),
    Case(name="tp1-tied", tied=True),
    Case(name="tp1-opd", objective=OPD),
    Case(name="tp1-opd-tied", objective=OPD, tied=True),
    Case(name="small-packs", pack_tokens=41),
    Case(name="recompute-full", recompute="full", pack_tokens=100),
    Case(name="recompute-selective", recompute="selective"),
    Case(name="minibatches", minibatches=2),
    Case(name="one-sequence", sequences=1),
    Case(name="tp1-fkl", objective=FKL),
    Case(name="bf16", dtype="bf16", objective=OPD),
    Case(name="deep", deep=True),
    Case(name="deep-tied", deep=True, tied=True),
    Case(name="student-top", objective=STUDENT_TOP, pack_tokens=64),
    Case(name="union", objective=UNION),
    Case(name="union-minibatches", objective=UNION, minibatches=2),
    Case(name="union-renorm", objective=UNION_RENORM, pack_tokens=64),
    Case(name="student-none", objective=STUDENT_NONE),
    Case(name="sampled", objective=SAMPLED),
    Case(name="exopd", objective=EXOPD, pack_tokens=64),
    Case(name="exopd-based", objective=EXOPD, base={}),
    Case(name="ends-opd", objective=OPD_ENDS),
    Case(name="ends-fkl", objective=FKL_ENDS),
    Case(name="ends-rkl-minibatches", objective=RKL_ENDS, minibatches=2),
]
TWO_RANKS = [
    Case(name="tp2", ranks=2, student=TP2, teacher=TP2),
    Case(name="tp2-opd-tied", ranks=2, student=TP2, objective=OPD, tied=True, pack_tokens=64),
    Case(name="tp2-sp", ranks=2, student=TP2_SP, teacher=TP2),
    Case(name="tp2-sp-tied-full", ranks=2, student=TP2_SP, teacher=TP2_SP, tied=True, recompute="full", pack_tokens=64),
    Case(name="pp2", ranks=2, student=PP2, teacher=PP2, pack_tokens=64),
    Case(name="pp2-opd-tied", ranks=2, student=PP2, objective=OPD, tied=True, pack_tokens=90),
    Case(name="pp2-tied", ranks=2, student=PP2, teacher=TP2, tied=True),
    Case(name="pp2-selective-minibatches", ranks=2, student=PP2, recompute="selective", minibatches=2, pack_tokens=48),
    Case(name="dp2", ranks=2, pack_tokens=64),
    Case(name="dp2-one-sequence", ranks=2, sequences=1),
    Case(name="dp2-opd-tied-teacher-pp2", ranks=2, teacher=PP2, objective=OPD, tied=True),
    Case(name="dp2-distributed-optimizer", ranks=2, distributed_optimizer=True, minibatches=2),
    Case(name="tp2-teacher-dp2", ranks=2, student=TP2, pack_tokens=41),
    Case(name="pp2-teacher-tp2-sp", ranks=2, student=PP2, teacher=TP2_SP, pack_tokens=64),
    Case(name="tp2-sp-fkl-teacher-pp2", ranks=2, student=TP2_SP, teacher=PP2, objective=FKL, pack_tokens=64),
    Case(name="cp2", ranks=2, student=CP2, teacher=CP2),
    Case(name="cp2-tied-small-packs", ranks=2, student=CP2, teacher=TP2, tied=True, pack_tokens=64, recompute="full"),
    Case(name="cp2-one-sequence", ranks=2, student=CP2, teacher=PP2, sequences=1),
    Case(name="cp2-minibatches", ranks=2, student=CP2, minibatches=2, pack_tokens=64),
    Case(name="cp2-fkl-teacher-dp2", ranks=2, student=CP2, objective=FKL),
    Case(name="pp2-teacher-cp2", ranks=2, student=PP2, teacher=CP2, pack_tokens=64),
    Case(name="vpp2", ranks=2, student=VPP2, deep=True, pack_tokens=64),
    Case(name="vpp2-one-pack-tied", ranks=2, student=VPP2, teacher=TP2, deep=True, tied=True),
    Case(name="student-top-tp2-teacher-pp2", ranks=2, student=TP2_SP, teacher=PP2, objective=STUDENT_TOP),
    Case(name="student-none-pp2-teacher-tp2", ranks=2, student=PP2, teacher=TP2, objective=STUDENT_NONE),
    Case(name="union-dp2-teacher-tp2", ranks=2, teacher=TP2, objective=UNION, pack_tokens=64, minibatches=2),
    Case(name="union-tp2-teacher-dp2", ranks=2, student=TP2, objective=UNION, pack_tokens=64),
    Case(name="union-cp2-teacher-dp2", ranks=2, student=CP2, objective=UNION, pack_tokens=64),
    Case(name="union-renorm-pp2-teacher-cp2", ranks=2, student=PP2, teacher=CP2, objective=UNION_RENORM),
    Case(name="exopd-tp2-teacher-pp2", ranks=2, student=TP2, teacher=PP2, objective=EXOPD),
    Case(name="exopd-pp2-base-tp2", ranks=2, student=PP2, base=TP2_SP, objective=EXOPD, pack_tokens=64),
    Case(name="sampled-tp2", ranks=2, student=TP2, teacher=TP2, objective=SAMPLED),
    Case(name="ends-opd-pp2-teacher-cp2", ranks=2, student=PP2, teacher=CP2, objective=OPD_ENDS, pack_tokens=64),
    Case(name="ends-fkl-cp2-teacher-tp2", ranks=2, student=CP2, teacher=TP2, objective=FKL_ENDS, pack_tokens=64),
    Case(name="ends-rkl-pp2-minibatches", ranks=2, student=PP2, objective=RKL_ENDS, minibatches=2, pack_tokens=64),
    Case(name="bf16-tp2-sp", ranks=2, student=TP2_SP, teacher=TP2, dtype="bf16", objective=OPD),
    Case(name="bf16-pp2-tied", ranks=2, student=PP2, teacher=TP2, dtype="bf16", objective=OPD, tied=True),
]
FOUR_RANKS = [
    Case(name="tp2-pp2", ranks=4, student=TP2_PP2, teacher=TP2, pack_tokens=64),
    Case(name="tp2-sp-pp2-tied", ranks=4, student=TP2_SP_PP2, teacher=TP2_PP2, tied=True, pack_tokens=64),
    Case(name="tp2-sp-cp2", ranks=4, student=TP2_SP | CP2, teacher=CP2 | PP2, pack_tokens=90),
    Case(name="cp2-pp2-tied", ranks=4, student=CP2 | PP2, teacher=TP2_PP2, tied=True, pack_tokens=64),
    Case(name="cp4-teacher-cp2", ranks=4, student={"context": 4}, teacher=CP2, pack_tokens=64),
    Case(name="tp2-sp-vpp2", ranks=4, student=TP2_SP | VPP2, teacher=PP2, deep=True, tied=True, pack_tokens=48),
    Case(name="student-top-tp2-pp2", ranks=4, student=TP2_PP2, teacher=TP2, objective=STUDENT_TOP, pack_tokens=64),
    Case(name="union-pp2-dp2", ranks=4, student=PP2, teacher=TP2_SP, objective=UNION, pack_tokens=64),
    Case(name="union-tp2-cp2", ranks=4, student=TP2_SP | CP2, teacher=TP2_PP2, objective=UNION, minibatches=2),
    Case(name="tp2-dp2", ranks=4, student=TP2_SP, teacher=PP2, minibatches=2, pack_tokens=64),
    Case(name="pp2-dp2-opd-tied", ranks=4, student=PP2, teacher=TP2_PP2, objective=OPD, tied=True, pack_tokens=64),
]
CASES = few(
    ONE_RANK + TWO_RANKS + FOUR_RANKS,
    # what is compared with, and what one rank can do wrong by itself
    *("tp1", "tp1-tied", "tp1-opd", "tp1-opd-tied", "small-packs", "recompute-full", "minibatches", "one-sequence"),
    *("tp1-fkl", "bf16", "deep-tied", "student-top", "union", "union-minibatches", "exopd", "exopd-based"),
    *("ends-opd", "ends-rkl-minibatches"),
    # every axis of either model, every kind of support, tied and untied heads, one sequence for two ranks
    *("tp2-sp-tied-full", "pp2-opd-tied", "pp2-selective-minibatches", "dp2-distributed-optimizer"),
    *("tp2-sp-fkl-teacher-pp2", "cp2-tied-small-packs", "cp2-one-sequence", "vpp2-one-pack-tied"),
    *("student-top-tp2-teacher-pp2", "union-dp2-teacher-tp2", "exopd-tp2-teacher-pp2", "bf16-tp2-sp"),
    *("ends-opd-pp2-teacher-cp2", "ends-rkl-pp2-minibatches"),
    # and their products
    *("tp2-sp-cp2", "tp2-sp-vpp2", "union-pp2-dp2", "pp2-dp2-opd-tied"),
)
ALL_TRUSTED = Case(name="all-trusted", method={"name": "tropd", "gate": "all", "prefix_schedule": "none"})
# here the sampled token, random in the self check, is mostly in no top k: each side's tail must leave it out by itself
BUCKET_AND_SAMPLED = {"name": "rkl", "form": "topk", "k": 5, "support": "teacher_and_sampled", "tail": "bucket"}
SELF_CHECKS = {
    1: [Case(name="tropd"), Case(name="fkl", objective=FKL), Case(name="bf16", dtype="bf16", objective=OPD, tied=True)],
    2: [
        Case(name="sp", student=TP2_SP, objective=OPD),
        Case(name="tropd", student=TP2),
        Case(name="pp", student=PP2, objective=FKL, tied=True),
        Case(name="bucket", student=TP2, method={"name": "fkl", "form": "topk", "k": 5}),
        Case(name="bucket-sampled", student=PP2, method=BUCKET_AND_SAMPLED),
        Case(name="bucket-student", student=PP2, method={**BUCKET_AND_SAMPLED, "support": "student"}),
        Case(name="bucket-union", student=TP2, method={**BUCKET_AND_SAMPLED, "support": "union"}),
    ],
}

Outcome = Callable[[Case], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def outcome(models: Path) -> Outcome:
    """What every rank reports of a case; all cases of one world size run together, once."""

    @cache  # a failure too: it would be the same for every case of that size
    def together(ranks: int) -> list[dict[str, Any]] | Exception:
        cases = [c for c in [*CASES, ALL_TRUSTED] if c.ranks == ranks]
        try:
            return run_on_ranks(run_cases, cases, str(models), world_size=ranks, timeout_s=500)
        except Exception as error:
            return error

    def of(case: Case) -> list[dict[str, Any]]:
        found = together(case.ranks)
        if isinstance(found, Exception):
            raise found
        return [rank[case.name] for rank in found]

    return of


@pytest.fixture(scope="module")
def reference(models: Path) -> Callable[[Case], Reference]:
    """The same training in plain autograd: fp64, one process, one sequence at a time, no engine."""
    done: dict[tuple[object, ...], Reference] = {}

    def of(case: Case) -> Reference:
        if case.key not in done:
            student, teacher = load_hf(models / student_directory(case)), load_hf(models / "teacher")
            # without one of its own, the base model is the student as it was before training
            base = load_hf(models / (student_directory(case) if case.base is None else "base"))
            truth = Reference(student, teacher, case.objective, VOCAB, base)
            batches = [random_rollouts(step, vocab_size=VOCAB, count=case.sequences) for step in range(case.steps)]
            rates = learning_rates(case.minibatches, case.steps)
            truth.train(batches, ADAM, rates, minibatches=case.minibatches)
            done[case.key] = truth
        return done[case.key]

    return of


EXACT = [c for c in CASES if c.dtype == "fp32"]
BF16 = [c for c in CASES if c.dtype == "bf16"]


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_every_step_is_that_of_plain_autograd(case, outcome, reference):
    ranks, truth = outcome(case), reference(case)
    for rank in ranks[1:]:
        assert [rank[name] for name in ("loss", "grad_norm", "stats")] == [
            ranks[0][name] for name in ("loss", "grad_norm", "stats")
        ]
    # policy-gradient losses are means of terms of either sign: where they cancel, so do the digits
    for loss, exact, size in zip(ranks[0]["loss"], truth.losses, truth.sizes, strict=True):
        assert abs(loss - exact) < 1e-5 * size
    assert ranks[0]["grad_norm"] == pytest.approx(truth.grad_norms, rel=1e-5)
    assert ranks[0]["tokens"] == truth.tokens
    for loss, exact, size in zip(ranks[0]["over_tokens"], truth.over_tokens, truth.sizes, strict=True):
        assert abs(loss - exact) < 1e-5 * size


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_every_gradient_is_that_of_plain_autograd(case, outcome, reference):
    gradients, truth = outcome(case)[0]["gradients"], reference(case).first_gradients
    assert gradients.keys() == truth.keys()
    errors = {name: relative_error(gradients[name], truth[name]) for name in truth}
    assert {name: error for name, error in errors.items() if error > 1e-5} == {}


@pytest.mark.parametrize("case", BF16, ids=lambda case: case.name)
def test_bf16_errs_no_more_than_transformers_in_bf16(case, models, outcome, reference):
    found, truth = outcome(case)[0], reference(case)
    student = load_hf(models / student_directory(case), torch.bfloat16)
    plain = Reference(student, load_hf(models / "teacher", torch.bfloat16), case.objective, VOCAB)
    plain.train([random_rollouts(0, vocab_size=VOCAB)], ADAM, learning_rates(1))

    def flat(gradients: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([gradients[name].flatten().double() for name in truth.first_gradients])

    def error(gradients: dict[str, torch.Tensor]) -> float:
        return relative_error(flat(gradients), flat(truth.first_gradients))

    assert error(found["gradients"]) < 1.5 * error(plain.first_gradients)
    for loss, exact, size in zip(found["loss"], truth.losses, truth.sizes, strict=True):
        assert abs(loss - exact) < 3e-2 * size
    assert found["grad_norm"] == pytest.approx(truth.grad_norms, rel=3e-2)


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_layouts_agree_with_one_rank(case, outcome, reference):
    alone = next(c for c in ONE_RANK if c.key == case.key)
    one, many = outcome(alone)[0], outcome(case)[0]
    # as above: relative to what is summed, not to what is left of it
    for here, there, size in zip(many["loss"], one["loss"], reference(case).sizes, strict=True):
        assert abs(here - there) < 1e-5 * size
    assert many["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    for name, gradient in many["gradients"].items():
        assert relative_error(gradient, one["gradients"][name]) < 1e-5, name
    for here, there in zip(many["stats"], one["stats"], strict=True):
        assert here == pytest.approx(there, rel=1e-5, abs=1e-6)


MOVES = [
    Case(name="move-tp2", ranks=4, student=TP2, deep=True, tied=True, steps=5),
    Case(name="move-pp2", ranks=4, student=PP2, deep=True, tied=True, steps=5),
    Case(name="move-vpp2", ranks=4, student=VPP2, deep=True, tied=True, pack_tokens=64, steps=5),
    Case(name="move-tp2-pp2", ranks=4, student=TP2_SP_PP2, deep=True, tied=True, steps=5),
    Case(name="move-tp2-vpp2", ranks=4, student=TP2 | VPP2, deep=True, tied=True, steps=5),
]


def test_a_checkpoint_goes_from_layout_to_layout(models, tmp_path, reference):
    """Adam's moments and the schedule move with the weights: the steps are those of a training that never moved."""
    truth = reference(MOVES[0])
    for rank in run_on_ranks(run_chain, MOVES, str(models), str(tmp_path), world_size=4, timeout_s=400):
        for step, exact, size in zip(rank, truth.losses, truth.sizes, strict=True):
            assert abs(step["loss"] - exact) < 1e-5 * size
        assert [step["grad_norm"] for step in rank] == pytest.approx(truth.grad_norms, rel=1e-5)


def test_packs_of_the_cases_differ_in_number(outcome):
    """Otherwise the comparisons would not show that the split of a batch is immaterial."""
    assert outcome(ONE_RANK[0])[0]["packs"][0] == [1]
    assert outcome(next(c for c in ONE_RANK if c.name == "small-packs"))[0]["packs"][0][0] >= 5


def test_outliers_are_those_that_plain_autograd_finds(outcome, reference):
    stats, truth = outcome(ONE_RANK[0])[0]["stats"], reference(ONE_RANK[0])
    assert [step["outlier_fraction"] for step in stats] == pytest.approx(truth.outliers, abs=1e-9)
    assert all(0.2 < share < 0.8 for share in truth.outliers)


def test_stuck_outliers_are_those_of_plain_log_probs(models, outcome):
    """By chance to be rejected, not by count; these small models pass the limit of certainty half the time."""
    student, teacher = load_hf(models / student_directory(ONE_RANK[0])), load_hf(models / "teacher")
    rejected, stuck = 0.0, 0.0
    for rollout in random_rollouts(0, vocab_size=VOCAB):
        at = np.flatnonzero(rollout.region_L == Region.CONTINUATION)
        q_N, p_N = (
            hf_logprobs(model, rollout.token_ids, VOCAB)[at - 1, rollout.token_ids[at]].exp().detach().numpy()
            for model in (student, teacher)
        )
        chance_N = 1.0 - np.minimum(1.0, p_N / q_N)
        rejected += chance_N.sum()
        stuck += chance_N[q_N > CERTAIN].sum()
    assert 0.1 < stuck / rejected < 0.9
    assert outcome(ONE_RANK[0])[0]["stats"][0]["stuck_fraction"] == pytest.approx(stuck / rejected, rel=1e-5)


def test_tropd_that_trusts_every_token_and_is_not_guided_is_opd(outcome):
    tropd, opd = outcome(ALL_TRUSTED)[0], outcome(next(c for c in ONE_RANK if c.name == "tp1-opd"))[0]
    assert tropd["loss"] == opd["loss"]
    assert tropd["grad_norm"] == opd["grad_norm"]
    assert all(tropd["gradients"][name].equal(opd["gradients"][name]) for name in opd["gradients"])


@pytest.fixture(scope="module", params=[1, 2], ids="{}-ranks".format)
def self_check(request, models) -> list[dict[str, dict[str, Any]]]:
    world_size = request.param
    return run_on_ranks(self_checks, SELF_CHECKS[world_size], str(models), world_size=world_size)


def test_a_student_that_is_its_own_teacher_has_nothing_to_learn(self_check):
    for rank in self_check:
        for name, found in rank.items():
            rounding = 2e-2 if name == "bf16" else 1e-5
            assert found["applies"]
            assert found["loss"] < rounding and found["gradient"] < rounding, name


def test_a_teacher_that_disagrees_a_little_is_caught(self_check):
    for rank in self_check:
        for name, found in rank.items():
            if name != "bf16":  # there, so little is rounding
                assert "disagree about log-probs" in found["broken"], name
