"""Softmax statistics of logits that arrive in tiles and lie on several ranks, and the gradient they imply.

``chunk_statistics`` and ``chunk_gradient`` are the two hot loops: functions of one tile, which a kernel may replace.
All exponentials are relative to a running maximum, so nothing overflows and ``log s`` stays small beside the maximum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tropd.errors import DataError

_LOG2_E = 1.0 / math.log(2.0)


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of the logits l of each token over some set of columns. Mutated in place while tiles are merged in.

    ``empty`` is the neutral element: its maximum is the lowest finite number, since -inf would make nan of 0 * inf.
    """

    max_T: Tensor  # m = max l
    sumexp_T: Tensor  # s = sum exp(l - m)
    weighted_T: Tensor  # u = sum exp(l - m) (l - m), <= 0

    @staticmethod
    def empty(num_tokens: int, *, dtype: torch.dtype, device: torch.device) -> Statistics:
        """Statistics over no column."""
        zeros = torch.zeros(2, num_tokens, dtype=dtype, device=device)
        lowest_T = torch.full((num_tokens,), torch.finfo(dtype).min, dtype=dtype, device=device)
        return Statistics(max_T=lowest_T, sumexp_T=zeros[0], weighted_T=zeros[1])

    def merge_(self, rows: slice, other: Statistics) -> None:
        """Include the statistics of further columns for some of the tokens."""
        max_R = torch.maximum(self.max_T[rows], other.max_T)
        mine, theirs = self._relative_to(max_R, rows), other._relative_to(max_R)
        self.max_T[rows] = max_R
        self.sumexp_T[rows] = mine[0] + theirs[0]
        self.weighted_T[rows] = mine[1] + theirs[1]

    def _relative_to(self, max_R: Tensor, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """(s, u) of some of the tokens, relative to a maximum at least as large as the own."""
        shift_R, sumexp_R = self.max_T[rows] - max_R, self.sumexp_T[rows]
        scale_R = shift_R.exp()
        return sumexp_R * scale_R, (self.weighted_T[rows] + sumexp_R * shift_R) * scale_R

    def stacked(self) -> Tensor:
        """``[3, T]``, to travel."""
        return torch.stack([self.max_T, self.sumexp_T, self.weighted_T])

    @property
    def log_sumexp_T(self) -> Tensor:
        """log s: what is to be subtracted from ``l - m`` to make a log-probability."""
        return self.sumexp_T.log()

    @property
    def logsumexp_T(self) -> Tensor:
        """log sum exp l, nats."""
        return self.max_T + self.log_sumexp_T

    @property
    def entropy_T(self) -> Tensor:
        """-sum q log q, nats."""
        return self.log_sumexp_T - self.weighted_T / self.sumexp_T

    def logprob_(self, logits_TK: Tensor) -> Tensor:
        """Logits of some ids to log-probabilities, in place."""
        # subtracting the maximum first keeps the digits that logit - logsumexp would lose
        return logits_TK.sub_(self.max_T.unsqueeze(-1)).sub_(self.log_sumexp_T.unsqueeze(-1))


def merge_ranks(every_n3T: Tensor) -> Statistics:
    """Statistics over all ranks' columns, given each rank's ``stacked()``.

    Merged here in rank order, rather than by a reduction whose order may depend on an element's place in the message:
    so equal logits give equal bits, in whatever function and on whatever rank, and a teacher identical to the student
    gives exactly 0.
    """
    whole = Statistics(*every_n3T[0].clone())
    for rank_3T in every_n3T[1:]:
        whole.merge_(slice(None), Statistics(*rank_3T))
    return whole


def exponential(x: Tensor, *, out: Tensor) -> Tensor:
    """``exp(x)``; ``out`` may be ``x``.

    On CPUs through powers of 2, within 1e-7 |x| of it: torch takes powers of e from one vendor's library there, which
    was measured to need twice the time of both steps on another vendor's CPU.
    """
    return torch.mul(x, _LOG2_E, out=out).exp2_() if x.device.type == "cpu" else torch.exp(x, out=out)


def chunk_statistics(logits_Rw: Tensor, scratch_Rw: Tensor) -> Statistics:
    """Statistics of one tile; overwrites both arguments."""
    max_R = logits_Rw.amax(-1)
    logits_Rw.sub_(max_R.unsqueeze(-1))
    exponential(logits_Rw, out=scratch_Rw)
    sumexp_R = scratch_Rw.sum(-1)
    weighted_R = scratch_Rw.mul_(logits_Rw).sum(-1)
    return Statistics(max_T=max_R, sumexp_T=sumexp_R, weighted_T=weighted_R)


def chunk_gradient(
    logits_Rw: Tensor,
    scratch_Rw: Tensor,
    *,
    max_R: Tensor,
    sumexp_R: Tensor,
    constant_R: Tensor,
    slope_R: Tensor | None,
) -> Tensor:
    """``q (constant + slope log q)`` with ``q = exp(logits - max) / sumexp``, in place of the logits.

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
        """``first_id`` is the global id of the tile's column 0."""
        true_RK = ids_RK - first_id
        column_RK = true_RK.clamp(0, width - 1)
        return Picks(column_RK=column_RK, inside_RK=column_RK == true_RK)

    def read_into(self, picked_RK: Tensor, logits_Rw: Tensor) -> None:
        """Put the logits of the ids inside the tile where they belong; leave the others."""
        torch.where(self.inside_RK, logits_Rw.gather(1, self.column_RK), picked_RK, out=picked_RK)

    def hide(self, logits_Rw: Tensor, counts_RK: Tensor, *, hidden: float) -> None:
        """Lower the columns of the ids to ``hidden``; each id must count once, further mentions not at all."""
        # added, not assigned, like every write at an end column; a sum with so low a number is that number
        lowered_RK = torch.where(self.inside_RK & counts_RK, hidden, 0.0).to(logits_Rw.dtype)
        logits_Rw.scatter_add_(1, self.column_RK, lowered_RK)

    def add_to(self, dlogits_Rw: Tensor, grad_RK: Tensor) -> None:
        """Add each id's gradient at its column; duplicates add up."""
        dlogits_Rw.scatter_add_(1, self.column_RK, grad_RK * self.inside_RK)


def check_ids(ids_TK: Tensor, *, num_tokens: int, vocab_size: int) -> Tensor | None:
    """Refuse bad ids on a CPU; on an accelerator say, without waiting, which are good."""
    if ids_TK.dim() != 2 or ids_TK.shape[0] != num_tokens or ids_TK.dtype not in (torch.int64, torch.int32):
        raise DataError(
            f"ids must be int64 [{num_tokens}, K], got {ids_TK.dtype} {list(ids_TK.shape)}: one row per hidden state."
        )
    if ids_TK.device.type != "cpu":
        return (ids_TK >= 0) & (ids_TK < vocab_size)
    lowest, highest = (int(id_) for id_ in ids_TK.aminmax()) if ids_TK.numel() else (0, 0)
    if lowest < 0 or highest >= vocab_size:
        raise DataError(
            f"token id {lowest if lowest < 0 else highest} is outside the vocabulary [0, {vocab_size}). "
            "Mask the position or map the id before scoring it."
        )
    return None
