"""How the vocabulary-parallel losses walk the logits: shard, tiles, products, gradients. Nothing communicates here.

The logits ``[T, v]`` are never whole. They are visited in tiles of R tokens by w columns, each made by one matrix
product and dropped before the next. Columns are the outer loop: then a tile row of the weight's gradient is finished
before the next begins and needs no fp32 copy of the whole weight, while the hidden states' gradient ``[T, D]``, the
smaller one, is what accumulates.

Additional dimension names: ``R`` tokens of one tile, ``w`` vocabulary columns of one tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tropd.errors import ConfigError
from megatron_tropd.parallel.collectives import Group, group_rank, group_size

# Elements of one tile when chunk_tokens is None, and most tokens in a tile. On a CPU a tile and its weights stay in the
# cache, where the passes over it are free next to the product; a GPU wants few, large launches.
_CPU_TILE, _CPU_ROWS = 2**21, 1024
# several threads pay for each parallel region they enter, so they get fewer and larger ones
_CPU_THREADS_TILE, _CPU_THREADS_ROWS = 2**22, 2048
_GPU_TILE, _GPU_ROWS = 2**26, 2**14
# kernels need no wider copies of a tile. Wide tiles, since each adds to the whole hidden gradient, of all tokens where
# possible, since then a slice of the weight's gradient is one product; 256 MiB in bfloat16
_KERNEL_TILE, _KERNEL_ROWS = 2**27, 2**15
_GPU_COLUMNS = 128  # a multiple of this keeps the rows of a tile aligned for wide loads


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """The columns of the vocabulary that this rank holds and that are real: global ids [start, start + width)."""

    start: int
    width: int  # 0 when all this rank has is padding


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """A cover of ``[num_tokens, width]`` by tiles of at most ``rows`` x ``columns``."""

    num_tokens: int
    width: int
    rows: int
    columns: int

    def __iter__(self) -> Iterator[tuple[slice, slice]]:
        """(tokens, local columns) of every tile; columns are the outer loop."""
        for left in range(0, self.width, self.columns):
            for top in range(0, self.num_tokens, self.rows):
                yield (
                    slice(top, min(top + self.rows, self.num_tokens)),
                    slice(left, min(left + self.columns, self.width)),
                )


def shard_of(weight_vD: Tensor, *, vocab_size: int, group: Group) -> Shard:
    """The real columns of ``weight_vD``; padding is what lies at or beyond ``vocab_size``, always at a shard's end."""
    per_rank, ranks = weight_vD.shape[0], group_size(group)
    if not 1 <= vocab_size <= per_rank * ranks:
        raise ConfigError(
            f"vocab_size {vocab_size} does not fit {ranks} weight shards of {per_rank} rows = {per_rank * ranks}. "
            "Pass the true vocabulary size, and the output weight padded to at least that."
        )
    start = group_rank(group) * per_rank
    return Shard(start=start, width=min(max(vocab_size - start, 0), per_rank))


