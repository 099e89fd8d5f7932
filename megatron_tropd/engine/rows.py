"""Rows of a pack: tokens with equal histories are computed once, and whoever wants a token's indexes its row.

Nothing is written back: a prediction reads its row, several may read one, and autograd adds up what they say. A row
copied to its tokens and written back from each of them would have its gradient as many times.

Additional dimension names: ``R`` rows of a pack, ``r`` rows that this context rank computes, in order.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_tropd.types import Int64Array, Pack

# Below this part of its tokens, what a pack shares is not worth attending along paths: it is computed token by token.
_WORTH = 32


def is_forest(pack: Pack) -> bool:
    """Say whether rows, not tokens, of the pack are computed."""
    return pack.row_T is not None and _WORTH * (len(pack.token_T) - pack.num_rows) >= len(pack.token_T)


def computed_rows(pack: Pack) -> int:
    """Count the rows, padding included, that a model computes for the pack."""
    return pack.num_rows if is_forest(pack) else len(pack.token_T)


def row_of(pack: Pack) -> Int64Array:
    """Return ``[T]`` the row that computes each token; -1 for padding that needs none."""
    if not is_forest(pack):
        return np.arange(len(pack.token_T))
    assert pack.row_T is not None
    return pack.row_T


def row_inputs(pack: Pack) -> tuple[Int64Array, Int64Array]:
    """Return ``[R]`` id and position of every row: those of the first token that it computes, or padding's."""
    if not is_forest(pack):
        return pack.token_T, pack.position_T
    _, first = np.unique(row_of(pack), return_index=True)
    first = first[int(row_of(pack).min()) == -1 :]
    padding = np.arange(pack.num_rows - len(first))
    return (
        np.concatenate([pack.token_T[first], np.zeros_like(padding)]),
        np.concatenate([pack.position_T[first], padding]),
    )


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Take rows of ``x`` ``[R, ...]``, each as often as it is named. Gradients add up in fp32 at least."""
    if x.dtype in (torch.float32, torch.float64) or not x.requires_grad:
        return x.index_select(0, index)
    gathered: Tensor = _Gather.apply(x, index)
    return gathered


class _Gather(torch.autograd.Function):
    """Gather in half precision: of many small gradients of one row, a sum in bf16 would lose most."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(x)  # type: ignore[attr-defined]
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors  # type: ignore[attr-defined]
        total = gradient.new_zeros(ctx.rows, *gradient.shape[1:], dtype=torch.float32)  # type: ignore[attr-defined]
        return total.index_add_(0, index, gradient.float()).to(gradient.dtype), None
