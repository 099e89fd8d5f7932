"""The truth of the parity table: every objective of docs/methods.md as a textbook writes it, from whole rows of logits.

Nothing here is used by the package or uses it. The dtype is that of the logits: fp64 for the truth, fp32 for what a
plain implementation in low precision would do. ``A`` is the support, given as a mask over the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Log-probabilities of whole rows; the student's carries gradient."""

    logq_TV: Tensor
    logp_TV: Tensor  # teacher
    logold_TV: Tensor  # student at the rollout's weights
    logbase_TV: Tensor  # base model
    target_T: Tensor
    in_A_TV: Tensor  # bool

    def at_target(self, x_TV: Tensor) -> Tensor:
        return x_TV.gather(1, self.target_T[:, None])[:, 0]


Textbook = Callable[[Rows], Tensor]


def log_ratio(rows: Rows) -> Tensor:
    """r = log p(y) - log q(y), held constant."""
    return (rows.at_target(rows.logp_TV) - rows.at_target(rows.logq_TV)).detach()


def k1_pg(rows: Rows) -> Tensor:
    return -log_ratio(rows) * rows.at_target(rows.logq_TV)


def k1_pg_sign(rows: Rows) -> Tensor:
    return -log_ratio(rows).sign() * rows.at_target(rows.logq_TV)


def k1_pg_log(rows: Rows) -> Tensor:
    r_T = log_ratio(rows)
    return -torch.where(r_T > 0, torch.log(1 + r_T), -torch.log(1 - r_T)) * rows.at_target(rows.logq_TV)


def k1_pg_floor(rows: Rows) -> Tensor:
    return -log_ratio(rows).clamp(min=FLOOR) * rows.at_target(rows.logq_TV)


def k1_pg_clip(rows: Rows) -> Tensor:
    w_T = rows.at_target(rows.logq_TV).exp() / rows.at_target(rows.logold_TV).exp()
    r_T = rows.at_target(rows.logp_TV) - rows.at_target(rows.logold_TV)
    return -torch.minimum(w_T * r_T, w_T.clamp(1 - CLIP, 1 + CLIP) * r_T)


def k2(rows: Rows) -> Tensor:
    return (rows.at_target(rows.logp_TV) - rows.at_target(rows.logq_TV)) ** 2 / 2


def k3(rows: Rows) -> Tensor:
    r_T = rows.at_target(rows.logp_TV) - rows.at_target(rows.logq_TV)
    return r_T.exp() - 1 - r_T


def k3_bounded(rows: Rows) -> Tensor:
    """Beyond BOUND nats the tangent there."""
    r_T = rows.at_target(rows.logp_TV) - rows.at_target(rows.logq_TV)
    tangent_T = (math.exp(BOUND) - 1 - BOUND) + (math.exp(BOUND) - 1) * (r_T - BOUND)
    return torch.where(r_T > BOUND, tangent_T, k3(rows))


def extrapolated_clip(rows: Rows) -> Tensor:
    new_T, old_T, p_T, b_T = (rows.at_target(x) for x in (rows.logq_TV, rows.logold_TV, rows.logp_TV, rows.logbase_TV))
    reward_T, w_T = LAM * (p_T - b_T) - (old_T - b_T), new_T.exp() / old_T.exp()
    return -torch.minimum(w_T * reward_T, w_T.clamp(1 - CLIP, 1 + CLIP) * reward_T)


def extrapolated(rows: Rows) -> Tensor:
    q_T, p_T, b_T = (rows.at_target(x).detach() for x in (rows.logq_TV, rows.logp_TV, rows.logbase_TV))
    return ((q_T - b_T) - LAM * (p_T - b_T)) * rows.at_target(rows.logq_TV)


def advantages(tokens: int) -> Tensor:
    """Numbers of either sign, 0 too, in place of answers' advantages."""
    return torch.arange(tokens) % 5 / 2 - 1


def reward_pg(rows: Rows) -> Tensor:
    return -advantages(len(rows.target_T)) * rows.at_target(rows.logq_TV)


def reward_pg_clip(rows: Rows) -> Tensor:
    w_T, a_T = rows.at_target(rows.logq_TV).exp() / rows.at_target(rows.logold_TV).exp(), advantages(len(rows.target_T))
    return -torch.minimum(w_T * a_T, w_T.clamp(1 - CLIP, 1 + CLIP) * a_T)


def reference_k3(rows: Rows) -> Tensor:
    """b/q - 1 - log(b/q) at y; beyond 3 nats the tangent there."""
    r_T = rows.at_target(rows.logbase_TV) - rows.at_target(rows.logq_TV)
    tangent_T = (math.exp(3) - 1 - 3) + (math.exp(3) - 1) * (r_T - 3)
    return torch.where(r_T > 3, tangent_T, r_T.exp() - 1 - r_T)


def reference_pg(rows: Rows) -> Tensor:
    r_T = rows.at_target(rows.logbase_TV) - rows.at_target(rows.logq_TV)
    return -r_T.detach() * rows.at_target(rows.logq_TV)


def reference_pg_clip(rows: Rows) -> Tensor:
    w_T = rows.at_target(rows.logq_TV).exp() / rows.at_target(rows.logold_TV).exp()
    r_T = rows.at_target(rows.logbase_TV) - rows.at_target(rows.logold_TV)
    return -torch.minimum(w_T * r_T, w_T.clamp(1 - CLIP, 1 + CLIP) * r_T)


def nll(rows: Rows) -> Tensor:
    return -rows.at_target(rows.logq_TV)


