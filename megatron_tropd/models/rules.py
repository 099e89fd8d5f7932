"""Rules that split tensors for tensor-parallel ranks and join them again. Pure tensor algebra.

A rule lists which rows of one rank's parameter stand where in the Hugging Face tensors (``RowRange``). That one list is
read in both directions: ``fill`` takes this rank's rows out of HF tensors, which may be lazily read ones, and
``joined_rows`` puts all ranks' rows back together. Rows travel in strips, so neither holds anything large twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_tropd.types import Architecture

Shape = tuple[int, ...]

_STRIP_BYTES = 16 << 20


class Sliceable(Protocol):
    """A tensor, or a lazily read one."""

    @property
    def shape(self) -> Any: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __getitem__(self, index: Any) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class TensorShard:
    """Which part of the model: tensor-parallel ``rank`` of ``size``, and the padded vocabulary."""

    architecture: Architecture
    rank: int
    size: int
    padded_vocab: int

    def span(self, total: int) -> slice:
        """Return this rank's even share of ``total`` rows."""
        share = total // self.size
        return slice(self.rank * share, (self.rank + 1) * share)


@dataclass(frozen=True, slots=True)
class RowRange:
    """``rows`` rows of a rank's parameter from ``shard_row`` are those of HF tensor ``part`` from ``hf_row``."""

    part: int
    rows: int
    shard_row: int
    hf_row: int
    columns: slice | None = None  # of the HF tensor; None: all


@dataclass(frozen=True, slots=True)
class Rule:
    """``blocks``: where one rank's rows are. ``shard_shape``: the shape of its parameter. Both from the HF shapes."""

    blocks: Callable[[Sequence[Shape], TensorShard], list[RowRange]]
    shard_shape: Callable[[Sequence[Shape], TensorShard], Shape]


def _whole(shapes: Sequence[Shape], cut: TensorShard) -> list[RowRange]:
    return [RowRange(0, shapes[0][0], 0, 0)]


def _columns(shapes: Sequence[Shape], cut: TensorShard) -> list[RowRange]:
    return [RowRange(0, shapes[0][0], 0, 0, cut.span(shapes[0][1]))]


def _stacked_rows(shapes: Sequence[Shape], cut: TensorShard) -> list[RowRange]:
    span = cut.span(shapes[0][0])
    rows = span.stop - span.start
    return [RowRange(part, rows, part * rows, span.start) for part in range(len(shapes))]


def _vocabulary(shapes: Sequence[Shape], cut: TensorShard) -> list[RowRange]:
    span = cut.span(cut.padded_vocab)
    real = min(span.stop, shapes[0][0]) - span.start
    return [RowRange(0, real, 0, span.start)] if real > 0 else []


def _qkv(shapes: Sequence[Shape], cut: TensorShard) -> list[RowRange]:
    """Interleave per key/value group as Megatron does: its query heads, its key head, its value head."""
    groups = cut.architecture.num_kv_heads
    per_group = [shape[0] // groups for shape in shapes]
    mine = cut.span(groups)
    blocks, row = [], 0
    for group in range(mine.start, mine.stop):
        for part, rows in enumerate(per_group):
            blocks.append(RowRange(part, rows, row, group * rows))
            row += rows
    return blocks


def _share_of_rows(shapes: Sequence[Shape], cut: TensorShard) -> Shape:
    return (sum(shape[0] for shape in shapes) // cut.size, *shapes[0][1:])


RULES: dict[str, Rule] = {
    "whole": Rule(_whole, lambda shapes, cut: shapes[0]),
    "columns": Rule(_columns, lambda shapes, cut: (shapes[0][0], shapes[0][1] // cut.size)),
    "stacked_rows": Rule(_stacked_rows, _share_of_rows),
    "vocabulary": Rule(_vocabulary, lambda shapes, cut: (cut.padded_vocab // cut.size, *shapes[0][1:])),
    "qkv": Rule(_qkv, _share_of_rows),
}


def fill(
    rule: str, parameter: Tensor, parts: Mapping[int, Sliceable], shapes: Sequence[Shape], cut: TensorShard
) -> None:
    """Copy this rank's rows of the HF tensors into its ``parameter``, in the parameter's dtype.

    Args:
        parts: the HF tensors by their place in the table's entry; those missing are left for another call.
        shapes: of all HF tensors of the entry.
    """
    blocks = RULES[rule].blocks(shapes, cut)
    filled = max((block.shard_row + block.rows for block in blocks), default=0)
    parameter[filled:].zero_()  # a vocabulary's padding
    for block in blocks:
        if block.part not in parts:
            continue
        source, target = parts[block.part], parameter[block.shard_row : block.shard_row + block.rows]
        for strip in strips(target.shape, target.element_size()):
            rows = slice(block.hf_row + strip.start, block.hf_row + strip.stop)
            target[strip].copy_(source[rows] if block.columns is None else source[rows, block.columns])


def join(rule: str, shards: Sequence[Tensor], shapes: Sequence[Shape], cut: TensorShard) -> list[Tensor]:
    """Join the whole HF tensors from all ranks' parameters, in rank order. ``cut.rank`` does not matter."""
    whole = [shards[0].new_empty(shape) for shape in shapes]
    for part, row, rows in joined_rows(rule, shards, 0, shapes, cut):
        whole[part][row : row + len(rows)].copy_(rows)
    return whole


def joined_rows(
    rule: str, shards: Sequence[Tensor], first: int, shapes: Sequence[Shape], cut: TensorShard
) -> Iterator[tuple[int, int, Tensor]]:
    """Join the same rows of all ranks' parameters to whole rows of HF tensors: ``(part, its first row, rows)``.

    Every row comes once. Rows that are cut by columns are put together; all others are views.

    Args:
        shards: some rows of the parameter of every rank, in rank order.
        first: which row of the parameter the first of them is.
    """
    found: dict[tuple[int, int], dict[int, Tensor]] = {}
    last = first + len(shards[0])
    for rank, shard in enumerate(shards):
        for block in RULES[rule].blocks(shapes, TensorShard(cut.architecture, rank, cut.size, cut.padded_vocab)):
            start, stop = max(block.shard_row, first), min(block.shard_row + block.rows, last)
            if start < stop:
                # what every rank holds whole stands at column 0 of the same row each time
                column = 0 if block.columns is None else block.columns.start
                parts = found.setdefault((block.part, block.hf_row + start - block.shard_row), {})
                parts[column] = shard[start - first : stop - first]
    for (part, row), by_column in found.items():
        rows = list(by_column.values())
        yield part, row, rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)


def strips(shape: Sequence[int], itemsize: int) -> Iterator[slice]:
    """Yield the rows of a tensor in runs of bounded size."""
    rows = max(_STRIP_BYTES // max(math.prod(shape[1:]) * itemsize, 1), 1)
    for start in range(0, shape[0], rows):
        yield slice(start, min(start + rows, shape[0]))
