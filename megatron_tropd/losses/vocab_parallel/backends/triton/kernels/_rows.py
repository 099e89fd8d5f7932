"""Helpers that the kernels share. Each program owns one row of the tile and walks it in blocks of columns.

Owning the row makes everything deterministic without atomics, and lets picked entries be read before, and written
after, the row is overwritten. Sums run in fp32 whatever the tile holds. Needs Triton: other rooms go through
``megatron_tropd.losses.vocab_parallel.backends.triton.kernels``, which does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

NOTHING = tl.constexpr(float("-inf"))  # past the end of a row
MASKED_LOGIT = tl.constexpr(-1.0e30)  # that of ``statistics.py``: a column that is not to count
LOG2_E = tl.constexpr(1.4426950408889634)
_MOST_COLUMNS = 4096
_MOST_IDS = 256


@dataclass(frozen=True, slots=True)
class RowLaunch:
    """The launch parameters of a walk over rows.

    On Hopper a block of 4,096 fp32 columns over 8 warps gives every thread four 16-byte loads in flight, and several
    such programs fit a multiprocessor: more than 64 KB in flight on each, several times what its share of the memory's
    latency times bandwidth requires.
    """

    block: int
    warps: int


def launch_for(width: int, *, most: int = _MOST_COLUMNS) -> RowLaunch:
    """Choose blocks for rows of ``width`` columns; a narrow row gets a narrow block."""
    block = min(most, max(16, triton.next_power_of_2(width)))
    return RowLaunch(block=block, warps=min(8, max(1, block // 256)))


def ids_block(count: int) -> int:
    """Choose how many picked ids are handled at once."""
    return min(_MOST_IDS, max(16, triton.next_power_of_2(count)))


def check_rows(*tensors: Tensor) -> None:
    """Refuse strides that no kernel takes: any between rows, but what a row holds, or a number per token, is dense."""
    for x in tensors:
        assert x.stride(-1) == 1 or x.shape[-1] <= 1, f"a kernel was given strides {x.stride()}"


@triton.jit
def load_block(row_ptr, start, width, beyond, BLOCK: tl.constexpr):
    """Return (values in fp32, with ``beyond`` past the width; which columns are real)."""
    columns = start + tl.arange(0, BLOCK)
    inside = columns < width
    return tl.load(row_ptr + columns, mask=inside, other=beyond).to(tl.float32), inside


@triton.jit
def rescale(old_max, new_max):
    """Return (old_max - new_max, its exponential); bounded, since the maximum of an empty set is the lowest float."""
    shift = tl.maximum(old_max - new_max, -1.0e4)
    return shift, tl.exp2(shift * LOG2_E)


@triton.jit
def merge(max_a, sumexp_a, weighted_a, max_b, sumexp_b, weighted_b):
    """Merge the statistics of two sets of columns: ``Statistics.merge_``."""
    top = tl.maximum(max_a, max_b)
    shift_a, scale_a = rescale(max_a, top)
    shift_b, scale_b = rescale(max_b, top)
    weighted = (weighted_a + sumexp_a * shift_a) * scale_a + (weighted_b + sumexp_b * shift_b) * scale_b
    return top, sumexp_a * scale_a + sumexp_b * scale_b, weighted


@triton.jit
def block_statistics(raw, scale):
    """Return (max, sumexp, weighted) of ``scale * raw`` over the columns that are not masked; sums of 0 when all are.

    Differences are taken before scaling, so that the maximum's own exponent is exactly 0.
    """
    raw_max = tl.maximum(tl.max(raw, 0), MASKED_LOGIT)
    gap = tl.where(raw > 0.5 * MASKED_LOGIT, raw - raw_max, MASKED_LOGIT)
    exponential = tl.exp2(gap * (scale * LOG2_E))
    return raw_max * scale, tl.sum(exponential, 0), tl.sum(exponential * gap, 0) * scale


@triton.jit
def picked_columns(ids_ptr, start, num_ids, first_id, width, IDS: tl.constexpr):
    """Return (places of some of the row's ids, their columns in this tile, which of them lie in it)."""
    slots = start + tl.arange(0, IDS)
    columns = tl.load(ids_ptr + slots, mask=slots < num_ids, other=-1) - first_id
    return slots, columns, (slots < num_ids) & (columns >= 0) & (columns < width)


@triton.jit
def read_picked(
    logits_ptr, width, scale, ids_ptr, picked_ptr, num_ids, first_id, MASK: tl.constexpr, IDS: tl.constexpr
):
    """Put logits of the row's ids in this tile where they belong; with MASK their columns are then masked."""
    for start in tl.range(0, num_ids, IDS):
        slots, columns, here = picked_columns(ids_ptr, start, num_ids, first_id, width, IDS)
        raw = tl.load(logits_ptr + columns, mask=here, other=0.0).to(tl.float32)
        tl.store(picked_ptr + slots, raw * scale, mask=here)
    if MASK:
        tl.debug_barrier()  # every mention of an id has been read before any of them masks its column
        for start in tl.range(0, num_ids, IDS):
            _, columns, here = picked_columns(ids_ptr, start, num_ids, first_id, width, IDS)
            masked = tl.full((IDS,), MASKED_LOGIT, tl.float32).to(logits_ptr.dtype.element_ty)
            tl.store(logits_ptr + columns, masked, mask=here)
        tl.debug_barrier()  # no column is read below by another thread before it is masked
