"""Claims about the Triton kernels of ``losses.vocab_parallel``: each against fp64 and against its plain twin.

On a GPU, with ``make test-gpu``, the same tests run the compiled kernels; else Triton's interpreter runs them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_tropd.errors import ConfigError
from megatron_tropd.losses.vocab_parallel.backends.torch.divergence import (
    CHUNK_GRADIENT,
    TileSoftmax,
    chunk_kl,
    chunk_mixture_kl,
)
from megatron_tropd.losses.vocab_parallel.backends.torch.softmax import Picks, chunk_gradient
from megatron_tropd.losses.vocab_parallel.backends.triton import kernels
from megatron_tropd.losses.vocab_parallel.statistics import KlStatistics, Statistics, chunk_statistics

REQUIRED = os.environ.get("MEGATRON_TROPD_REQUIRE_COMPILED", "0") not in ("", "0")
needs_triton = pytest.mark.skipif(not kernels.installed() and not REQUIRED, reason="Triton is optional here")
pytestmark = [needs_triton, pytest.mark.gpu]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROWS, WIDTH, FIRST = 3, 83, 200  # of the tile; FIRST is the global id of its column 0
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
SCALES = pytest.mark.parametrize("scale", [1.0, 1 / 0.7], ids="scale{:.2f}".format)


@pytest.fixture(autouse=True)
def kernels_on(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setenv(kernels.SWITCH, "interpret")
    assert kernels.serve(DEVICE, torch.float32)


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*shape, generator=generator) * scale).to(dtype).to(DEVICE)


def tile(*, seed: int, dtype: torch.dtype, rows: int = ROWS, width: int = WIDTH) -> Tensor:
    """A tile that is a view of a wider buffer, whose other columns hold nan: they must not be read."""
    buffer = torch.full((rows, width + 5), torch.nan, dtype=dtype, device=DEVICE)
    buffer[:, 2 : 2 + width] = draw(rows, width, seed=seed, dtype=dtype)
    return buffer[:, 2 : 2 + width]


def ids_around(width: int = WIDTH, rows: int = ROWS) -> Tensor:
    """Both ends of the tile and their outer neighbors, an id three times, and ids from anywhere."""
    generator = torch.Generator().manual_seed(7)
    edges = torch.tensor([FIRST, FIRST, FIRST - 1, FIRST + width - 1, FIRST + width, FIRST + 3, FIRST + 3, FIRST + 3])
    anywhere = torch.randint(0, 3 * FIRST, (rows, 3), generator=generator)
    return torch.cat([edges.expand(rows, -1), anywhere], dim=1).to(DEVICE)


def many_ids() -> Tensor:
    """More ids than one block of them holds, all in columns of their own outside the tile but the last one."""
    ids = torch.arange(FIRST + WIDTH, FIRST + WIDTH + 140)
    ids[-1] = FIRST + 7
    return ids.expand(ROWS, -1).to(DEVICE)


def empty(rows: int = ROWS) -> Statistics:
    return Statistics.empty(rows, dtype=torch.float32, device=DEVICE)


def close(found: Tensor, truth: Tensor, *, limit: float, name: str = "") -> None:
    assert found.shape == truth.shape
    found, truth = found.detach().double(), truth.detach().double()
    error = float((found - truth).norm() / truth.norm().clamp_min(1e-30))
    assert error < limit, f"{name}: {error:.2e}"


def add_statistics(logits_Rw: Tensor, into: Statistics, picked_RK: Tensor, ids_RK: Tensor, **options: Any) -> None:
    from megatron_tropd.losses.vocab_parallel.backends.triton.kernels.statistics import add_statistics as add

    add(
        logits_Rw,
        max_R=into.max_T,
        sumexp_R=into.sumexp_T,
        weighted_R=into.weighted_T,
        ids_RK=ids_RK,
        picked_RK=picked_RK,
        **{"scale": 1.0, "first_id": FIRST, "mask": False} | options,
    )


# --------------------------------------------------------------------------- statistics


@SCALES
@DTYPES
def test_statistics_and_picked_logits_of_two_tiles_match_fp64(dtype: torch.dtype, scale: float) -> None:
    first_Rw, second_Rw = tile(seed=1, dtype=dtype), tile(seed=2, dtype=dtype, width=29)
    ids_RK, statistics = ids_around(), empty()
    picked_RK = torch.full(ids_RK.shape, 9.0, device=DEVICE)
    add_statistics(first_Rw, statistics, picked_RK, ids_RK, scale=scale)
    add_statistics(second_Rw, statistics, picked_RK, ids_RK, scale=scale, first_id=FIRST + WIDTH)

    logits_RV = torch.cat([first_Rw, second_Rw], dim=1).double() * scale
    logq_RV = logits_RV.log_softmax(-1)
    close(statistics.logsumexp_T, logits_RV.logsumexp(-1), limit=1e-6)
    close(statistics.entropy_T, -(logq_RV.exp() * logq_RV).sum(-1), limit=1e-6)
    column_RK = ids_RK - FIRST
    here_RK = (column_RK >= 0) & (column_RK < WIDTH + 29)
    expected_RK = torch.where(here_RK, logits_RV.gather(1, column_RK.clamp(0, WIDTH + 28)), 9.0)
    close(picked_RK, expected_RK, limit=1e-6)
    assert here_RK.any() and not here_RK.all()


@DTYPES
def test_masked_ids_leave_the_statistics_of_the_other_columns(dtype: torch.dtype) -> None:
    # the first token's listed ids hold all but 1e-12 of the mass; the second token lists every column
    logits_Rw = tile(seed=3, dtype=dtype, rows=2)
    logits_Rw[0, :2] = 40.0
    ids_RK = torch.full((2, WIDTH + 1), FIRST, device=DEVICE)
    ids_RK[0, 1] = FIRST + 1
    ids_RK[1, :WIDTH] = torch.arange(FIRST, FIRST + WIDTH)
    outside = logits_Rw[0, 2:].double()
    whole_Rw, statistics = logits_Rw.double(), empty(2)
    picked_RK = torch.zeros(ids_RK.shape, device=DEVICE)
    add_statistics(logits_Rw, statistics, picked_RK, ids_RK, mask=True)

    close(statistics.logsumexp_T[0], outside.logsumexp(-1), limit=1e-6)
    logq = outside.log_softmax(-1)
    close(statistics.entropy_T[0], -(logq.exp() * logq).sum(), limit=1e-6)
    assert statistics.sumexp_T[1] == 0.0 and statistics.weighted_T[1] == 0.0
    close(picked_RK, whole_Rw.gather(1, ids_RK - FIRST), limit=1e-6)


def test_statistics_of_extreme_rows_are_finite_and_right() -> None:
    lowest = torch.finfo(torch.float32).min
    rows = [[lowest] * 5, [1e4, -1e4, 0.0, 0.0, 0.0], [-3e4, -3e4, -3e4 - 2, -4e4, lowest], [0.0] * 5]
    logits_Rw = torch.tensor(rows, device=DEVICE)
    ids_RK, statistics = torch.zeros(4, 0, dtype=torch.int64, device=DEVICE), empty(4)
    # a row without any real logit cannot be told from padding: it counts as empty
    add_statistics(logits_Rw, statistics, torch.zeros(4, 0, device=DEVICE), ids_RK)
    assert statistics.sumexp_T[0] == 0.0
    close(statistics.logsumexp_T[1:], logits_Rw[1:].double().logsumexp(-1), limit=1e-7)
    p = 1 / (2 + np.exp(-2.0))
    third = -2 * p * np.log(p) - np.exp(-2.0) * p * (np.log(p) - 2)
    truth = torch.tensor([0.0, third, np.log(5.0)], dtype=torch.float64, device=DEVICE)
    close(statistics.entropy_T[1:], truth, limit=1e-6)


# --------------------------------------------------------------------------- gradient


def softmax_problem(dtype: torch.dtype, scale: float) -> tuple[Tensor, Statistics, dict[str, Tensor]]:
    """A tile, statistics over it and further columns, and the incoming numbers of a gradient."""
    logits_Rw, statistics = tile(seed=4, dtype=dtype), empty()
    elsewhere = chunk_statistics(draw(ROWS, 19, seed=5), torch.empty(ROWS, 19, device=DEVICE))
    statistics.merge_(slice(None), elsewhere)
    wide_Rw = logits_Rw.float() * scale
    statistics.merge_(slice(None), chunk_statistics(wide_Rw, torch.empty_like(wide_Rw)))
    numbers = {"constant_R": draw(ROWS, seed=6), "slope_R": draw(ROWS, seed=7)}
    return logits_Rw, statistics, numbers


@pytest.mark.parametrize("slope", [False, True], ids=["", "slope"])
@SCALES
@DTYPES
def test_gradient_matches_fp64_and_the_plain_twin_in_place_and_elsewhere(
    dtype: torch.dtype, scale: float, slope: bool
) -> None:
    from megatron_tropd.losses.vocab_parallel.backends.triton.kernels.gradient import fold_duplicates, form_gradient

    logits_Rw, statistics, numbers = softmax_problem(dtype, scale)
    numbers["slope_R"] = numbers["slope_R"] if slope else None  # type: ignore[assignment]
    ids_RK = torch.cat([many_ids(), ids_around()], dim=1)
    grad_RK = draw(*ids_RK.shape, seed=8)
    picks = Picks.of(ids_RK, first_id=FIRST, width=WIDTH)

    logq_Rw = logits_Rw.double() * scale - statistics.logsumexp_T.double()[:, None]
    truth_Rw = logq_Rw.exp() * numbers["constant_R"].double()[:, None]
    if slope:
        truth_Rw += logq_Rw.exp() * logq_Rw * numbers["slope_R"].double()[:, None]
    truth_Rw.scatter_add_(1, picks.column_RK, grad_RK.double() * picks.inside_RK)
    twin_Rw = logits_Rw.float() * scale
    shared = {"max_R": statistics.max_T, "sumexp_R": statistics.sumexp_T, **numbers}
    chunk_gradient(twin_Rw, torch.empty_like(twin_Rw), **shared)
    picks.add_to(twin_Rw, grad_RK)

    options = {"ids_RK": ids_RK, "folded_RK": fold_duplicates(ids_RK, grad_RK), "first_id": FIRST, "scale": scale}
    elsewhere_Rw = form_gradient(logits_Rw, torch.empty_like(logits_Rw), **shared, **options)
    # the interpreter rounds to bfloat16 by cutting digits off
    limit = 1e-6 if dtype == torch.float32 else 2**-7
    close(elsewhere_Rw, truth_Rw, limit=limit)
    close(elsewhere_Rw, twin_Rw, limit=limit)
    in_place_Rw = form_gradient(logits_Rw, logits_Rw, **shared, **options)
    assert in_place_Rw is logits_Rw and torch.equal(in_place_Rw, elsewhere_Rw)
    # what two writers agree on is the same in every run
    again_Rw = form_gradient(tile(seed=4, dtype=dtype), torch.empty_like(elsewhere_Rw), **shared, **options)
    assert torch.equal(again_Rw, elsewhere_Rw)


def test_gradient_at_masked_ids_is_what_they_add_and_nothing_else() -> None:
    from megatron_tropd.losses.vocab_parallel.backends.triton.kernels.gradient import fold_duplicates, form_gradient

    logits_Rw, statistics, numbers = softmax_problem(torch.float32, 1.0)
    ids_RK = torch.cat([many_ids(), ids_around()], dim=1)
    grad_RK = draw(*ids_RK.shape, seed=8)
    picks = Picks.of(ids_RK, first_id=FIRST, width=WIDTH)
    shared = {"max_R": statistics.max_T, "sumexp_R": statistics.sumexp_T, **numbers}
    twin_Rw = logits_Rw.clone()
    chunk_gradient(twin_Rw, torch.empty_like(twin_Rw), **shared)
    listed_Rw = torch.zeros_like(twin_Rw).scatter_add_(1, picks.column_RK, picks.inside_RK.float())
    twin_Rw.masked_fill_(listed_Rw > 0, 0.0)
    picks.add_to(twin_Rw, grad_RK)
    folded_RK = fold_duplicates(ids_RK, grad_RK)
    # whatever the forward has left in the masked columns
    logits_Rw.masked_fill_(listed_Rw > 0, -1e30)
    options = {"ids_RK": ids_RK, "folded_RK": folded_RK, "first_id": FIRST, "scale": 1.0, "masked": True}
    close(form_gradient(logits_Rw, logits_Rw, **shared, **options), twin_Rw, limit=1e-6)


def test_duplicates_share_the_sum_of_their_gradients_by_hand() -> None:
    from megatron_tropd.losses.vocab_parallel.backends.triton.kernels.gradient import fold_duplicates

    ids = torch.tensor([[4, 9, 4, 4], [1, 2, 3, 1]], device=DEVICE)
    grad = torch.tensor([[1.0, 2.0, 4.0, 8.0], [0.5, 0.25, 0.125, 1.0]], device=DEVICE)
    expected = torch.tensor([[13.0, 2.0, 13.0, 13.0], [1.5, 0.25, 0.125, 1.5]], device=DEVICE)
    assert torch.equal(fold_duplicates(ids, grad), expected)
    assert fold_duplicates(ids[:, :0], grad[:, :0]).shape == (2, 0)


# --------------------------------------------------------------------------- top-k


def run_topk(
    parts: list[Tensor], k: int, *, scale: float = 1.0, capacity: int | None = None, **options: Any
) -> tuple[list[list[int]], Statistics, Tensor]:
    """(ids by logit descending then id ascending, statistics, keys that are left over) of tiles side by side."""
    from megatron_tropd.losses.vocab_parallel.backends.triton.kernels.topk import CandidateLists, add_candidates
    from megatron_tropd.losses.vocab_parallel.candidates import decode

    rows = parts[0].shape[0]
    candidates, statistics = CandidateLists.empty(rows, k, device=DEVICE, capacity=capacity), empty(rows)
    ids_RK = options.pop("ids_RK", torch.zeros(rows, 0, dtype=torch.int64, device=DEVICE))
    first_id = FIRST
    for part in parts:
        add_candidates(
            part,
            candidates,
            slice(0, rows),
            scale=scale,
            max_R=statistics.max_T,
            sumexp_R=statistics.sumexp_T,
            weighted_R=statistics.weighted_T,
            ids_RK=ids_RK,
            picked_RK=torch.zeros(ids_RK.shape, device=DEVICE),
            first_id=first_id,
            **{"tail": False} | options,
        )
        first_id += part.shape[1]
    keys = candidates.keys().sort(dim=-1, descending=True).values
    return decode(keys[:, :k])[1].tolist(), statistics, keys[:, k:]


def full_sort(logits_RV: Tensor, k: int) -> list[list[int]]:
    ids = np.arange(logits_RV.shape[1])
    rows = logits_RV.double().cpu().numpy()
    return [(np.lexsort((ids, -row))[:k] + FIRST).tolist() for row in rows]


@pytest.mark.parametrize(("k", "capacity"), [(1, 1), (5, 8), (5, 64), (83 + 29, 128)])
@DTYPES
def test_topk_matches_a_full_sort_of_two_tiles(dtype: torch.dtype, k: int, capacity: int) -> None:
    parts = [tile(seed=11, dtype=dtype), tile(seed=12, dtype=dtype, width=29)]
    found, statistics, _ = run_topk(parts, k, scale=1 / 0.7, capacity=capacity)
    logits_RV = torch.cat(parts, dim=1)
    assert found == full_sort(logits_RV.float() * (1 / 0.7), k)
    close(statistics.logsumexp_T, (logits_RV.double() / 0.7).logsumexp(-1), limit=1e-6)


@pytest.mark.parametrize("pattern", ["ties", "ascending", "zeros", "constant"])
def test_topk_keeps_the_smaller_ids_of_equal_logits_whatever_the_order(pattern: str) -> None:
    width = 700  # several parts of one block
    row = {
        "ties": draw(1, width, seed=13).round(),
        "ascending": torch.arange(width, device=DEVICE)[None].float().div(2).floor(),  # every element enters, in pairs
        "zeros": torch.where(torch.arange(width, device=DEVICE) % 3 == 0, 0.0, -0.0)[None],
        "constant": torch.full((1, width), -7.0, device=DEVICE),
    }[pattern]
    found, _, _ = run_topk([row[:, :650], row[:, 650:]], 6, capacity=16)
    assert found == full_sort(row, 6)


def rising_plateaus() -> list[Tensor]:
    """Tiles of 3 columns: a small list is cut down over and over, at values that list and tile both have."""
    width = 60
    rising = torch.arange(width, device=DEVICE).div(9).floor() + draw(ROWS, width, seed=16).round()
    return list(rising.split(3, dim=1))


def test_topk_of_rising_plateaus_cuts_lists_and_blocks_that_tie_with_each_other() -> None:
    tiles = rising_plateaus()
    found, _, _ = run_topk(tiles, 6, capacity=8)
    assert found == full_sort(torch.cat(tiles, dim=1), 6)


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["distinct", "ties", "rising plateaus"])
@pytest.mark.parametrize("capacity", [8, 64])
def test_statistics_beside_the_top_k_are_of_all_other_columns(capacity: int, pattern: str) -> None:
    from megatron_tropd.losses.vocab_parallel.candidates import decode

    k, parts = 5, [tile(seed=14, dtype=torch.float32, width=600), tile(seed=15, dtype=torch.float32, width=29)]
    if pattern == "ties":  # an element equal to the bound of its row is counted once, in the list or beside it
        parts = [part.round() for part in parts]
    elif pattern == "rising plateaus":
        parts = rising_plateaus()
    logits_RV = torch.cat(parts, dim=1).double()
    hidden = ids_around(parts[0].shape[1])
    found, statistics, left = run_topk(parts, k, capacity=capacity, ids_RK=hidden, tail=True)
    given_RV = torch.zeros_like(logits_RV, dtype=torch.bool)
    for row, ids in enumerate((hidden - FIRST).tolist()):
        given_RV[row, [i for i in ids if 0 <= i < logits_RV.shape[1]]] = True
    assert found == full_sort(logits_RV.masked_fill(given_RV, -np.inf), k)
    real = left > torch.iinfo(torch.int64).min
    others = decode(left)[0].double().masked_fill(~real, -torch.inf).logsumexp(-1)
    outside_RV = given_RV.scatter(1, torch.tensor(found, device=DEVICE) - FIRST, True)
    truth_R = logits_RV.masked_fill(outside_RV, -torch.inf).logsumexp(-1)
    close(torch.logaddexp(statistics.logsumexp_T.double(), others), truth_R, limit=1e-6)


# --------------------------------------------------------------------------- divergences


def pair_statistics(a_Rw: Tensor, b_Rw: Tensor, *, scale: float, splits: int = 1) -> KlStatistics:
    from megatron_tropd.losses.vocab_parallel.backends.triton.kernels.divergence import add_pair

    found = KlStatistics(empty(), empty(), torch.zeros(ROWS, device=DEVICE))
    for a, b in zip(a_Rw.tensor_split(splits, dim=1), b_Rw.tensor_split(splits, dim=1), strict=True):
        add_pair(
            a,
            b,
            scale=scale,
            max_a_R=found.first.max_T,
            sumexp_a_R=found.first.sumexp_T,
            max_b_R=found.second.max_T,
            sumexp_b_R=found.second.sumexp_T,
            gap_R=found.gap_T,
        )
    return found


def mixture(pair: tuple[Tensor, Tensor], found: KlStatistics, *, scale: float, beta: float) -> Tensor:
    from megatron_tropd.losses.vocab_parallel.backends.triton.kernels.divergence import add_mixture_kl

    kl_2R = torch.zeros(2, ROWS, device=DEVICE)
    add_mixture_kl(*pair, kl_2R, scale=scale, beta=beta, **named(found))
    return kl_2R


def named(found: KlStatistics) -> dict[str, Tensor]:
    student, teacher = found.first, found.second
    return {
        "max_s_R": student.max_T,
        "sumexp_s_R": student.sumexp_T,
        "max_t_R": teacher.max_T,
        "sumexp_t_R": teacher.sumexp_T,
    }


@SCALES
@DTYPES
def test_divergence_values_match_fp64_and_the_plain_twins(dtype: torch.dtype, scale: float) -> None:
    student_Rw, teacher_Rw, beta = tile(seed=21, dtype=dtype), tile(seed=22, dtype=torch.float32), 0.3
    found = pair_statistics(student_Rw, teacher_Rw, scale=scale, splits=3)
    logq_Rw, logp_Rw = ((x.double() * scale).log_softmax(-1) for x in (student_Rw, teacher_Rw))
    close(found.kl_T, (logq_Rw.exp() * (logq_Rw - logp_Rw)).sum(-1), limit=3e-6, name="kl")
    wide = [x.float() * scale for x in (student_Rw, teacher_Rw)]
    twin = chunk_kl(wide[0].clone(), wide[1].clone(), torch.empty_like(wide[0]))
    close(found.mean_gap_T, twin.mean_gap_T, limit=3e-6, name="mean gap")

    logm_Rw = (beta * logp_Rw.exp() + (1 - beta) * logq_Rw.exp()).log()
    kl_2R = mixture((student_Rw, teacher_Rw), found, scale=scale, beta=beta)
    close(kl_2R[0], (logp_Rw.exp() * (logp_Rw - logm_Rw)).sum(-1), limit=3e-6, name="p")
    close(kl_2R[1], (logq_Rw.exp() * (logq_Rw - logm_Rw)).sum(-1), limit=3e-6, name="q")
    student, teacher = (
        TileSoftmax.of(x, s.normalizer, slice(None)) for x, s in zip(wide, (found.first, found.second), strict=True)
    )
    close(kl_2R, chunk_mixture_kl(student, teacher, beta=beta), limit=3e-6, name="twin")


@pytest.mark.parametrize("kind", sorted(CHUNK_GRADIENT))
@DTYPES
def test_divergence_gradients_match_fp64_autograd_and_the_plain_twins(kind: str, dtype: torch.dtype) -> None:
    from megatron_tropd.losses.vocab_parallel.backends.triton.kernels.divergence import form_divergence_gradient

    scale, beta = 1 / 0.7, 0.3
    student_Rw, teacher_Rw = tile(seed=21, dtype=dtype), tile(seed=22, dtype=dtype)
    grad_R, found = draw(ROWS, seed=23), pair_statistics(student_Rw, teacher_Rw, scale=scale)
    logits_Rw = (student_Rw.double() * scale).requires_grad_()
    logq_Rw, logp_Rw = logits_Rw.log_softmax(-1), (teacher_Rw.double() * scale).log_softmax(-1)
    logm_Rw = (beta * logp_Rw.exp() + (1 - beta) * logq_Rw.exp()).log()
    kl_pm_R, kl_qm_R = ((x.exp() * (x - logm_Rw)).sum(-1) for x in (logp_Rw, logq_Rw))
    loss_R = {
        "forward_kl": (logp_Rw.exp() * (logp_Rw - logq_Rw)).sum(-1),
        "reverse_kl": (logq_Rw.exp() * (logq_Rw - logp_Rw)).sum(-1),
        "jsd": beta * kl_pm_R + (1 - beta) * kl_qm_R,
    }[kind]
    (truth_Rw,) = torch.autograd.grad(loss_R, logits_Rw, grad_R.double())

    center_R = {"forward_kl": grad_R, "reverse_kl": found.mean_gap_T, "jsd": kl_qm_R.detach().float()}[kind]
    wide = [x.float() * scale for x in (student_Rw, teacher_Rw)]
    student, teacher = (
        TileSoftmax.of(x, s.normalizer, slice(None)) for x, s in zip(wide, (found.first, found.second), strict=True)
    )
    columns = {"center_R1": center_R[:, None], "grad_R1": grad_R[:, None]}
    twin_Rw = CHUNK_GRADIENT[kind](student, teacher, beta=beta, **columns)
    rows: dict[str, Any] = {"center_R": center_R, "grad_R": grad_R, **named(found)}
    options = {"kind": kind, "scale": scale, "beta": beta}
    elsewhere_Rw = form_divergence_gradient(student_Rw, teacher_Rw, torch.empty_like(student_Rw), **options, **rows)
    limit = 5e-6 if dtype == torch.float32 else 2**-7
    close(elsewhere_Rw, truth_Rw, limit=limit)
    close(elsewhere_Rw, twin_Rw, limit=limit)
    assert torch.equal(form_divergence_gradient(student_Rw, teacher_Rw, student_Rw, **options, **rows), elsewhere_Rw)


@DTYPES
def test_equal_models_have_exactly_no_divergence_and_no_gradient(dtype: torch.dtype) -> None:
    from megatron_tropd.losses.vocab_parallel.backends.triton.kernels.divergence import form_divergence_gradient

    logits_Rw = tile(seed=24, dtype=dtype)
    found = pair_statistics(logits_Rw, logits_Rw.clone(), scale=1 / 0.7, splits=2)
    assert torch.all(found.kl_T == 0.0)
    assert torch.all(mixture((logits_Rw, logits_Rw.clone()), found, scale=1 / 0.7, beta=0.5) == 0.0)
    for kind in CHUNK_GRADIENT:
        center_R = torch.zeros(ROWS, device=DEVICE)
        gradient_Rw = form_divergence_gradient(
            logits_Rw,
            logits_Rw.clone(),
            torch.empty_like(logits_Rw),
            kind=kind,
            scale=1 / 0.7,
            beta=0.5,
            center_R=center_R,
            grad_R=draw(ROWS, seed=25),
            **named(found),
        )
        assert torch.all(gradient_Rw == 0.0), kind


# --------------------------------------------------------------------------- the switch


def test_the_switch_decides_and_an_unknown_value_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setenv(kernels.SWITCH, "off")
    assert not kernels.serve(cuda, torch.bfloat16)
    monkeypatch.delenv(kernels.SWITCH)
    assert not kernels.serve(cpu, torch.bfloat16)
    assert kernels.serve(cuda, torch.bfloat16)
    assert not kernels.serve(cuda, torch.float64)
    assert not kernels.serve(cuda, torch.bfloat16, ids=kernels.MOST_IDS + 1)
    monkeypatch.setenv(kernels.SWITCH, "on")
    with pytest.raises(
        ConfigError, match=r"MEGATRON_TROPD_KERNELS='on' is unknown\. Set it to one of auto, off, interpret"
    ):
        kernels.serve(cuda, torch.bfloat16)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, whose Triton is a compiler."""
    root = str(Path(__file__).resolve().parents[3])
    inherited = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", kernels.SWITCH)}
    paths = os.pathsep.join([root, inherited.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=inherited | {"PYTHONPATH": paths} | environment,
        timeout=200,
        check=False,
    )


def test_the_package_imports_no_triton_and_says_when_the_interpreter_comes_too_late() -> None:
    code = """
import sys, os, torch
import megatron_tropd.losses.vocab_parallel, megatron_tropd.losses.vocab_parallel.backends.triton.kernels as kernels
assert "triton" not in sys.modules
import triton
os.environ[kernels.SWITCH] = "interpret"
kernels.serve(torch.device("cpu"), torch.float32)
"""
    done = run_python(code)
    assert "ConfigError: MEGATRON_TROPD_KERNELS=interpret came too late" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's compiler is for Linux")
def test_every_kernel_compiles_for_hopper_with_wide_loads_and_without_spilling(tmp_path: Path) -> None:
    done = run_python(
        "from tests.support import compile_kernels; compile_kernels.main()",
        TRITON_CACHE_DIR=str(tmp_path),
        TRITON_HOME=str(tmp_path),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 14, done.stdout
