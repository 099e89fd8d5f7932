"""Tile arithmetic of the divergences: pure functions of ``[R, w]`` tiles, which a kernel may replace.

``q`` is the student's softmax, ``p`` the teacher's, ``m = b p + (1 - b) q``. All of these overwrite the tiles they get.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tropd.losses.vocab_parallel.statistics import KlStatistics, Normalizer, Statistics, exponential


@dataclass(frozen=True, slots=True, kw_only=True)
class TileSoftmax:
    """A tile of one model's logits, with the statistics of its tokens over the full vocabulary."""

    logits_Rw: Tensor
    max_R1: Tensor
    sumexp_R1: Tensor

    @staticmethod
    def of(logits_Rw: Tensor, normalizer: Normalizer, rows: slice) -> TileSoftmax:
        """Pair a tile with the numbers of its rows."""
        max_R1, sumexp_R1 = (x_R.unsqueeze(-1) for x_R in normalizer.rows(rows))
        return TileSoftmax(logits_Rw=logits_Rw, max_R1=max_R1, sumexp_R1=sumexp_R1)

    def scaled_(self, scale_R1: Tensor) -> Tensor:
        """Return ``scale * softmax``, in place of the logits."""
        return exponential(self.logits_Rw.sub_(self.max_R1), out=self.logits_Rw).mul_(scale_R1 / self.sumexp_R1)

    def log_(self) -> Tensor:
        """Make log-probabilities, in place of the logits."""
        return self.logits_Rw.sub_(self.max_R1).sub_(self.sumexp_R1.log())


def chunk_kl(a_Rw: Tensor, b_Rw: Tensor, scratch_Rw: Tensor) -> KlStatistics:
    """Take the statistics of one tile (``weighted`` stays 0: no entropies are requested here)."""
    torch.sub(a_Rw, b_Rw, out=scratch_Rw)
    first, second = _exponentiate_(a_Rw), _exponentiate_(b_Rw)
    return KlStatistics(first, second, scratch_Rw.mul_(a_Rw).sum(-1))


def _exponentiate_(logits_Rw: Tensor) -> Statistics:
    max_R = logits_Rw.amax(-1)
    sumexp_R = exponential(logits_Rw.sub_(max_R.unsqueeze(-1)), out=logits_Rw).sum(-1)
    return Statistics(max_R, sumexp_R, torch.zeros_like(sumexp_R))


def chunk_mixture_kl(student: TileSoftmax, teacher: TileSoftmax, *, beta: float) -> Tensor:
    """Take this tile's part of (KL(p||m), KL(q||m)), stacked: ``[2, R]``."""
    logq_Rw, logp_Rw = student.log_(), teacher.log_()
    q_Rw, p_Rw = logq_Rw.exp(), logp_Rw.exp()
    excess_Rw = logq_Rw.sub_(logp_Rw)
    mixture_Rw = _log_mixture(excess_Rw, beta=beta)
    above_p_Rw = excess_Rw.neg().clamp_(max=0.0).sub_(mixture_Rw)  # log p - log m
    above_q_Rw = excess_Rw.clamp_(max=0.0).sub_(mixture_Rw)  # log q - log m
    return torch.stack([p_Rw.mul_(above_p_Rw).sum(-1), q_Rw.mul_(above_q_Rw).sum(-1)])


def _log_mixture(excess_Rw: Tensor, *, beta: float) -> Tensor:
    """Return ``log m - max(log p, log q)`` from ``log q - log p``.

    In terms of the larger of the two nothing overflows, and ``log1p(. expm1)`` is exactly 0 where they are equal.
    """
    weight_Rw = torch.full_like(excess_Rw, 1.0 - beta).masked_fill_(excess_Rw > 0.0, beta)  # of the smaller one in m
    return weight_Rw.mul_(excess_Rw.abs().neg_().expm1_()).log1p_()


# --------------------------------------------------------------------------- d loss / d student logits
# ``grad_R1`` is the gradient of the token's loss. ``center_R1`` is a mean under q over the full vocabulary: of the
# difference of the two models' logits for reverse_kl (whose two logsumexps cancel against the loss's own), and of
# log q - log m, which is KL(q||m), for the jsd.


def _forward_kl_gradient(
    student: TileSoftmax, teacher: TileSoftmax, *, center_R1: Tensor, grad_R1: Tensor, beta: float
) -> Tensor:
    return student.scaled_(grad_R1).sub_(teacher.scaled_(grad_R1))


def _reverse_kl_gradient(
    student: TileSoftmax, teacher: TileSoftmax, *, center_R1: Tensor, grad_R1: Tensor, beta: float
) -> Tensor:
    gap_Rw = torch.sub(student.logits_Rw, teacher.logits_Rw, out=teacher.logits_Rw).sub_(center_R1)
    return student.scaled_(grad_R1).mul_(gap_Rw)


def _jsd_gradient(
    student: TileSoftmax, teacher: TileSoftmax, *, center_R1: Tensor, grad_R1: Tensor, beta: float
) -> Tensor:
    offset_R1 = (student.max_R1 - teacher.max_R1) + (student.sumexp_R1.log() - teacher.sumexp_R1.log())
    excess_Rw = torch.sub(student.logits_Rw, teacher.logits_Rw, out=teacher.logits_Rw).sub_(offset_R1)
    mixture_Rw = _log_mixture(excess_Rw, beta=beta)
    above_q_Rw = excess_Rw.clamp_(max=0.0).sub_(mixture_Rw).sub_(center_R1)
    return student.scaled_((1.0 - beta) * grad_R1).mul_(above_q_Rw)


CHUNK_GRADIENT: Mapping[str, Callable[..., Tensor]] = {
    "forward_kl": _forward_kl_gradient,
    "reverse_kl": _reverse_kl_gradient,
    "jsd": _jsd_gradient,
}
