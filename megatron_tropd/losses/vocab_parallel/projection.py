"""Matrix products of the losses: logits from hidden states and weight, and both gradients from d loss / d logits.

Every product of low-precision factors has an **fp32 result**, logits and gradients alike: a bf16 result would put 1e-2
nats of noise on a log-probability, as much as a trained student's whole divergence. A GPU's matrix units add in fp32
anyway and leave it so on request (``out_dtype``); torch has no such product on a CPU, where the factors of one tile at
a time are widened instead. fp32 and fp64 inputs are multiplied as they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_tropd.losses.vocab_parallel.tiles import Tile, TileBuffer, Tiles


def statistics_dtype(hidden_TD: Tensor) -> torch.dtype:
    """Return fp32, or fp64 for fp64 inputs: the dtype of logits, statistics and sums."""
    return torch.promote_types(hidden_TD.dtype, torch.float32)


def factor_dtype(hidden_TD: Tensor) -> torch.dtype:
    """Return the dtype in which factors enter the products."""
    return statistics_dtype(hidden_TD) if hidden_TD.device.type == "cpu" else hidden_TD.dtype


def multiply(left: Tensor, right: Tensor, *, out: Tensor) -> Tensor:
    """Write ``left @ right`` to ``out``, which may be wider than the factors."""
    if out.dtype == left.dtype:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=out.dtype, out=out)


def accumulate(total: Tensor, left: Tensor, right: Tensor, *, scale: float) -> None:
    """Add ``scale * left @ right`` to a total that may be wider than the factors."""
    if total.dtype == left.dtype:
        total.addmm_(left, right, alpha=scale)
    else:  # the product's own fp32 accumulator continues from the total
        torch.addmm(total, left, right, out_dtype=total.dtype, alpha=scale, out=total)


class Factors:
    """Rows of hidden states and of the weight as the products take them: views, or widened copies of one at a time."""

    def __init__(self, hidden_TD: Tensor, weight_vD: Tensor) -> None:
        self.matrices = (hidden_TD, weight_vD)
        self.dtype = factor_dtype(hidden_TD)
        self.product_dtype, self.device = statistics_dtype(hidden_TD), hidden_TD.device
        self._held: list[tuple[slice, Tensor] | None] = [None, None]

    def hidden(self, rows: slice) -> Tensor:
        """Return ``[R, D]`` hidden states, valid until other rows are requested."""
        return self._part(0, rows)

    def weight(self, columns: slice) -> Tensor:
        """Return ``[w, D]`` rows of the weight, valid until others are requested."""
        return self._part(1, columns)

    def _part(self, which: int, part: slice) -> Tensor:
        matrix = self.matrices[which]
        if matrix.dtype == self.dtype:
            return matrix[part]
        held = self._held[which]
        if held is None or held[0] != part:
            wide = None if held is None else held[1]
            shape = (part.stop - part.start, matrix.shape[1])
            if wide is None or len(wide) < shape[0]:
                wide = torch.empty(shape, dtype=self.dtype, device=matrix.device)
            wide[: shape[0]].copy_(matrix[part])
            held = self._held[which] = (part, wide)
        return held[1][: part.stop - part.start]


class Projection:
    """Make tiles of ``hidden @ weight.T``, in one buffer that every tile overwrites; cache some of them if it may.

    Cached tiles are the first ones, as many as ``cache_bytes`` hold, in fp32 as they are computed: a later pass, the
    backward's too, then reads the very bits that it would compute.
    """

    def __init__(
        self,
        factors: Factors,
        *,
        tiles: Tiles,
        temperature: float,
        cache_bytes: int = 0,
        cached_tiles: Sequence[Tensor] = (),
        replaced: Sequence[tuple[int, Tensor]] = (),
    ) -> None:
        """Prepare the tiles.

        Args:
            cached_tiles: those that another projection of the same tensors cached, in their order.
            replaced: columns of this shard, and the ``[T]`` products that stand for theirs.
        """
        self._replaced = replaced
        self._factors, self._left = factors, cache_bytes
        self.tiles, self.dtype, self.device = tiles, factors.product_dtype, factors.device
        self.scale = 1.0 / temperature  # of the logits, still to be applied to a product
        self._cache = dict(zip((_place(tile) for tile in tiles), cached_tiles, strict=False))
        self._buffer = self.buffer()
        self._scratch = self._buffer if factors.dtype == self.dtype else self.buffer(factors.dtype)

    @property
    def cached_tiles(self) -> list[Tensor]:
        """Return the tiles held, in the order of ``Tiles``."""
        return list(self._cache.values())

    def product(self, tile: Tile) -> Tensor:
        """Return the tile's product ``[R, w]`` in fp32 (fp64 for fp64 inputs), valid until the next call.

        It is to be read only. (Masking listed columns is no offence: their gradient does not look at the logits.)
        """
        place = _place(tile)
        if place in self._cache:
            return self._cache[place]
        product_Rw = self._buffer.shaped(tile)
        size = product_Rw.numel() * product_Rw.element_size()
        if size <= self._left:
            product_Rw = torch.empty_like(product_Rw)
            self._cache[place], self._left = product_Rw, self._left - size
        else:
            self._left = 0  # the first ones are cached, not whichever fit
        rows, columns = tile
        multiply(self._factors.hidden(rows), self._factors.weight(columns).t(), out=product_Rw)
        for column, product_T in self._replaced:
            if columns.start <= column < columns.stop:
                product_Rw[:, column - columns.start] = product_T[rows]
        return product_Rw

    def logits(self, tile: Tile) -> Tensor:
        """Return the tile's logits ``[R, w]`` in the product's dtype, valid until the next call; free to overwrite."""
        product_Rw, logits_Rw = self.product(tile), self._buffer.shaped(tile)
        if product_Rw.data_ptr() != logits_Rw.data_ptr():
            logits_Rw.copy_(product_Rw)
        # not inside the product, where the factor may be applied before the sum: equal products must stay equal logits
        return logits_Rw if self.scale == 1.0 else logits_Rw.mul_(self.scale)

    def buffer(self, dtype: torch.dtype | None = None) -> TileBuffer:
        """Provide further memory of a tile's size, in the product's dtype unless another is named."""
        return TileBuffer(self.tiles, dtype=dtype or self.dtype, device=self.device)

    def scratch_tile(self, tile: Tile) -> Tensor:
        """Provide ``[R, w]`` for a result in the dtype of the factors; the product itself where that can be used."""
        return self._scratch.shaped(tile)


def _place(tile: Tile) -> tuple[int, int]:
    return tile[0].start, tile[1].start


class ProjectionGradient:
    """Turn tiles of d loss / d logits into the gradients of hidden states and weight, summed in fp32.

    The hidden states' gradient is the part that comes from this shard's columns. Padding rows of the weight get 0.
    """

    def __init__(
        self,
        factors: Factors,
        *,
        tiles: Tiles,
        temperature: float,
        needs_hidden: bool,
        needs_weight: bool,
    ) -> None:
        self._factors, self._scale, self._num_tokens = factors, 1.0 / temperature, tiles.num_tokens
        hidden_TD, weight_vD = factors.matrices
        self._grad_hidden_TD = torch.zeros_like(hidden_TD, dtype=factors.product_dtype) if needs_hidden else None
        self._grad_weight_vD = torch.empty_like(weight_vD) if needs_weight else None
        if self._grad_weight_vD is not None:
            self._grad_weight_vD[tiles.width if self._num_tokens else 0 :].zero_()
        self._narrow = TileBuffer(tiles, dtype=factors.dtype, device=factors.device)
        # one product of all tokens rounds once by itself; several are summed in fp32, and rounded at the end
        at_once = tiles.rows >= self._num_tokens and factors.dtype == weight_vD.dtype
        in_fp32 = needs_weight and weight_vD.dtype != factors.product_dtype and not at_once
        shape = (tiles.columns, weight_vD.shape[1])
        self._sum_wD = weight_vD.new_empty(shape, dtype=factors.product_dtype) if in_fp32 else None

    def add(self, tile: Tile, dlogits_Rw: Tensor) -> None:
        """Add one tile, in fp32 or in the dtype of the factors; tiles come in the order of ``Tiles``."""
        rows, columns = tile
        if dlogits_Rw.dtype != self._narrow.dtype:
            dlogits_Rw = self._narrow.shaped(tile).copy_(dlogits_Rw)
        if self._grad_hidden_TD is not None:
            accumulate(self._grad_hidden_TD[rows], dlogits_Rw, self._factors.weight(columns), scale=self._scale)
        if self._grad_weight_vD is not None:
            self._add_weight(self._grad_weight_vD[columns], dlogits_Rw.t(), rows)

    def _add_weight(self, grad_wD: Tensor, dlogits_wR: Tensor, rows: slice) -> None:
        hidden_RD, first = self._factors.hidden(rows), rows.start == 0
        sum_wD = grad_wD if self._sum_wD is None else self._sum_wD[: grad_wD.shape[0]]
        if sum_wD.dtype == hidden_RD.dtype:
            # beta=0: what the memory held, nan included, does not count
            torch.addmm(sum_wD, dlogits_wR, hidden_RD, beta=0.0 if first else 1.0, alpha=self._scale, out=sum_wD)
        else:
            if first:
                sum_wD.zero_()
            accumulate(sum_wD, dlogits_wR, hidden_RD, scale=self._scale)
        if self._sum_wD is not None and rows.stop == self._num_tokens:
            grad_wD.copy_(sum_wD)

    def result(self) -> tuple[Tensor | None, Tensor | None]:
        """Return (hidden, weight) gradients in the dtypes of the inputs; None where not requested."""
        grad_TD = self._grad_hidden_TD
        return None if grad_TD is None else grad_TD.to(self._factors.matrices[0].dtype), self._grad_weight_vD


_WIDENED_ROWS = 4096  # of the weight at a time, where it must be widened


@torch.no_grad()
def project(hidden_BD: Tensor, weight_vD: Tensor) -> Tensor:
    """Return the logits ``[B, v]`` of a few tokens at once, fp32 (fp64 for fp64 inputs), without gradient."""
    factors, (tokens, width) = Factors(hidden_BD, weight_vD), (len(hidden_BD), len(weight_vD))
    logits_Bv = hidden_BD.new_empty((tokens, width), dtype=factors.product_dtype)
    at_once = factors.dtype == hidden_BD.dtype
    tiles = Tiles(num_tokens=tokens, width=width, rows=tokens, columns=width if at_once else _WIDENED_ROWS)
    for rows, columns in tiles:
        multiply(factors.hidden(rows), factors.weight(columns).t(), out=logits_Bv[rows, columns])
    return logits_Bv
