"""Every objective's gradient under tensor parallelism is that of its textbook formula: docs/correctness.md, checked.

What is compared, and how, is in ``parity``; the truth in ``parity_truth``; the cases in ``parity_problems``.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_tropd.losses import terms
from tests.support.parity import COINCIDENCES, WORLDS, logprobs, low_precision_ratios, measured, support_ids
from tests.support.parity_cells import CELLS, cells, offered
from tests.support.parity_page import TABLES, coincidence_bound, rendered, stale, tail_bounds, with_table
from tests.support.parity_problems import PROBLEMS, STARTS, Problem

PAGE = Path(__file__).resolve().parents[2] / "docs" / "correctness.md"


@pytest.fixture(scope="module", params=WORLDS, ids="{}-ranks".format)
def world(request: pytest.FixtureRequest) -> int:
    return request.param


def test_no_gradient_of_any_objective_is_off_by_more_than_1e_5(world: int) -> None:
    errors = measured(world).gradients
    exact = {key: pair for key, pair in errors.items() if not key[1].startswith("bf16")}
    assert {key: pair for key, pair in exact.items() if not max(pair) < 1e-5} == {}
    # the comparison sees something: fp32 is no fp64
    assert all(max(pair) > 1e-9 for (row, _), pair in exact.items() if row.startswith(("nll", "rkl_full")))


def test_no_loss_of_any_objective_is_off_by_more_than_1e_5(world: int) -> None:
    """Relative to the mean size of a token's loss: losses of either sign cancel, and so do their digits."""
    exact = {key: error for key, error in measured(world).losses.items() if not key[1].startswith("bf16")}
    assert {key: error for key, error in exact.items() if not error < 1e-5} == {}


def test_the_bucket_form_is_not_negative_and_the_truncated_one_is_where_it_should_be(world: int) -> None:
    least = {key: loss for key, loss in measured(world).least.items() if not key[1].startswith("bf16")}
    bucket = {k: loss for k, loss in least.items() if k[0].endswith("bucket") and "pg_scalar" not in k[0]}
    assert len(bucket) > 80 and min(bucket.values()) > -1e-6, min(bucket, key=bucket.__getitem__)  # fp32 rounding
    truncated = {k: loss for k, loss in least.items() if k[0] == "fkl_topk | student | none"}
    assert min(truncated.values()) < -0.1


def test_no_bf16_gradient_is_off_by_more_than_1e_2_and_each_errs_less_than_plain_bf16(world: int) -> None:
    errors = {key: pair for key, pair in measured(world).gradients.items() if key[1].startswith("bf16")}
    assert {key: pair for key, pair in errors.items() if not max(pair) < 1e-2} == {}
    ratios = low_precision_ratios(world)
    assert len(ratios) > 40
    assert {row: ratio for row, ratio in ratios.items() if not ratio < 1.0} == {}


def test_the_mass_outside_a_support_is_exact_to_rounding_however_small(world: int) -> None:
    for mass, (of_mass, hidden, weight, one_minus_sum) in measured(world).tails.items():
        assert max(hidden, weight) < 1e-5, mass
        assert of_mass < tail_bounds(mass)[0], mass
        assert mass > 1e-4 or one_minus_sum > 1e-3, mass  # why it is not 1 - sum


def test_presets_that_coincide_do_so_under_tensor_parallelism(world: int) -> None:
    found = measured(world).coincidences
    assert found.keys() == COINCIDENCES.keys()
    assert {name: error for name, error in found.items() if not error <= coincidence_bound(name)} == {}