def prefix_pg_scalar(rows: Rows) -> Tensor:
    """Advantage log q - log p, that is loss -(log q - log p) log q."""
    return log_ratio(rows) * rows.at_target(rows.logq_TV)


def none(rows: Rows) -> Tensor:
    return rows.at_target(rows.logq_TV) * 0


def kl(a_TV: Tensor, b_TV: Tensor) -> Tensor:
    """sum a (log a - log b) from log-probabilities; a probability of exactly 0 adds 0."""
    return (a_TV.exp() * (a_TV - b_TV)).sum(-1)


def fkl_full(rows: Rows) -> Tensor:
    return kl(rows.logp_TV, rows.logq_TV)


def rkl_full(rows: Rows) -> Tensor:
    return kl(rows.logq_TV, rows.logp_TV)


def jsd_full(beta: float) -> Textbook:
    def jsd(rows: Rows) -> Tensor:
        logm_TV = torch.log(beta * rows.logp_TV.exp() + (1 - beta) * rows.logq_TV.exp())
        return beta * kl(rows.logp_TV, logm_TV) + (1 - beta) * kl(rows.logq_TV, logm_TV)

    return jsd


def on_support(a_TV: Tensor, b_TV: Tensor, in_A_TV: Tensor, tail: str) -> Tensor:
    """sum over A of a (log a - log b), with the mass outside A left out, made one more category, or renormalized."""
    if tail == "renorm":
        a_TV, b_TV = (x - log_sum(x, in_A_TV)[:, None] for x in (a_TV, b_TV))
    inside_T = (in_A_TV * a_TV.exp() * (a_TV - b_TV)).sum(-1)
    if tail != "bucket" or in_A_TV.all():
        return inside_T
    a_tail_T, b_tail_T = (log_sum(x, ~in_A_TV) for x in (a_TV, b_TV))
    return inside_T + a_tail_T.exp() * (a_tail_T - b_tail_T)


def log_sum(x_TV: Tensor, mask_TV: Tensor) -> Tensor:
    return x_TV.masked_fill(~mask_TV, -torch.inf).logsumexp(-1)


def fkl_topk(tail: str) -> Textbook:
    return lambda rows: on_support(rows.logp_TV, rows.logq_TV, rows.in_A_TV, tail)


def rkl_topk(tail: str) -> Textbook:
    if tail == "sampled":
        return resopd
    return lambda rows: on_support(rows.logq_TV, rows.logp_TV, rows.in_A_TV, tail)


def jsd_topk(beta: float) -> Callable[[str], Textbook]:
    """The same on A, after what the tail makes of either distribution: A alone, A renormalized, or A and the rest."""

    def of_tail(tail: str) -> Textbook:
        def jsd(rows: Rows) -> Tensor:
            p_TV, q_TV = (x.exp() * rows.in_A_TV for x in (rows.logp_TV, rows.logq_TV))
            if tail == "renorm":
                p_TV, q_TV = (x / x.sum(-1, keepdim=True) for x in (p_TV, q_TV))
            if tail == "bucket" and not rows.in_A_TV.all():
                p_TV, q_TV = (
                    torch.cat([x, log_sum(whole, ~rows.in_A_TV).exp()[:, None]], dim=1)
                    for x, whole in ((p_TV, rows.logp_TV), (q_TV, rows.logq_TV))
                )
            m_TV = beta * p_TV + (1 - beta) * q_TV
            here_TV = m_TV > 0
            p_TV, q_TV, m_TV = (torch.where(here_TV, x, 1.0) for x in (p_TV, q_TV, m_TV))
            return (here_TV * (beta * p_TV * (p_TV / m_TV).log() + (1 - beta) * q_TV * (q_TV / m_TV).log())).sum(-1)

        return jsd

    return of_tail


def resopd(rows: Rows) -> Tensor:
    """The coarsened reverse KL; of y outside A also its own policy gradient instead of the tail's."""
    coarse_T = on_support(rows.logq_TV, rows.logp_TV, rows.in_A_TV, "bucket")
    if rows.in_A_TV.all():
        return coarse_T
    q_B_T, p_B_T = (log_sum(x, ~rows.in_A_TV) for x in (rows.logq_TV, rows.logp_TV))
    q_T, old_T = rows.at_target(rows.logq_TV), rows.at_target(rows.logold_TV)
    residual_T = (p_B_T - q_B_T).detach() * q_B_T - log_ratio(rows) * q_T
    importance_T = (q_T.exp().detach() / old_T.exp()).clamp(max=CAP)
    outside_T = ~rows.in_A_TV.gather(1, rows.target_T[:, None])[:, 0]
    return coarse_T + torch.where(outside_T, importance_T * residual_T, 0.0)


def fkl_pg_scalar(tail: str) -> Textbook:
    """The detached divergence, negated, is the advantage of the sampled token."""
    return lambda rows: fkl_topk(tail)(rows).detach() * rows.at_target(rows.logq_TV)


def uncertain_fkl(tail: str) -> Textbook:
    """Where the teacher's entropy exceeds UNCERTAIN nats."""

    def loss(rows: Rows) -> Tensor:
        entropy_T = -(rows.logp_TV.exp() * rows.logp_TV).sum(-1)
        return (entropy_T > UNCERTAIN) * fkl_topk(tail)(rows)

    return loss


FLOOR, CLIP, LAM, UNCERTAIN, BOUND, CAP = -0.3, 0.2, 1.25, 1.5, 0.7, 10.0
