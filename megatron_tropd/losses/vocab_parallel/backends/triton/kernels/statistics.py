"""Softmax statistics of a tile, merged into running ones, and the logits of given ids, in one pass over the tile.

Plain twins: ``chunk_statistics`` and ``Statistics.merge_`` (``statistics.py``), ``Picks.read_into`` and
``Picks.mask_columns`` (``backends/torch/softmax.py``).

Memory-bound: each fp32 logit is read once, 4 bytes, and a row costs 24 bytes of statistics and 12 per picked id besides
it. Floor on an H200, at the 4.3 TB/s measured for a copy: 0.93 ns per 1,000 logits, 2.3 ms for 16,384 x 151,936.
One exponential and about ten other instructions per logit: a quarter of what a multiprocessor can issue meanwhile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from megatron_tropd.losses.vocab_parallel.backends.triton.kernels._rows import (
    NOTHING,
    block_statistics,
    check_rows,
    ids_block,
    launch_for,
    load_block,
    merge,
    read_picked,
)


def add_statistics(
    logits_Rw: Tensor,
    *,
    scale: float,
    max_R: Tensor,
    sumexp_R: Tensor,
    weighted_R: Tensor,
    ids_RK: Tensor,
    picked_RK: Tensor,
    first_id: int,
    mask: bool,
) -> None:
    """Include the columns of ``scale * logits`` in the running statistics, and fill in the logits of ids among them.

    ``first_id`` is the global id of column 0. ``picked_RK`` keeps what it holds where an id lies elsewhere. With
    ``mask`` the ids' columns are overwritten and do not count: the statistics are of the columns outside (``tail.py``).
    """
    check_rows(logits_Rw, ids_RK, picked_RK, max_R, sumexp_R, weighted_R)
    launch, num_ids = launch_for(logits_Rw.shape[1]), ids_RK.shape[1]
    _statistics_kernel[(logits_Rw.shape[0],)](
        logits_Rw,
        logits_Rw.stride(0),
        logits_Rw.shape[1],
        scale,
        max_R,
        sumexp_R,
        weighted_R,
        ids_RK,
        ids_RK.stride(0),
        picked_RK,
        picked_RK.stride(0),
        num_ids,
        first_id,
        MASK=mask,
        IDS=ids_block(num_ids),
        BLOCK=launch.block,
        num_warps=launch.warps,
    )


@triton.jit(do_not_specialize=["num_ids", "first_id"])
def _statistics_kernel(
    logits_ptr,
    logits_stride,
    width,
    scale,
    max_ptr,
    sumexp_ptr,
    weighted_ptr,
    ids_ptr,
    ids_stride,
    picked_ptr,
    picked_stride,
    num_ids,
    first_id,
    MASK: tl.constexpr,
    IDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    ids_ptr += row * ids_stride
    read_picked(logits_ptr, width, scale, ids_ptr, picked_ptr + row * picked_stride, num_ids, first_id, MASK, IDS)
    top = tl.load(max_ptr + row)
    sumexp = tl.load(sumexp_ptr + row)
    weighted = tl.load(weighted_ptr + row)
    for start in tl.range(0, width, BLOCK):
        raw, _ = load_block(logits_ptr, start, width, NOTHING, BLOCK)
        block_max, block_sumexp, block_weighted = block_statistics(raw, scale)
        top, sumexp, weighted = merge(top, sumexp, weighted, block_max, block_sumexp, block_weighted)
    tl.store(max_ptr + row, top)
    tl.store(sumexp_ptr + row, sumexp)
    tl.store(weighted_ptr + row, weighted)
