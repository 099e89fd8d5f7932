"""The walk over the logits: this rank's shard of the vocabulary, its tiles, and the memory of one tile.

The logits ``[T, v]`` never exist at once. They are visited in tiles of R tokens by w columns, each made by one matrix
product and dropped before the next. Columns are the outer loop: then a tile row of the weight's gradient is finished
before the next starts and needs no fp32 copy of the full weight, while the hidden states' gradient ``[T, D]``, the
smaller one, is what accumulates.

Additional dimension names: ``R`` tokens of one tile, ``w`` vocabulary columns of one tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from megatron_tropd.errors import ConfigError
from megatron_tropd.parallel.collectives import Group, group_rank, group_size

Tile: TypeAlias = tuple[slice, slice]  # (tokens, local columns)
_GPU_COLUMNS = 128  # a multiple of this keeps the rows of a tile aligned for wide loads


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """The columns of the vocabulary that this rank holds and that are real: global ids [start, start + width)."""

    start: int
    width: int  # 0 when all this rank has is padding


@dataclass(frozen=True, slots=True, kw_only=True)
class TileLimits:
    """Most elements of a tile when chunk_tokens is None, and most tokens in it whatever chunk_tokens is."""

    elements: int
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """A cover of ``[num_tokens, width]`` by tiles of at most ``rows`` x ``columns``."""

    num_tokens: int
    width: int
    rows: int
    columns: int

    def __iter__(self) -> Iterator[Tile]:
        """Yield (tokens, local columns) of every tile; columns are the outer loop."""
        for left in range(0, self.width, self.columns):
            for top in range(0, self.num_tokens, self.rows):
                yield (
                    slice(top, min(top + self.rows, self.num_tokens)),
                    slice(left, min(left + self.columns, self.width)),
                )


def shard_of(weight_vD: Tensor, *, vocab_size: int, group: Group) -> Shard:
    """Find the real columns of ``weight_vD``; padding is what lies at or beyond ``vocab_size``, at a shard's end."""
    per_rank, ranks = weight_vD.shape[0], group_size(group)
    if not 1 <= vocab_size <= per_rank * ranks:
        raise ConfigError(
            f"vocab_size {vocab_size} does not fit {ranks} weight shards of {per_rank} rows = {per_rank * ranks}. "
            "Pass the true vocabulary size, and the output weight padded to at least that."
        )
    start = group_rank(group) * per_rank
    return Shard(start=start, width=min(max(vocab_size - start, 0), per_rank))


def plan_tiles(
    hidden_TD: Tensor, weight_vD: Tensor, shard: Shard, *, chunk_tokens: int | None, limits: TileLimits
) -> Tiles:
    """Plan tiles of at most ``chunk_tokens * v`` elements, or of a size that suits the device and its backend."""
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ConfigError(f"chunk_tokens must be at least 1, got {chunk_tokens}. None picks a size for the device.")
    elements = limits.elements if chunk_tokens is None else chunk_tokens * weight_vD.shape[0]
    rows = max(1, min(hidden_TD.shape[0], limits.rows, elements))
    columns = max(1, min(shard.width, elements // rows))
    if hidden_TD.device.type != "cpu" and _GPU_COLUMNS <= columns < shard.width:
        columns -= columns % _GPU_COLUMNS
    return Tiles(num_tokens=hidden_TD.shape[0], width=shard.width, rows=rows, columns=columns)


class TileBuffer:
    """Memory for one tile, shaped anew for each: allocating per tile costs page faults on a CPU. Taken when needed."""

    def __init__(self, tiles: Tiles, *, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self._device, self._size = dtype, device, tiles.rows * tiles.columns
        self._flat: Tensor | None = None

    def shaped(self, tile: Tile) -> Tensor:
        """Return an uninitialized ``[R, w]`` tensor, the same memory every time."""
        if self._flat is None:
            self._flat = torch.empty(self._size, dtype=self.dtype, device=self._device)
        height, width = (part.stop - part.start for part in tile)
        return self._flat[: height * width].view(height, width)
