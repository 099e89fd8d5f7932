"""Candidates for the top k of every row, without sorting it, and the softmax statistics, in one pass over the tile.

Plain twin: ``candidates.py``, with ``statistics.chunk_statistics``.

Each row keeps a short list of keys, and the value that an element must exceed to enter it. Columns come in ascending
order, so an element equal to that value loses its tie to the k that are listed already, and the list stays ordered by
id. When a block brings more than the list can hold, list and block together are cut down to exactly k: the k-th largest
value is found bit by bit, by counting, and of the elements equal to it the first ones stay. That happens a handful of
times per row: after n columns one in n / k still enters.

Memory-bound where lists are rarely touched: one read of the logits. Replayed for k = 64 and 151,936 columns in parts of
256, rows of independent numbers look through 582 of 594 parts again, append in 268 and are cut down 5 times; rows whose
mean falls with the id, as a vocabulary's does, 45, 25 and 2. Starting from the k-th largest of the first tile's part
maxima leaves 574 and 259 (docs/lab-notebook.md). Floor on an H200 at 4.3 TB/s:
0.93 ns per 1,000 logits, 2.3 ms for 16,384 x 151,936. A full sort or a radix selection reads the row many times.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_tropd.losses.vocab_parallel.backends.triton.kernels._rows import (
    MASKED_LOGIT,
    NOTHING,
    block_statistics,
    check_rows,
    ids_block,
    launch_for,
    load_block,
    merge,
    read_picked,
)

LOWEST = tl.constexpr(-(2**31))  # below the order of every number
_PART = 256
_NO_CANDIDATE = torch.iinfo(torch.int64).min


@dataclass(frozen=True, slots=True, kw_only=True)
class CandidateLists:
    """The running lists of all rows. A key orders like (value, -id): see ``candidates.py``."""

    k: int
    keys_TC: Tensor  # int64; the first count_T of each row, by id ascending
    count_T: Tensor  # int32
    bound_T: Tensor  # fp32: what an element must exceed

    @staticmethod
    def empty(num_tokens: int, k: int, *, device: torch.device, capacity: int | None = None) -> CandidateLists:
        """Make room for several times k: the fuller a list may get, the fewer times it is cut down."""
        places = triton.next_power_of_2(max(64, 4 * k) if capacity is None else capacity)
        assert k <= places, f"{places} places cannot hold {k} candidates"
        return CandidateLists(
            k=k,
            keys_TC=torch.empty((num_tokens, places), dtype=torch.int64, device=device),
            count_T=torch.zeros(num_tokens, dtype=torch.int32, device=device),
            bound_T=torch.full((num_tokens,), 0.5 * MASKED_LOGIT.value, device=device),
        )

    def keys(self) -> Tensor:
        """Return ``[T, C]`` keys of the lists, unsorted, the best k and others; what is not filled is no candidate."""
        places = self.keys_TC.shape[1]
        used_TC = torch.arange(places, device=self.keys_TC.device) < self.count_T.unsqueeze(-1)
        return self.keys_TC.masked_fill(~used_TC, _NO_CANDIDATE)


def add_candidates(
    logits_Rw: Tensor,
    candidates: CandidateLists,
    rows: slice,
    *,
    scale: float,
    max_R: Tensor,
    sumexp_R: Tensor,
    weighted_R: Tensor,
    ids_RK: Tensor,
    picked_RK: Tensor,
    first_id: int,
    tail: bool,
) -> None:
    """Do as ``statistics.add_statistics``, and put the tile's best columns into the lists of ``rows``.

    ``tail``: the given ids are masked, so no candidates either, and the statistics are of what is neither given nor
    listed at the end; entries that leave a list are included then.
    """
    check_rows(logits_Rw, ids_RK, picked_RK, max_R, sumexp_R, weighted_R)
    launch, num_ids = launch_for(logits_Rw.shape[1]), ids_RK.shape[1]
    _topk_kernel[(logits_Rw.shape[0],)](
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
        candidates.keys_TC[rows],
        candidates.count_T[rows],
        candidates.bound_T[rows],
        candidates.k,
        TAIL=tail,
        IDS=ids_block(num_ids),
        ROOM=candidates.keys_TC.shape[1],
        PART=min(_PART, launch.block),
        BLOCK=launch.block,
        num_warps=launch.warps,
    )


@triton.jit(do_not_specialize=["num_ids", "first_id", "k"])
def _topk_kernel(
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
    keys_ptr,
    count_ptr,
    bound_ptr,
    k,
    TAIL: tl.constexpr,
    IDS: tl.constexpr,
    ROOM: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * logits_stride
    keys_ptr += row * ROOM
    ids_ptr += row * ids_stride
    read_picked(logits_ptr, width, scale, ids_ptr, picked_ptr + row * picked_stride, num_ids, first_id, TAIL, IDS)
    top = tl.load(max_ptr + row)
    sumexp = tl.load(sumexp_ptr + row)
    weighted = tl.load(weighted_ptr + row)
    count = tl.load(count_ptr + row)
    bound = tl.load(bound_ptr + row)
    for start in tl.range(0, width, BLOCK):
        raw, _ = load_block(logits_ptr, start, width, NOTHING, BLOCK)
        highest = tl.max(raw, 0) * scale
        before = bound
        outside = tl.where(raw * scale > before, MASKED_LOGIT, raw) if TAIL else raw
        top, sumexp, weighted = _include(top, sumexp, weighted, outside, scale)
        if highest > bound:
            # looked through again in small parts, from the cache: blocks of full width would fill the registers
            for part in tl.range(start, tl.minimum(start + BLOCK, width), PART):
                raw_part, _inside_part = load_block(logits_ptr, part, width, NOTHING, PART)
                value = raw_part * scale
                enters = value > bound
                if TAIL:
                    missed = tl.where((value > before) & (value <= bound), value, MASKED_LOGIT)
                    top, sumexp, weighted = _include(top, sumexp, weighted, missed, 1.0)
                entering = tl.sum(enters.to(tl.int32), 0)
                ids = first_id + part + tl.arange(0, PART)
                if count + entering <= ROOM:
                    place = count + tl.cumsum(enters.to(tl.int32), 0) - 1
                    tl.store(keys_ptr + place, _key(value, ids), mask=enters)
                    count += entering
                else:
                    bound, list_out, part_out = _cut_down(keys_ptr, count, value, ids, enters, k, ROOM)
                    count = k
                    if TAIL:
                        top, sumexp, weighted = _include(top, sumexp, weighted, list_out, 1.0)
                        top, sumexp, weighted = _include(top, sumexp, weighted, part_out, 1.0)
    tl.store(max_ptr + row, top)
    tl.store(sumexp_ptr + row, sumexp)
    tl.store(weighted_ptr + row, weighted)
    tl.store(count_ptr + row, count)
    tl.store(bound_ptr + row, bound)


@triton.jit
def _include(top, sumexp, weighted, raw, scale):
    """Update running statistics with some more columns."""
    block_max, block_sumexp, block_weighted = block_statistics(raw, scale)
    return merge(top, sumexp, weighted, block_max, block_sumexp, block_weighted)


@triton.jit
def _monotone(value):
    """Return int32 that orders like the float; the two zeros, which are equal, become the same."""
    bits = tl.where(value == 0.0, 0.0, value).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _value(monotone):
    """Return the float of ``_monotone``."""
    return (monotone ^ ((monotone >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _key(value, ids):
    """Return ``candidates.encode``: the float's order above the complement of the id."""
    return (_monotone(value).to(tl.int64) << 32) | (0xFFFFFFFF - ids.to(tl.int64))