def plan_tiles(
    hidden_TD: Tensor, weight_vD: Tensor, shard: Shard, *, chunk_tokens: int | None, by_kernels: bool = False
) -> Tiles:
    """Tiles of at most ``chunk_tokens * v`` elements, or of a size that suits the device and who works on them."""
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ConfigError(f"chunk_tokens must be at least 1, got {chunk_tokens}. None picks a size for the device.")
    elements, most_rows = _tile_limits(hidden_TD.device, by_kernels)
    if chunk_tokens is not None:
        elements = chunk_tokens * weight_vD.shape[0]
    rows = max(1, min(hidden_TD.shape[0], most_rows, elements))
    columns = max(1, min(shard.width, elements // rows))
    if hidden_TD.device.type != "cpu" and _GPU_COLUMNS <= columns < shard.width:
        columns -= columns % _GPU_COLUMNS
    return Tiles(num_tokens=hidden_TD.shape[0], width=shard.width, rows=rows, columns=columns)


def _tile_limits(device: torch.device, by_kernels: bool) -> tuple[int, int]:
    if device.type != "cpu":
        return (_KERNEL_TILE, _KERNEL_ROWS) if by_kernels else (_GPU_TILE, _GPU_ROWS)
    if torch.get_num_threads() > 1:
        return _CPU_THREADS_TILE, _CPU_THREADS_ROWS
    return _CPU_TILE, _CPU_ROWS


def check_projection(hidden_TD: Tensor, weight_vD: Tensor, *, who: str = "") -> None:
    """ConfigError unless the two can be multiplied."""
    if hidden_TD.dim() != 2 or weight_vD.dim() != 2 or hidden_TD.shape[1] != weight_vD.shape[1]:
        raise ConfigError(
            f"{who}hidden {list(hidden_TD.shape)} and {who}weight {list(weight_vD.shape)} must be "
            "[tokens, hidden size] and [vocabulary shard, hidden size] with one hidden size."
        )
    if hidden_TD.dtype != weight_vD.dtype or not hidden_TD.is_floating_point():
        raise ConfigError(
            f"{who}hidden is {hidden_TD.dtype} and {who}weight is {weight_vD.dtype}: cast both to one float dtype."
        )


def check_temperature(temperature: float) -> None:
    """ConfigError unless logits can be divided by it."""
    if not (temperature > 0.0 and math.isfinite(temperature)):
        raise ConfigError(f"temperature must be positive and finite, got {temperature}.")


def statistics_dtype(hidden_TD: Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(hidden_TD.dtype, torch.float32)


class Projection:
    """Makes tiles of ``hidden @ weight.T``, in one buffer that every tile overwrites; keeps some of them if it may.

    Kept tiles are the first ones, as many as ``cache_bytes`` hold, in the dtype of the product: a later pass, the
    backward's too, then reads the very bits that it would compute.
    """

    def __init__(
        self,
        hidden_TD: Tensor,
        weight_vD: Tensor,
        *,
        tiles: Tiles,
        temperature: float,
        cache_bytes: int = 0,
        kept: Sequence[Tensor] = (),
    ) -> None:
        """``kept``: the tiles that another projection of the same tensors kept, in their order."""
        self._hidden_TD, self._weight_vD = hidden_TD, weight_vD
        self.scale = 1.0 / temperature  # of the logits, still to be applied to a product
        self._left = cache_bytes
        self._kept = dict(zip(((rows.start, columns.start) for rows, columns in tiles), kept, strict=False))
        self._tiles = tiles
        self._wide = Buffer(tiles, dtype=statistics_dtype(hidden_TD), device=hidden_TD.device)
        # low-precision products leave the matrix units in the input dtype and are widened from there
        self._narrow = (
            self._wide
            if hidden_TD.dtype == self._wide.dtype
            else Buffer(tiles, dtype=hidden_TD.dtype, device=hidden_TD.device)
        )

    @property
    def kept(self) -> list[Tensor]:
        """The tiles held, in the order of ``Tiles``."""
        return list(self._kept.values())

    def product(self, rows: slice, columns: slice) -> Tensor:
        """The tile's product ``[R, w]`` in the inputs' dtype, valid until the next call; to be read only.

        (Hiding listed columns is no offence: their gradient does not look at the logits.)
        """
        place = (rows.start, columns.start)
        if place in self._kept:
            return self._kept[place]
        hidden_RD, weight_wD = self._hidden_TD[rows], self._weight_vD[columns]
        product_Rw = self._narrow.tile(rows, columns)
        size = product_Rw.numel() * product_Rw.element_size()
        if size <= self._left:
            product_Rw = torch.empty_like(product_Rw)
            self._kept[place], self._left = product_Rw, self._left - size
        else:
            self._left = 0  # the first ones are kept, not whichever fit
        # beta=0: what the buffer held, nan included, does not count
        return torch.addmm(product_Rw, hidden_RD, weight_wD.t(), beta=0.0, out=product_Rw)

    def logits(self, rows: slice, columns: slice) -> Tensor:
        """The tile's logits ``[R, w]``, fp32 (fp64 for fp64 inputs), valid until the next call; free to overwrite."""
        product_Rw = self.product(rows, columns)
        wide_Rw = self._wide.tile(rows, columns)
        if product_Rw.data_ptr() != wide_Rw.data_ptr():
            wide_Rw.copy_(product_Rw)
        # not inside the product, where the factor may be applied before the sum: equal products must stay equal logits
        return wide_Rw if self.scale == 1.0 else wide_Rw.mul_(self.scale)

    def buffer(self) -> Buffer:
        """Further memory of the kind that ``logits`` returns."""
        return Buffer(self._tiles, dtype=self._wide.dtype, device=self._hidden_TD.device)

    def room(self, rows: slice, columns: slice) -> Tensor:
        """Where a result of the tile's size and the inputs' dtype may go; the product itself unless that is kept."""
        return self._narrow.tile(rows, columns)


class Buffer:
    """Memory for one tile, shaped anew for each: allocating per tile costs page faults on a CPU. Taken when needed."""

    def __init__(self, tiles: Tiles, *, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self._device, self._size = dtype, device, tiles.rows * tiles.columns
        self._flat: Tensor | None = None

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """An uninitialised ``[R, w]`` tensor."""
        if self._flat is None:
            self._flat = torch.empty(self._size, dtype=self.dtype, device=self._device)
        height, width = rows.stop - rows.start, columns.stop - columns.start
        return self._flat[: height * width].view(height, width)


class ProjectionGradient:
    """Turns tiles of d loss / d logits into the gradients of hidden states and weight, summed in fp32.

    The hidden states' gradient is the part that comes from this shard's columns. Padding rows of the weight get 0.
    """

    def __init__(
        self,
        hidden_TD: Tensor,
        weight_vD: Tensor,
        *,
        tiles: Tiles,
        temperature: float,
        needs_hidden: bool,
        needs_weight: bool,
    ) -> None:
        self._hidden_TD, self._weight_vD, self._scale = hidden_TD, weight_vD, 1.0 / temperature
        self._num_tokens, dtype, device = hidden_TD.shape[0], statistics_dtype(hidden_TD), hidden_TD.device
        self._wide = hidden_TD.dtype == dtype
        self._grad_hidden_TD = torch.zeros_like(hidden_TD, dtype=dtype) if needs_hidden else None
        self._grad_weight_vD = torch.empty_like(weight_vD) if needs_weight else None
        if self._grad_weight_vD is not None:
            self._grad_weight_vD[tiles.width if self._num_tokens else 0 :].zero_()
        self._narrow = None if self._wide else Buffer(tiles, dtype=hidden_TD.dtype, device=device)
        in_fp32 = needs_weight and not self._wide and tiles.rows < self._num_tokens
        self._sum_wD = weight_vD.new_empty((tiles.columns, weight_vD.shape[1]), dtype=dtype) if in_fp32 else None

    def add(self, rows: slice, columns: slice, dlogits_Rw: Tensor) -> None:
        """Add one tile, wide or in the inputs' dtype; tiles come in the order of ``Tiles``."""
        if self._narrow is not None and dlogits_Rw.dtype != self._narrow.dtype:
            dlogits_Rw = self._narrow.tile(rows, columns).copy_(dlogits_Rw)
        if self._grad_hidden_TD is not None:
            _accumulate(self._grad_hidden_TD[rows], dlogits_Rw, self._weight_vD[columns], scale=self._scale)
        if self._grad_weight_vD is not None:
            self._add_weight(self._grad_weight_vD[columns], dlogits_Rw.t(), rows)

    def _add_weight(self, grad_wD: Tensor, dlogits_wR: Tensor, rows: slice) -> None:
        hidden_RD, first = self._hidden_TD[rows], rows.start == 0
        if self._sum_wD is None:
            beta = 0.0 if first else 1.0
            torch.addmm(grad_wD, dlogits_wR, hidden_RD, beta=beta, alpha=self._scale, out=grad_wD)
            return
        sum_wD = self._sum_wD[: grad_wD.shape[0]]
        if first:
            sum_wD.zero_()
        _accumulate(sum_wD, dlogits_wR, hidden_RD, scale=self._scale)
        if rows.stop == self._num_tokens:
            grad_wD.copy_(sum_wD)

    def result(self) -> tuple[Tensor | None, Tensor | None]:
        """(hidden, weight) gradients in the dtypes of the inputs; None where not asked for."""
        grad_TD = self._grad_hidden_TD
        return None if grad_TD is None else grad_TD.to(self._hidden_TD.dtype), self._grad_weight_vD


def _accumulate(total: Tensor, left: Tensor, right: Tensor, *, scale: float) -> None:
    """``total += scale * left @ right`` where total may be wider than the factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=scale)
    elif total.is_cuda:  # the product's own fp32 accumulator goes on from the total
        torch.addmm(total, left, right, out_dtype=total.dtype, alpha=scale, out=total)
    else:
        total.add_(left @ right, alpha=scale)
