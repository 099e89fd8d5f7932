"""Estimators of the reverse KL's gradient, judged by enumeration: every token of a small vocabulary is sampled once.

The mean over the outcomes, each with its probability, is the expected gradient, without any sampling noise, and what is
left of the second moment the covariance. The truth is autograd of the textbook divergence in fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from megatron_tropd.losses import terms
from megatron_tropd.losses.terms import Term
from tests.support.method_views import Rows, divergence, gradient, views

VOCAB, K, POSITIONS = 7, 3, 9

ESTIMATORS: dict[str, Callable[[], Term]] = {
    "`k1_pg` | `opd`": terms.k1_pg,
    "`k1_pg`, reward `sign` | `opd`": lambda: terms.k1_pg(shape="sign"),
    "`k1_pg`, reward `log` | `opd`": lambda: terms.k1_pg(shape="log"),
    "`k3`, unbounded | `opd`": lambda: terms.k3(bound=None),
    "`rkl_topk`, tail `bucket` | `rkl`": lambda: terms.rkl_topk(k=K, tail="bucket"),
    "`rkl_topk`, tail `sampled` | `resopd`": lambda: terms.rkl_topk(k=K, tail="sampled"),
    "`rkl_full` | `rkl`": terms.rkl_full,
}


@dataclass(frozen=True, kw_only=True)
class Judgment:
    """Of one estimator, over all positions."""

    bias: float  # norm of the difference between its mean and the reverse KL's gradient, over that gradient's norm
    reused_bias: float  # the same of rollouts of older weights
    covariance: float  # trace, on policy


def position_rows(*, reused: bool) -> Rows:
    """Draw the logits of POSITIONS positions; the sampler's differ from the student's where rollouts are reused."""
    generator = torch.Generator().manual_seed(7)

    def draw(scale: float) -> Tensor:
        return scale * torch.randn(POSITIONS, VOCAB, generator=generator, dtype=torch.float64)

    student_TV, teacher_TV, moved_TV = draw(1.5), draw(1.5), draw(0.4)
    old_TV = student_TV + moved_TV * reused
    sampled_T = torch.zeros(POSITIONS, dtype=torch.long)
    return Rows(student_TV.requires_grad_(), old_TV, teacher_TV, teacher_TV, sampled_T)


def exact_gradient(data: Rows) -> Tensor:
    """Differentiate KL(q || p) of whole rows."""
    student_TV, teacher_TV = data.student_TV.log_softmax(-1), data.teacher_TV.log_softmax(-1)
    return gradient(divergence(student_TV, teacher_TV, "reverse_kl", 0.0), data)


def moments(term: Term, data: Rows) -> tuple[Tensor, Tensor]:
    """Return ``([T, V], [T])`` the mean gradient and the trace of its covariance over y ~ q_old."""
    probability_TV = data.old_TV.softmax(-1)
    mean_TV, square_T = torch.zeros_like(probability_TV), torch.zeros(POSITIONS, dtype=torch.float64)
    for y in range(VOCAB):
        drawn = Rows(data.student_TV, data.old_TV, data.teacher_TV, data.base_TV, torch.full((POSITIONS,), y))
        student, teacher, _ = views(drawn, k=K)
        grad_TV = gradient(term.loss(student, teacher), drawn)
        mean_TV += probability_TV[:, y : y + 1] * grad_TV
        square_T += probability_TV[:, y] * grad_TV.square().sum(-1)
    return mean_TV, square_T - mean_TV.square().sum(-1)


@cache
def judged(name: str) -> Judgment:
    """Judge an estimator of ESTIMATORS."""
    term, biases, spreads = ESTIMATORS[name](), [], []
    for reused in (False, True):
        data = position_rows(reused=reused)
        exact_TV, (mean_TV, spread_T) = exact_gradient(data), moments(term, data)
        biases.append(float((mean_TV - exact_TV).norm() / exact_TV.norm()))
        spreads.append(float(spread_T.sum()))
    return Judgment(bias=biases[0], reused_bias=biases[1], covariance=spreads[0])