def test_a_term_or_an_option_without_a_textbook_formula_is_an_error() -> None:
    ours = SimpleNamespace(__name__="ours", **{name: getattr(terms, name) for name in offered()})
    assert [cell.row for cell in cells(ours)] == [cell.row for cell in CELLS]  # type: ignore[arg-type]

    def novel(*, k: int, strength: float = 1.0) -> terms.Term:
        return terms.nll()

    novel.__annotations__["return"] = "Term"
    with pytest.raises(LookupError, match=r"ours\.novel has no textbook formula"):
        list(cells(SimpleNamespace(**vars(ours), novel=novel)))  # type: ignore[arg-type]
    with pytest.raises(LookupError, match=r"no proof of ours\.nll sets strength"):
        list(cells(SimpleNamespace(**(vars(ours) | {"nll": novel}))))  # type: ignore[arg-type]


def test_the_cases_are_what_they_are_called() -> None:
    def named(word: str) -> Problem:
        (problem,) = [p for p in PROBLEMS if word in p.name]
        return problem

    def shares(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        """What the teacher's top k hold, of the student and of the teacher."""
        ids_TK = support_ids(problem, "teacher")
        return tuple(logprobs(problem, x).exp().gather(1, ids_TK).sum(-1) for x in (problem.student, problem.teacher))

    problem = named("shard-start")
    assert {*STARTS} <= {*support_ids(problem, "teacher")[0].tolist()} and {*problem.target_T.tolist()} <= {*STARTS}
    assert (support_ids(named("on one shard"), "union") >= 30).all()
    near = named("duplicates")
    repeats = [len(row) - len({*row}) for row in support_ids(near, "union").tolist()]
    assert min(repeats) >= 2 and (support_ids(near, "teacher") == near.target_T[:, None]).any()
    student_T, teacher_T = shares(named("half of the teacher"))
    assert 1e-6 < (1 - student_T).median() < 2e-5 and 0.3 < teacher_T.mean() < 0.7
    student_T, teacher_T = shares(named("of both"))
    assert student_T.median() > 0.99999 and teacher_T.median() > 0.99999
    dead = named("exactly 0")
    p_TV = logprobs(dead, dead.teacher).float().exp()
    assert (p_TV.gather(1, support_ids(dead, "teacher")) == 0.0).any(-1).all()
    assert (p_TV.gather(1, dead.target_T[:, None]) == 0.0).any()


@pytest.mark.parametrize("name", sorted(TABLES))
def test_the_page_says_what_is_measured(name: str) -> None:
    assert stale(PAGE.read_text(encoding="utf-8"), name) == []


def test_a_page_that_lies_is_noticed() -> None:
    text = PAGE.read_text(encoding="utf-8")
    make, header = TABLES["coincidences"]
    honest = rendered(make(), header)
    (row,) = [line for line in honest.splitlines() if "local_support" in line]
    name, *cells, bound = row.removesuffix(" |").split(" | ")

    def found(content: str) -> str:
        return str(stale(with_table(text, "coincidences", content), "coincidences"))

    assert found(honest) == "[]"
    lies = {
        "a bound below what is measured": f"{name} | {' | '.join(cells)} | ≤ 1e-12 |",
        "a bound far above the computed one": f"{name} | {' | '.join(cells)} | ≤ 1e-3 |",
        "digits above the bound": f"{name} | {' | '.join(['1e-3'] * len(cells))} | {bound} |",
        "digits left out": f"{name} | {' | '.join(['-'] * len(cells))} | {bound} |",
    }
    for lie, line in lies.items():
        assert "local_support" in found(honest.replace(row, line)), lie
    # digits of another machine, within the bound, are no lie
    assert found(honest.replace(row, f"{name} | {' | '.join(['1e-9'] * len(cells))} | {bound} |")) == "[]"
    assert found(honest.replace(row + "\n", "")) != "[]"


def test_a_term_off_by_1e_5_would_be_above_its_bound() -> None:
    """Whatever its rounding does, in most rows of an objective."""
    rows = {words: line for words, line in TABLES["objectives"][0]().items() if words[0] == "fkl_pg_scalar"}
    seen = [line for line in rows.values() if max(line.bound) < 1e-5 - max(max(pair) for pair in line.found)]
    assert len(seen) > len(rows) / 2
