"""Softmax statistics of logits that arrive in tiles and lie on several ranks; shared by the drivers and both backends.

All exponentials are relative to a running maximum, so nothing overflows and ``log s`` stays small against the maximum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MASKED_LOGIT = -1e30
"""Logit of a column that is not to count: far below every real one, far enough from the lowest number to be scaled."""
_LOG2_E = 1.0 / math.log(2.0)


@dataclass(frozen=True, slots=True)
class Normalizer:
    """The normalizer that makes probabilities of logits l: ``q = exp(l - m) / s`` for each token."""

    max_T: Tensor  # m = max l
    sumexp_T: Tensor  # s = sum exp(l - m)

    def rows(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Return (m, s) of some of the tokens."""
        return self.max_T[rows], self.sumexp_T[rows]


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
        """Make statistics over no column."""
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
        """Return (s, u) of some of the tokens, relative to a maximum at least as large as the own."""
        shift_R, sumexp_R = self.max_T[rows] - max_R, self.sumexp_T[rows]
        scale_R = shift_R.exp()
        return sumexp_R * scale_R, (self.weighted_T[rows] + sumexp_R * shift_R) * scale_R

    def stacked(self) -> Tensor:
        """Return ``[3, T]``, to travel."""
        return torch.stack([self.max_T, self.sumexp_T, self.weighted_T])

    @property
    def normalizer(self) -> Normalizer:
        """Return the part that turns logits into probabilities."""
        return Normalizer(self.max_T, self.sumexp_T)

    @property
    def log_sumexp_T(self) -> Tensor:
        """Return log s, which is to be subtracted from ``l - m`` to make a log-probability."""
        return self.sumexp_T.log()

    @property
    def logsumexp_T(self) -> Tensor:
        """Return log sum exp l, nats."""
        return self.max_T + self.log_sumexp_T

    @property
    def entropy_T(self) -> Tensor:
        """Return -sum q log q, nats."""
        return self.log_sumexp_T - self.weighted_T / self.sumexp_T

    def logprob_(self, logits_TK: Tensor) -> Tensor:
        """Turn logits of some ids into log-probabilities, in place."""
        # subtracting the maximum first keeps the digits that logit - logsumexp would lose
        return logits_TK.sub_(self.max_T.unsqueeze(-1)).sub_(self.log_sumexp_T.unsqueeze(-1))


def merge_ranks(every_n3T: Tensor) -> Statistics:
    """Merge the statistics of all ranks' columns, given each rank's ``stacked()``.

    Merged here in rank order, rather than by a reduction whose order may depend on an element's place in the message:
    so equal logits give equal bits, in whatever function and on whatever rank, and a teacher identical to the student
    gives exactly 0.
    """
    full = Statistics(*every_n3T[0].clone())
    for rank_3T in every_n3T[1:]:
        full.merge_(slice(None), Statistics(*rank_3T))
    return full


def drop_fully_masked(tile: Statistics) -> Statistics:
    """Make the tile's statistics empty for tokens of which every column is masked."""
    nothing_R = tile.max_T <= 0.5 * MASKED_LOGIT
    lowest = torch.finfo(tile.max_T.dtype).min
    return Statistics(
        max_T=tile.max_T.masked_fill(nothing_R, lowest),
        sumexp_T=tile.sumexp_T.masked_fill(nothing_R, 0.0),
        weighted_T=tile.weighted_T.masked_fill(nothing_R, 0.0),
    )


def exponential(x: Tensor, *, out: Tensor) -> Tensor:
    """Return ``exp(x)``; ``out`` may be ``x``.

    On CPUs through powers of 2, within 1e-7 |x| of it: torch takes powers of e from one vendor's library there, which
    was measured to need twice the time of both steps on another vendor's CPU.
    """
    return torch.mul(x, _LOG2_E, out=out).exp2_() if x.device.type == "cpu" else torch.exp(x, out=out)


def chunk_statistics(logits_Rw: Tensor, scratch_Rw: Tensor) -> Statistics:
    """Take the statistics of one tile; overwrite both arguments."""
    max_R = logits_Rw.amax(-1)
    logits_Rw.sub_(max_R.unsqueeze(-1))
    exponential(logits_Rw, out=scratch_Rw)
    sumexp_R = scratch_Rw.sum(-1)
    weighted_R = scratch_Rw.mul_(logits_Rw).sum(-1)
    return Statistics(max_T=max_R, sumexp_T=sumexp_R, weighted_T=weighted_R)


@dataclass(frozen=True, slots=True)
class KlStatistics:
    """The statistics of ``KL(first || second)`` of two models' logits a, b, over some set of columns.

    ``KL = sum softmax(a) (a - b) - logsumexp(a) + logsumexp(b)``: one pass, no log-probabilities. Mutated by merging.
    """

    first: Statistics
    second: Statistics
    gap_T: Tensor  # sum exp(a - max a) (a - b)

    @staticmethod
    def empty(num_tokens: int, *, dtype: torch.dtype, device: torch.device) -> KlStatistics:
        """Make statistics over no column."""
        first, second = (Statistics.empty(num_tokens, dtype=dtype, device=device) for _ in range(2))
        return KlStatistics(first, second, torch.zeros_like(first.sumexp_T))

    def merge_(self, rows: slice, other: KlStatistics) -> None:
        """Include further columns for some of the tokens."""
        old_max_R = self.first.max_T[rows].clone()
        self.first.merge_(rows, other.first)
        self.second.merge_(rows, other.second)
        max_R = self.first.max_T[rows]
        mine_R, theirs_R = (old_max_R - max_R).exp(), (other.first.max_T - max_R).exp()
        self.gap_T[rows] = self.gap_T[rows] * mine_R + other.gap_T * theirs_R

    def stacked(self) -> Tensor:
        """Return ``[7, T]``, to travel."""
        return torch.cat([self.first.stacked(), self.second.stacked(), self.gap_T.unsqueeze(0)])

    @property
    def mean_gap_T(self) -> Tensor:
        """Return the mean of a - b under softmax(a)."""
        return self.gap_T / self.first.sumexp_T

    @property
    def kl_T(self) -> Tensor:
        """Return KL(first || second), nats."""
        offset_T = (self.first.max_T - self.second.max_T) + (self.first.log_sumexp_T - self.second.log_sumexp_T)
        return self.mean_gap_T - offset_T


def merge_kl_ranks(every_n7T: Tensor) -> KlStatistics:
    """Merge over all ranks' columns, given each rank's ``stacked()``; in rank order, as ``merge_ranks``."""
    full, *others = (KlStatistics(Statistics(*x[:3]), Statistics(*x[3:6]), x[6]) for x in every_n7T.clone())
    for other in others:
        full.merge_(slice(None), other)
    return full
