"""Tile arithmetic of the softmax: pure functions of ``[R, w]`` tiles, which a kernel may replace."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tropd.losses.vocab_parallel.statistics import MASKED_LOGIT, exponential


def chunk_gradient(
    logits_Rw: Tensor,
    scratch_Rw: Tensor,
    *,
    max_R: Tensor,
    sumexp_R: Tensor,
    constant_R: Tensor,
    slope_R: Tensor | None,
) -> Tensor:
    """Return ``q (constant + slope log q)`` with ``q = exp(logits - max) / sumexp``, in place of the logits.

    Every gradient of softmax statistics with respect to the logits has this form, up to the picked entries.
    """
    logits_Rw.sub_(max_R.unsqueeze(-1))
    if slope_R is None:
        return exponential(logits_Rw, out=logits_Rw).mul_((constant_R / sumexp_R).unsqueeze(-1))
    exponential(logits_Rw, out=scratch_Rw)
    log_sumexp_R = sumexp_R.log()
    logits_Rw.mul_((slope_R / sumexp_R).unsqueeze(-1))
    logits_Rw.add_(((constant_R - slope_R * log_sumexp_R) / sumexp_R).unsqueeze(-1))
    return logits_Rw.mul_(scratch_Rw)


@dataclass(frozen=True, slots=True, kw_only=True)
class Picks:
    """Given ids per token, seen from a tile. Each id lies in exactly one tile of one rank.

    An id outside a tile points at one of the tile's end columns and carries 0: it must be *added* there, never
    assigned, or it would wipe out an id that truly is that column.
    """

    column_RK: Tensor  # within the tile
    inside_RK: Tensor  # bool

    @staticmethod
    def of(ids_RK: Tensor, *, first_id: int, width: int) -> Picks:
        """Locate the ids; ``first_id`` is the global id of the tile's column 0."""
        true_RK = ids_RK - first_id
        column_RK = true_RK.clamp(0, width - 1)
        return Picks(column_RK=column_RK, inside_RK=column_RK == true_RK)

    def read_into(self, picked_RK: Tensor, logits_Rw: Tensor) -> None:
        """Put the logits of the ids inside the tile where they belong; leave the others."""
        torch.where(self.inside_RK, logits_Rw.gather(1, self.column_RK), picked_RK, out=picked_RK)

    def mask_columns(self, logits_Rw: Tensor, is_first_RK: Tensor) -> None:
        """Lower the columns of the ids to MASKED_LOGIT, each once: at its first mention."""
        # added, not assigned, like every write at an end column; a sum with so low a number is that number
        lowered_RK = torch.where(self.inside_RK & is_first_RK, MASKED_LOGIT, 0.0).to(logits_Rw.dtype)
        logits_Rw.scatter_add_(1, self.column_RK, lowered_RK)

    def add_to(self, dlogits_Rw: Tensor, grad_RK: Tensor) -> None:
        """Add each id's gradient at its column; duplicates add up."""
        dlogits_Rw.scatter_add_(1, self.column_RK, grad_RK * self.inside_RK)
