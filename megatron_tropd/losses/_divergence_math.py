"""Tile arithmetic of the divergences: pure functions of ``[R, w]`` tiles, which a kernel may replace.

``q`` is the student's softmax, ``p`` the teacher's, ``m = b p + (1 - b) q``. All of these overwrite the tiles they get.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tropd.losses._statistics import Statistics


@dataclass(frozen=True, slots=True, kw_only=True)
class TileSoftmax:
    """A tile of logits minus the token's maximum, and the token's sum of exponentials over the whole vocabulary."""

    shifted_Rw: Tensor
    sumexp_R1: Tensor

    @staticmethod
    def of(logits_Rw: Tensor, max_R1: Tensor, sumexp_R1: Tensor) -> TileSoftmax:
        """Shifts the logits in place."""
        return TileSoftmax(shifted_Rw=logits_Rw.sub_(max_R1), sumexp_R1=sumexp_R1)

    def scaled_(self, scale_R1: Tensor) -> Tensor:
        """``scale * softmax``, in place."""
        return self.shifted_Rw.exp_().mul_(scale_R1 / self.sumexp_R1)

    def log_(self) -> Tensor:
        """Log-probabilities, in place."""
        return self.shifted_Rw.sub_(self.sumexp_R1.log())


def chunk_kl(a_Rw: Tensor, b_Rw: Tensor, scratch_Rw: Tensor) -> tuple[Statistics, Statistics, Tensor]:
    """Of one tile of two models' logits: both statistics (no ``weighted``) and ``sum exp(a - max a) (a - b)``."""
    torch.sub(a_Rw, b_Rw, out=scratch_Rw)
    first, second = _exponentiate_(a_Rw), _exponentiate_(b_Rw)
    return first, second, scratch_Rw.mul_(a_Rw).sum(-1)


def _exponentiate_(logits_Rw: Tensor) -> Statistics:
    max_R = logits_Rw.amax(-1)
    sumexp_R = logits_Rw.sub_(max_R.unsqueeze(-1)).exp_().sum(-1)
    return Statistics(max_T=max_R, sumexp_T=sumexp_R, weighted_T=torch.zeros_like(sumexp_R))


def chunk_mixture_kl(student: TileSoftmax, teacher: TileSoftmax, *, beta: float) -> Tensor:
    """This tile's part of (KL(p||m), KL(q||m)), stacked: ``[2, R]``."""
    logq_Rw, logp_Rw = student.log_(), teacher.log_()
    q_Rw, p_Rw = logq_Rw.exp(), logp_Rw.exp()
    excess_Rw = logq_Rw.sub_(logp_Rw)
    mixture_Rw = _log_mixture(excess_Rw, beta=beta)
    above_p_Rw = excess_Rw.neg().clamp_(max=0.0).sub_(mixture_Rw)  # log p - log m
    above_q_Rw = excess_Rw.clamp_(max=0.0).sub_(mixture_Rw)  # log q - log m
    return torch.stack([p_Rw.mul_(above_p_Rw).sum(-1), q_Rw.mul_(above_q_Rw).sum(-1)])


def _log_mixture(excess_Rw: Tensor, *, beta: float) -> Tensor:
    """``log m - max(log p, log q)`` from ``log q - log p``.

    In terms of the larger of the two nothing overflows, and ``log1p(. expm1)`` is exactly 0 where they are equal.
    """
    weight_Rw = torch.full_like(excess_Rw, 1.0 - beta).masked_fill_(excess_Rw > 0.0, beta)  # of the smaller one in m
    return weight_Rw.mul_(excess_Rw.abs().neg_().expm1_()).log1p_()


# --------------------------------------------------------------------------- d loss / d student logits
# ``kl_R1`` is the term named in ``_divergence``'s table, ``grad_R1`` the gradient of the token's loss.


def _forward_kl_gradient(
    student: TileSoftmax, teacher: TileSoftmax, *, kl_R1: Tensor, grad_R1: Tensor, beta: float
) -> Tensor:
    return student.scaled_(grad_R1).sub_(teacher.scaled_(grad_R1))


def _reverse_kl_gradient(
    student: TileSoftmax, teacher: TileSoftmax, *, kl_R1: Tensor, grad_R1: Tensor, beta: float
) -> Tensor:
    excess_Rw = torch.sub(student.shifted_Rw, teacher.shifted_Rw, out=teacher.shifted_Rw)
    excess_Rw.sub_(student.sumexp_R1.log() - teacher.sumexp_R1.log() + kl_R1)
    return student.scaled_(grad_R1).mul_(excess_Rw)


def _jsd_gradient(student: TileSoftmax, teacher: TileSoftmax, *, kl_R1: Tensor, grad_R1: Tensor, beta: float) -> Tensor:
    offset_R1 = student.sumexp_R1.log() - teacher.sumexp_R1.log()
    excess_Rw = torch.sub(student.shifted_Rw, teacher.shifted_Rw, out=teacher.shifted_Rw).sub_(offset_R1)
    mixture_Rw = _log_mixture(excess_Rw, beta=beta)
    above_q_Rw = excess_Rw.clamp_(max=0.0).sub_(mixture_Rw).sub_(kl_R1)
    return student.scaled_((1.0 - beta) * grad_R1).mul_(above_q_Rw)


CHUNK_GRADIENT: Mapping[str, Callable[..., Tensor]] = {
    "forward_kl": _forward_kl_gradient,
    "reverse_kl": _reverse_kl_gradient,
    "jsd": _jsd_gradient,
}
