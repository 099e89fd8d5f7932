"""What sequences begin with alike is computed once: losses and every gradient are those of each sequence by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.distributed import run_on_ranks
from tests.support.layout_cases import ADAM, VOCAB, Case, batch_of, learning_rates, save_models, student_directory
from tests.support.long import few
from tests.support.sharing_cases import run_pairs
from tests.support.tiny_families import save_family
from tests.support.tiny_models import Objective, Reference, load_hf, relative_error

TP2, PP2, CP2 = {"tensor": 2}, {"pipeline": 2}, {"context": 2}
TP2_SP, VPP2 = {"tensor": 2, "sequence": True}, {"pipeline": 2, "virtual_pipeline": 2}
OPD, FKL, EXOPD = Objective(name="opd"), Objective(name="fkl"), Objective(name="exopd")
STUDENT_TOP = Objective(name="rkl", support="student", k=5)
UNION = Objective(name="fkl", support="union", k=5)
EXPERTS = ("experts", "teacher")


def case(name: str, ranks: int = 1, **options: Any) -> Case:
    return Case(name=name, ranks=ranks, **{"groups": True, "pack_tokens": 64, **options})


# One pack holds 64 rows: groups lie in several packs, one is larger than a pack.
EVERY_FP64 = [
    case("fp64-opd", dtype="fp64", objective=OPD),
    case("fp64-fkl-one-pack", dtype="fp64", objective=FKL, pack_tokens=4096, tied=True),
    case("fp64-sft", dtype="fp64", method={"name": "sft"}),
    case("fp64-jsd-recompute", dtype="fp64", method={"name": "gkd"}, recompute="full"),
    case("fp64-tp2-sp", 2, dtype="fp64", student=TP2_SP, teacher=PP2, objective=OPD),
    case("fp64-pp2-recompute", 2, dtype="fp64", student=PP2, teacher=TP2, objective=FKL, recompute="full"),
    case("fp64-cp2", 2, dtype="fp64", student=CP2, teacher=TP2, objective=OPD),
    case("fp64-dp2", 2, dtype="fp64", objective=OPD),
]
FP64 = few(EVERY_FP64, *(f"fp64-{name}" for name in ("opd", "fkl-one-pack", "tp2-sp", "pp2-recompute", "cp2")))
EVERY_FP32 = [
    case("tropd"),
    case("tropd-one-pack", pack_tokens=4096, recompute="selective"),
    case("opd", objective=OPD),
    case("fkl", objective=FKL),
    case("exopd", objective=EXOPD),
    case("student-top", objective=STUDENT_TOP),
    case("union", objective=UNION),
    case("entropy-opd", method={"name": "entropy_opd"}),
    case("tp2", 2, student=TP2, teacher=TP2),
    case("tp2-sp-full", 2, student=TP2_SP, teacher=TP2_SP, recompute="full", pack_tokens=4096),
    case("pp2-teacher-tp2", 2, student=PP2, teacher=TP2_SP),
    case("vpp2", 2, student=VPP2, teacher=CP2, deep=True),
    case("cp2-teacher-dp2", 2, student=CP2, objective=FKL),
    case("dp2-teacher-pp2-overlapped", 2, teacher=PP2, distributed_optimizer=True, overlap=True),
    case("student-top-tp2-teacher-cp2", 2, student=TP2, teacher=CP2, objective=STUDENT_TOP),
]
FP32 = few(
    EVERY_FP32,
    *("tropd", "exopd", "union", "entropy-opd", "tp2-sp-full", "vpp2", "dp2-teacher-pp2-overlapped"),
    "student-top-tp2-teacher-cp2",
)
# balance is a matter of the pack: compared with the same packs, token by token
EVERY_BALANCED = [
    case("experts", models=EXPERTS, balance=0.3),
    case("experts-recompute", models=EXPERTS, balance=0.3, recompute="full"),
    case("ep2", 2, models=EXPERTS, student={"expert": 2}, balance=0.3),
    case("experts-tp2-sp", 2, models=EXPERTS, student=TP2_SP, balance=0.3),
    case("experts-cp2", 2, models=EXPERTS, student=CP2, balance=0.3),
]
BALANCED = few(EVERY_BALANCED, "experts", "ep2", "experts-cp2")
BF16 = [case("bf16", dtype="bf16", objective=OPD), case("bf16-tp2-sp", 2, dtype="bf16", student=TP2_SP, objective=OPD)]

Outcome = Callable[[Case, str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_models(tmp_path_factory.mktemp("models"))
    save_family(folder / "experts", "qwen3-moe", sizes={"vocab_size": VOCAB})
    return folder


@pytest.fixture(scope="module")
def outcome(models: Path) -> Outcome:
    """What every rank reports of a case, one way or another; all cases of one world size run together, once."""

    @cache  # a failure too: it would be the same for every case of that size
    def together(ranks: int, balanced: bool) -> list[dict[str, Any]] | Exception:
        cases = [c for c in (BALANCED if balanced else [*FP64, *FP32, *BF16]) if c.ranks == ranks]
        ways = ("on", "tokens") if balanced else ("on", "off")
        try:
            return run_on_ranks(run_pairs, cases, str(models), ways, world_size=ranks, timeout_s=400)
        except Exception as error:
            return error

    def of(case: Case, way: str) -> list[dict[str, Any]]:
        found = together(case.ranks, case in BALANCED)
        if isinstance(found, Exception):
            raise found
        return [rank[f"{case.name}/{way}"] for rank in found]

    return of


def errors(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], limit: float) -> dict[str, float]:
    """Parameters whose gradients differ by more than the limit, and by how much."""
    assert found.keys() == truth.keys()
    every = {name: relative_error(found[name], truth[name]) for name in truth}
    return {name: error for name, error in every.items() if error > limit}


def assert_equal(on: list[dict[str, Any]], off: list[dict[str, Any]], limit: float) -> None:
    assert errors(on[0]["gradients"], off[0]["gradients"], limit) == {}
    for rank in on:
        assert rank["grad_norm"] == pytest.approx(off[0]["grad_norm"], rel=max(limit, 1e-6))  # Megatron's norm is fp32
        assert rank["stats"] == pytest.approx(off[0]["stats"], rel=1e-5, abs=1e-6)
        assert rank["forests"] > 0 and sum(rank["rows"]) < 0.9 * sum(rank["tokens"])


@pytest.mark.parametrize("case", FP64, ids=lambda case: case.name)
def test_in_fp64_every_gradient_is_that_of_the_sequences_by_themselves_to_twelve_digits(case, outcome):
    on, off = outcome(case, "on"), outcome(case, "off")
    assert_equal(on, off, 1e-12)
    assert on[0]["loss"] == pytest.approx(off[0]["loss"], rel=1e-10, abs=1e-12)
    assert off[0]["forests"] == 0


@pytest.mark.parametrize("case", FP32, ids=lambda case: case.name)
def test_in_fp32_every_gradient_is_that_of_the_sequences_by_themselves(case, outcome):
    assert_equal(outcome(case, "on"), outcome(case, "off"), 1e-5)


@pytest.mark.parametrize("case", BALANCED, ids=lambda case: case.name)
def test_the_balance_of_experts_counts_tokens_not_rows(case, outcome):
    on, tokens = outcome(case, "on"), outcome(case, "tokens")
    assert_equal(on, tokens, 1e-5)
    assert on[0]["tokens"] == tokens[0]["tokens"]


@pytest.mark.parametrize(
    "case", [c for c in FP32 if c.ranks == 1 and c.method is None and c.recompute == "none"], ids=lambda c: c.name
)
def test_every_gradient_is_that_of_plain_autograd(case, outcome, models):
    base = load_hf(models / student_directory(case))
    student, teacher = load_hf(models / student_directory(case)), load_hf(models / "teacher")
    truth = Reference(student, teacher, case.objective, VOCAB, base)
    truth.train([batch_of(case, 0)], ADAM, learning_rates(1))
    assert errors(outcome(case, "on")[0]["gradients"], truth.first_gradients, 1e-5) == {}


@pytest.mark.parametrize("case", BF16, ids=lambda case: case.name)
def test_bf16_errs_no_more_than_the_sequences_by_themselves(case, outcome):
    exact = next(c for c in FP64 if c.objective == OPD and c.ranks == 1)
    truth = outcome(exact, "off")[0]["gradients"]

    def error(way: str) -> float:
        found = outcome(case, way)[0]["gradients"]
        return relative_error(*(torch.cat([x[name].flatten().double() for name in truth]) for x in (found, truth)))

    assert error("on") < 1.3 * error("off")


def test_the_batch_is_what_the_cases_say(outcome):
    """Several packs, budgets by rows, of which the sequences have more tokens; the largest group is cut."""
    found = outcome(next(c for c in FP32 if c.name == "tropd"), "on")[0]
    assert len(found["rows"]) == 3 and max(found["rows"]) <= 64 < max(found["tokens"])
    assert json.dumps(found["tokens"]) != json.dumps(found["rows"])
