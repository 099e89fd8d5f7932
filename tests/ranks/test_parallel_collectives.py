"""Claims about ``parallel.collectives``, on real gloo processes; expected numbers by hand."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.errors import ConfigError
from megatron_tropd.parallel.collectives import (
    all_gather_rows,
    all_gather_stack,
    all_reduce_max,
    all_reduce_sum,
    copy_to_region,
    gather_sequence,
    group_rank,
    group_size,
    reduce_from_region,
    reduce_scatter_rows,
    scatter_sequence,
)
from tests.support.distributed import RankFailed, run_on_ranks

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def rows_of(rank: int, dtype: torch.dtype) -> Tensor:
    """Small integers, exact in every dtype: rank r holds 10 r + 0..5 as a [3, 2] tensor."""
    return (10 * rank + torch.arange(6)).reshape(3, 2).to(dtype)


def check_reductions() -> None:
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert (group_rank(group), group_size(group)) == (rank, ranks)
    for dtype in DTYPES:
        total = torch.stack([rows_of(r, dtype) for r in range(ranks)]).sum(0)
        torch.testing.assert_close(all_reduce_sum(rows_of(rank, dtype), group), total)
        # a transposed view is not contiguous: it must be reduced all the same
        torch.testing.assert_close(all_reduce_sum(rows_of(rank, dtype).t(), group), total.t())
        torch.testing.assert_close(
            all_reduce_max(rows_of(rank, dtype).t(), group),
            rows_of(ranks - 1, dtype).t(),
        )
    empty = torch.empty(0, 5)
    assert all_reduce_sum(empty, group).shape == (0, 5)
    assert all_gather_stack(empty, group).shape == (ranks, 0, 5)


def check_gathers() -> None:
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    for dtype in [*DTYPES, torch.int64]:
        every = [rows_of(r, dtype) for r in range(ranks)]
        torch.testing.assert_close(all_gather_stack(rows_of(rank, dtype).t(), group), torch.stack(every).mT)
        torch.testing.assert_close(all_gather_rows(rows_of(rank, dtype), group), torch.cat(every))
    for dtype in DTYPES:
        whole = torch.arange(ranks * 3 * 2).reshape(ranks * 3, 2).to(dtype)
        kept = whole.clone()
        mine = reduce_scatter_rows(whole, group)
        torch.testing.assert_close(mine, ranks * kept[3 * rank : 3 * rank + 3])
        torch.testing.assert_close(whole, kept)  # the argument is not reduced in place
    if ranks > 1:
        with pytest.raises(ConfigError, match=rf"{ranks + 1} rows .* multiple of {ranks} tokens"):
            reduce_scatter_rows(torch.zeros(ranks + 1, 2), group)


def check_region_mappings() -> None:
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    # each rank multiplies the shared x by its own factor; d/dx of the sum over ranks is the sum of the factors
    x = torch.arange(6.0).reshape(2, 3).requires_grad_()
    factor = torch.full((3, 2), float(rank + 1))
    y = copy_to_region(x, group)
    torch.testing.assert_close(y, x)
    (y.t() * factor).sum().backward()  # the gradient arrives transposed, hence not contiguous
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full((2, 3), ranks * (ranks + 1) / 2))

    # a gradient shared with another branch must not be reduced twice: y + x hands both the same tensor
    x = torch.ones(2, requires_grad=True)
    (copy_to_region(x, group) + x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full((2,), ranks + 1.0))

    for dtype in DTYPES:
        share = rows_of(rank, dtype).requires_grad_()
        whole = gather_sequence(share, group)
        torch.testing.assert_close(whole.detach(), torch.cat([rows_of(r, dtype) for r in range(ranks)]))
        weight = torch.arange(whole.numel()).reshape(whole.shape).to(dtype)
        (whole * weight * (rank + 1)).sum().backward()
        assert share.grad is not None
        torch.testing.assert_close(share.grad, weight[3 * rank : 3 * rank + 3] * ranks * (ranks + 1) / 2)


def check_ways_out_of_a_region() -> None:
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    # each rank's part is its own multiple of x; the gradient of the sum is every part's
    weight = torch.arange(6.0).reshape(2, 3) + 1
    part = ((rank + 1) * torch.ones(3, 2)).requires_grad_()
    whole = reduce_from_region(part.t(), group)  # not contiguous
    torch.testing.assert_close(whole.detach(), torch.full((2, 3), ranks * (ranks + 1) / 2))
    (whole * weight).sum().backward()
    assert part.grad is not None
    torch.testing.assert_close(part.grad, weight.t())
    torch.testing.assert_close(part.detach(), (rank + 1) * torch.ones(3, 2))  # not reduced in place

    rows = torch.arange(2.0 * ranks * 3).reshape(2 * ranks, 3)
    part = ((rank + 1) * rows).requires_grad_()
    mine = scatter_sequence(part, group)
    own = slice(2 * rank, 2 * rank + 2)
    torch.testing.assert_close(mine.detach(), rows[own] * ranks * (ranks + 1) / 2)
    (mine * (rows[own] + 1)).sum().backward()  # every rank's loss is of its own rows
    assert part.grad is not None
    torch.testing.assert_close(part.grad, rows + 1)


def check_everything() -> None:
    check_ways_out_of_a_region()
    check_reductions()
    check_gathers()
    check_region_mappings()


@pytest.mark.parametrize("world_size", [1, 2, 4], ids="ranks{}".format)
def test_collectives_and_region_mappings_match_hand_computed_sums(
    world_size: int,
) -> None:
    run_on_ranks(check_everything, world_size=world_size)


def test_without_a_group_every_collective_is_the_identity() -> None:
    x = torch.arange(6.0).reshape(3, 2)
    assert (group_rank(None), group_size(None)) == (0, 1)
    for function in (
        all_reduce_sum,
        all_reduce_max,
        all_gather_rows,
        reduce_scatter_rows,
        copy_to_region,
        reduce_from_region,
        scatter_sequence,
    ):
        assert function(x, None) is x
    assert gather_sequence(x, None) is x
    torch.testing.assert_close(all_gather_stack(x, None), x.unsqueeze(0))


# ------------------------------------------------------------------ the helper itself


def rank_and_argument(argument: str) -> dict[str, object]:
    return {
        "rank": dist.get_rank(),
        "argument": argument,
        "threads": torch.get_num_threads(),
    }


def fail_on_rank(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ArithmeticError("the reason")
    dist.barrier()  # the healthy ranks wait, and must be ended


def sleep_on_rank(rank: int) -> None:
    time.sleep(60 if dist.get_rank() == rank else 0)


def test_run_on_ranks_returns_each_ranks_answer_in_rank_order() -> None:
    answers = run_on_ranks(rank_and_argument, "x", world_size=3)
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    assert answers == [{"rank": rank, "argument": "x", "threads": threads} for rank in range(3)]


def test_run_on_ranks_reports_the_rank_that_failed_first() -> None:
    with pytest.raises(RankFailed, match=r"(?s)rank 1 failed first.*in fail_on_rank.*ArithmeticError: the reason"):
        run_on_ranks(fail_on_rank, 1, world_size=2)


def test_run_on_ranks_ends_ranks_that_outlive_the_limit() -> None:
    start = time.monotonic()
    with pytest.raises(TimeoutError, match=r"sleep_on_rank.*still ran after 4 s"):
        run_on_ranks(sleep_on_rank, 0, world_size=2, timeout_s=4)
    assert time.monotonic() - start < 20