@triton.jit
def _cut_down(keys_ptr, count, value, ids, enters, k, ROOM: tl.constexpr):
    """Keep the best k of the list's ``count`` and the block's entering elements.

    Returns (the k-th value, the values that left the list, those that did not enter it); others are MASKED_LOGIT there.
    """
    places = tl.arange(0, ROOM)
    listed = places < count
    tl.debug_barrier()  # what other threads appended is there
    keys = tl.load(keys_ptr + places, mask=listed, other=0)
    tl.debug_barrier()  # all of the list is in registers before it is overwritten
    list_order = tl.where(listed, (keys >> 32).to(tl.int32), LOWEST)
    block_order = tl.where(enters, _monotone(value), LOWEST)
    kth = tl.full((), LOWEST, tl.int32)
    for step in tl.range(0, 32):
        # from the lowest number upwards, adding the largest power of two that k elements still reach
        trial = kth ^ (tl.full((), 1, tl.int32) << (31 - step))
        reached = tl.sum((list_order >= trial).to(tl.int32), 0) + tl.sum((block_order >= trial).to(tl.int32), 0)
        kth = tl.where(reached >= k, trial, kth)
    above = tl.sum((list_order > kth).to(tl.int32), 0) + tl.sum((block_order > kth).to(tl.int32), 0)
    # ties go to the smaller ids: first the list's, then the block's, each in order
    list_ties = (list_order == kth).to(tl.int32)
    list_stays = (list_order > kth) | ((list_ties > 0) & (tl.cumsum(list_ties, 0) <= k - above))
    block_ties = (block_order == kth).to(tl.int32)
    ties_before = tl.sum(list_ties, 0)
    block_stays = (block_order > kth) | ((block_ties > 0) & (ties_before + tl.cumsum(block_ties, 0) <= k - above))
    tl.store(keys_ptr + tl.cumsum(list_stays.to(tl.int32), 0) - 1, keys, mask=list_stays)
    kept = tl.sum(list_stays.to(tl.int32), 0)
    tl.store(keys_ptr + kept + tl.cumsum(block_stays.to(tl.int32), 0) - 1, _key(value, ids), mask=block_stays)
    list_out = tl.where(listed & (list_stays == 0), _value(list_order), MASKED_LOGIT)
    return _value(kth), list_out, tl.where(enters & (block_stays == 0), value, MASKED_LOGIT)
