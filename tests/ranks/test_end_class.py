"""Every objective with the ends of responses for one category, under tensor parallelism, beside its textbook formula.

The truth merges the columns of the class in the logits of all models and differentiates the formula in fp64; what is
compared, and how, is in ``tests.support.parity``.
"""

from __future__ import annotations

from functools import cache

import pytest

from tests.support.distributed import run_on_ranks
from tests.support.parity import (
    WORLDS,
    Errors,
    Gradients,
    gradient_errors,
    gradients,
    layout,
    logprobs,
    support_ids,
    true_losses,
)
from tests.support.parity_cells import CELLS
from tests.support.parity_problems import APART, ENDS, Problem


def on_ranks() -> dict[str, Gradients]:
    whole = layout(1)
    return {problem.name: gradients(problem, *whole) for problem in ENDS}


@cache
def measured(world: int) -> list[dict[str, Gradients]]:
    return run_on_ranks(on_ranks, world_size=world, timeout_s=500)


@pytest.fixture(scope="module", params=WORLDS, ids="{}-ranks".format)
def world(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.mark.parametrize("problem", ENDS, ids=lambda problem: problem.name)
def test_no_gradient_of_any_objective_is_off_by_more_than_1e_5(world: int, problem: Problem) -> None:
    errors: Errors = gradient_errors(problem, [rank[problem.name] for rank in measured(world)])
    assert len(errors) == len(CELLS)
    assert {key: pair for key, pair in errors.items() if not max(pair) < 1e-5} == {}


@pytest.mark.parametrize("problem", ENDS, ids=lambda problem: problem.name)
def test_no_loss_of_any_objective_is_off_by_more_than_1e_5(world: int, problem: Problem) -> None:
    """Relative to the mean size of a token's loss."""
    found = [rank[problem.name]["loss"] for rank in measured(world)]
    for number, (cell, exact, size) in enumerate(zip(CELLS, *true_losses(problem), strict=True)):
        worst = max(float((loss[number] - exact).abs() / size.clamp(min=1e-9)) for loss in found)
        assert worst < 1e-5, cell.row


def test_the_cases_are_what_they_are_called() -> None:
    apart, outside, everywhere = ENDS
    top = {name: support_ids(apart, name) for name in ("teacher", "student")}
    assert 0.5 < (top["teacher"] == 35).any(-1).double().mean() < 1.0  # of some tokens none of the class is there
    assert (top["student"] == 31).any(-1).double().mean() > 0.5
    for problem in (apart, outside):
        assert {*problem.ends} < {*problem.target_T.tolist()}
    assert {i // 10 for i in APART} == {1, 3}  # shards of 4 ranks
    shares = [logprobs(outside, x).exp()[:, list(outside.ends)].max() for x in (outside.student, outside.teacher)]
    ids_TK = support_ids(outside, "union")
    assert max(shares) < 0.05 and not any((ids_TK == i).any() for i in outside.ends)
    assert everywhere.k == everywhere.vocab
