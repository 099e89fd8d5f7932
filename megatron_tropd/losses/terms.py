"""Loss terms: each maps what student and teacher say about T tokens to one loss per token, in nats.

A term never masks, averages or communicates. Descent on every term moves the student toward the teacher. ``r``
is the log ratio ``log p(y) - log q(y)`` of teacher p and student q at the sampled token y; its gradient is cut unless
a term says otherwise. Plain autograd of ``log q(y) - log p(y)`` is not offered: its gradient ignores the teacher.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from megatron_tropd.errors import ConfigError
from megatron_tropd.losses.support import ReverseTail, Tail, check_tail, jsd_on_support, kl_on_support, required
from megatron_tropd.types import Needs, StudentView, SupportKind, TeacherView

_log = logging.getLogger(__name__)
Loss = Callable[[StudentView, TeacherView], Tensor]
Reward = Callable[[Tensor, TeacherView], Tensor]  # (log q(y) without gradient, teacher) -> reward of the token


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One loss per token and what it takes to compute it."""

    name: str
    loss: Loss
    needs: Needs = field(default_factory=Needs)
    vanishes: bool = True  # loss gradient is 0 when teacher and student agree
    on_policy: bool = False  # its gradient is right only while the weights that learn are those that sampled
    sampled: bool = False  # its gradient takes the token for a draw from the student's own distribution
    names_alternatives: bool = False  # it takes mass from a rejected token even where the student is certain of it


# --------------------------------------------------------------------------- sampled-token terms


def policy_gradient(
    reward: Reward, *, name: str, clip: float | None = None, needs: Needs | None = None, vanishes: bool = True
) -> Term:
    """Build the score-function surrogate of a per-token reward; descent raises the log-prob of rewarded tokens.

    Without ``clip``: ``-R log q(y)``, the reward R taken at the current weights; its gradient w.r.t. the logits is
    ``-R (1[j=y] - q_j)``. With ``clip=e`` (PPO, for rollouts used more than once): ``-min(w R, clip(w, 1-e, 1+e) R)``,
    ``w = q(y) / q_old(y)`` and R taken at the rollout's weights; at the first use both gradients are equal.
    """
    if clip is not None and not 0.0 < clip < 1.0:
        raise ConfigError(f"PPO clip={clip} must lie in (0, 1), or be null for no importance ratio.")

    def loss(student: StudentView, teacher: TeacherView) -> Tensor:
        if clip is None:
            return -reward(student.logprob_T.detach(), teacher).detach() * student.logprob_T
        reward_T = reward(student.old_logprob_T.detach(), teacher).detach()
        ratio_T = torch.exp(student.logprob_T - student.old_logprob_T.detach())
        return -torch.minimum(ratio_T * reward_T, ratio_T.clamp(1.0 - clip, 1.0 + clip) * reward_T)

    return Term(name=name, loss=loss, needs=needs or Needs(), vanishes=vanishes, on_policy=clip is None, sampled=True)


RewardShape = Literal["ratio", "sign", "log"]
REWARD_SHAPES: Mapping[RewardShape, Callable[[Tensor], Tensor]] = {
    "ratio": lambda ratio_T: ratio_T,
    "sign": torch.sign,
    "log": lambda ratio_T: ratio_T.sign() * ratio_T.abs().log1p(),
}


def k1_pg(*, clip: float | None = None, floor: float | None = None, shape: RewardShape = "ratio") -> Term:
    """Take the policy gradient of the sampled-token reverse KL: the reward is ``r``, or ``max(r, floor)`` (nats).

    In expectation over y ~ q its gradient is that of ``KL(q || p)`` when there is no floor and r is taken as it is.
    ``shape=sign`` rewards by ``sign(r)`` (arXiv 2609.08341), ``log`` by ``sign(r) log(1 + |r|)`` (arXiv 2607.13399):
    no token outweighs the others, at the price of that expectation.
    Source: Thinking Machines' on-policy distillation; the floor: REOPOLD, arXiv 2603.11137.
    """
    shaped = REWARD_SHAPES[shape]

    def reward(logprob_T: Tensor, teacher: TeacherView) -> Tensor:
        ratio_T = shaped(teacher.logprob_T - logprob_T)
        return ratio_T if floor is None else ratio_T.clamp(min=floor)

    name = "k1_pg" if shape == "ratio" else f"k1_pg_{shape}"
    return policy_gradient(reward, name=name if floor is None else f"{name}_floor", clip=clip)


def extrapolated_pg(*, lam: float, clip: float | None = None) -> Term:
    """Take ExOPD's reward (arXiv 2602.12125), ``lam (log p - log b) - (log q - log b)`` with b the base model, nats.

    ``lam=1`` is ``k1_pg``; ``lam > 1`` aims beyond the teacher, so the term does not vanish when the student equals it.
    """

    def reward(logprob_T: Tensor, teacher: TeacherView) -> Tensor:
        base_T = required(teacher.base_logprob_T, field="TeacherView.base_logprob_T", need="base_model")
        return lam * (teacher.logprob_T - base_T) - (logprob_T - base_T)

    return policy_gradient(reward, name="extrapolated_pg", clip=clip, needs=Needs(base_model=True), vanishes=lam == 1.0)


def k2() -> Term:
    """Return ``r^2 / 2`` with gradient through ``log q(y)``, nats^2."""

    def loss(student: StudentView, teacher: TeacherView) -> Tensor:
        return 0.5 * (teacher.logprob_T - student.logprob_T).square()

    return Term(name="k2", loss=loss, on_policy=True, sampled=True)


K3_BOUND = 3.0
"""Nats: beyond it a token of ``k3`` would weigh more than 19 others."""


def k3(*, bound: float | None = K3_BOUND) -> Term:
    """Return ``exp(r) - 1 - r`` with gradient through ``log q(y)``; never negative.

    Its gradient is ``min(rho, exp(bound)) - 1`` times that of ``-log q(y)``: beyond ``bound`` nats the loss continues
    along its tangent, since one token of r = 30 would outweigh 1e13 others (exp overflows at 89). That is a bias, of
    the tokens with ``p > exp(bound) q`` only; None takes the exponential as it is.
    """
    if bound is not None and not bound > 0.0:
        raise ConfigError(f"k3 needs bound > 0 nats, got {bound}; null is no bound.")

    def loss(student: StudentView, teacher: TeacherView) -> Tensor:
        ratio_T = teacher.logprob_T - student.logprob_T
        if bound is None:
            return torch.expm1(ratio_T) - ratio_T
        capped_T = ratio_T.clamp(max=bound)
        return torch.expm1(capped_T) - capped_T + math.expm1(bound) * (ratio_T - capped_T)

    return Term(name="k3", loss=loss, on_policy=True, sampled=True)


def reward_pg(*, clip: float | None = None) -> Term:
    """Take the policy gradient of the answer's reward: ``-sg[A] log q(y)``, A the advantage of the whole answer.

    With ``clip`` as of ``policy_gradient``. Over answers drawn from q the mean of the gradient is that of minus the
    expected reward, by whatever the loss is divided. Whoever gives A decides what a reward is measured against
    (``losses.advantages``).
    """
    if clip is not None and not 0.0 < clip < 1.0:
        raise ConfigError(f"reward_clip={clip} must lie in (0, 1), or be null for no importance ratio.")

    def loss(student: StudentView, teacher: TeacherView) -> Tensor:
        advantage_T = required(student.advantage_T, field="StudentView.advantage_T", need="reward").detach()
        if clip is None:
            return -advantage_T * student.logprob_T
        ratio_T = torch.exp(student.logprob_T - student.old_logprob_T.detach())
        return -torch.minimum(ratio_T * advantage_T, ratio_T.clamp(1.0 - clip, 1.0 + clip) * advantage_T)

    needs = Needs(reward=True)
    return Term(name="reward_pg", loss=loss, needs=needs, vanishes=False, on_policy=clip is None, sampled=True)


def reference_k3() -> Term:
    """Hold the student near a reference b, the base model: ``b/q - 1 - log(b/q)`` at y, gradient through ``log q(y)``.

    GRPO's (arXiv 2402.03300): never negative, its mean over y ~ q is ``KL(q || b)``. Its gradient is not that one's:
    ``(1 - b/q) (1[j=y] - q_j)``, on average ``q_j - b_j``, that of ``KL(b || q)``; the ratio is held as in ``k3``.
    """
    direct = k3()

    def loss(student: StudentView, teacher: TeacherView) -> Tensor:
        base_T = required(teacher.base_logprob_T, field="TeacherView.base_logprob_T", need="base_model")
        return direct.loss(student, replace(teacher, logprob_T=base_T))

    needs = Needs(base_model=True)
    return Term(name="reference_k3", loss=loss, needs=needs, vanishes=False, on_policy=True, sampled=True)


def reference_pg(*, clip: float | None = None) -> Term:
    """Hold the student near a reference b, the base model, by the policy gradient of ``KL(q || b)``: ``k1_pg`` to b."""

    def reward(logprob_T: Tensor, teacher: TeacherView) -> Tensor:
        return required(teacher.base_logprob_T, field="TeacherView.base_logprob_T", need="base_model") - logprob_T

    return policy_gradient(reward, name="reference_pg", clip=clip, needs=Needs(base_model=True), vanishes=False)


def nll() -> Term:
    """Imitate the token as written: ``-log q(y)``. Gradient ``q_j - 1[j=y]``, not zero when student equals teacher."""
    return Term(name="nll", loss=lambda student, teacher: -student.logprob_T, vanishes=False)


def prefix_pg_scalar() -> Term:
    """Follow TrOPD's script on prefix tokens: ``log q(y) - log p(y)`` as a constant advantage (arXiv 2606.01249).

    Kept for fidelity. Note the sign: it *lowers* the probability of tokens that the teacher likes better.
    """

    def reward(logprob_T: Tensor, teacher: TeacherView) -> Tensor:
        return logprob_T - teacher.logprob_T

    return policy_gradient(reward, name="prefix_pg_scalar")


# --------------------------------------------------------------------------- terms over a support


def fkl_topk(*, k: int, tail: Tail = "none", support: SupportKind = "teacher") -> Term:
    """Take the forward KL on a support of k ids: ``sum_A p (log p - log q)`` plus the tail's share.

    Gradient w.r.t. logits: ``m_A q_j - p_j 1[j in A]`` (none), ``q_j - p_j`` on A and ``q_j (1 - p_tail/q_tail)`` off A
    (bucket), ``qhat_j - phat_j`` on A (renorm). With ``tail=none`` it may be negative (never clamped) and leaves
    ``q_j (m_A - 1[j in A])`` at p = q: it squeezes the tail into A.
    """

    def loss(student: StudentView, teacher: TeacherView) -> Tensor:
        student_TK, teacher_TK = _on_support(student, teacher)
        logtails = _tails(student, teacher)[::-1] if tail == "bucket" else None
        return kl_on_support(teacher_TK, student_TK, tail=tail, mask_TK=teacher.support_mask_TK, logtails=logtails)

    term = _support_term("fkl_topk", loss, k=k, tail=tail, support=support)
    # the student's own top k need not hold any, and within a renormalized one a token outside keeps its probability
    return replace(term, names_alternatives=support != "student" and tail != "renorm")


def rkl_topk(*, k: int, tail: ReverseTail = "renorm", support: SupportKind = "teacher") -> Term:
    """Take the reverse KL on a support: ``sum_A q (log q - log p)`` plus the tail's share.

    ``tail=renorm`` is local support matching (arXiv 2603.25562), gradient ``qhat_j (log(qhat_j/phat_j) - KL_A)`` on A.
    ``tail=none`` leaves ``q_j (1[j in A] - q_A)`` at p = q: it pushes mass out of A, and says so once.
    ``tail=sampled`` is ``bucket`` and, where y is outside A, what the bucket cannot know of y: see ``_residual``.
    """
    if tail == "sampled":
        return _residual(rkl_topk(k=k, tail="bucket", support=support))
    if tail == "none":
        _warn_of_leaking_support()

    def loss(student: StudentView, teacher: TeacherView) -> Tensor:
        student_TK, teacher_TK = _on_support(student, teacher)
        logtails = _tails(student, teacher) if tail == "bucket" else None
        return kl_on_support(student_TK, teacher_TK, tail=tail, mask_TK=teacher.support_mask_TK, logtails=logtails)

    return _support_term("rkl_topk", loss, k=k, tail=tail, support=support)


def jsd_topk(*, k: int, beta: float, tail: Tail = "renorm", support: SupportKind = "teacher") -> Term:
    """Take the JSD on a support: ``beta KL(p||m) + (1-beta) KL(q||m)``, ``m = beta p + (1-beta) q``, all on A.

    ``tail=renorm`` compares ``phat`` and ``qhat``; its gradient on A is
    ``(1-beta) qhat_j (log(qhat_j/mhat_j) - KL(qhat||mhat))``. ``bucket`` makes the rest one category; ``none`` takes
    the sum over A as it stands. The ends of beta are ``fkl_topk`` and ``rkl_topk``, as of ``jsd_full``.
    """
    if not 0.0 <= beta <= 1.0:
        raise ConfigError(f"jsd_topk needs beta in [0, 1], got {beta}.")
    if beta in (0.0, 1.0):
        return (fkl_topk if beta == 0.0 else rkl_topk)(k=k, tail=tail, support=support)

    def loss(student: StudentView, teacher: TeacherView) -> Tensor:
        student_TK, teacher_TK = _on_support(student, teacher)
        tails = _tails(student, teacher) if tail == "bucket" else None
        return jsd_on_support(
            teacher_TK,
            student_TK,
            beta=beta,
            tail=tail,
            mask_TK=teacher.support_mask_TK,
            logtails=tails and tails[::-1],
        )

    return _support_term("jsd_topk", loss, k=k, tail=tail, support=support)


RATIO_CAP = 10.0
"""Largest importance ratio of a residual: beyond it one token of an old rollout would outweigh the batch."""


def _residual(coarse: Term) -> Term:
    """Return residual on-policy distillation (ResOPD, arXiv 2610.04882): an unbiased full reverse KL from a top k.

    ``coarse`` is the reverse KL with the ids outside A as one category B. Where y is outside A, this adds

        w (-sg[r] log q(y) + sg[r_B] log q_B),    r_B = log p_B - log q_B,    w = min(q(y) / q_old(y), RATIO_CAP)

    whose mean over y ~ q_old is what the coarsening loses, so the whole has the gradient of ``rkl_full`` on average, as
    long as the cap does not act; ``w`` has no gradient and is 1 on policy. Its variance is that of ``k1_pg`` on B
    alone. The value is no divergence.
    """

    def loss(student: StudentView, teacher: TeacherView) -> Tensor:
        inside_T = required(teacher.support_has_target_T, field="TeacherView.support_has_target_T", need="tail_mass")
        student_B_T, teacher_B_T = _tails(student, teacher)
        # an empty tail holds no sampled token; it is replaced before any arithmetic, which would make nan of it
        student_B_T, teacher_B_T = (x.masked_fill(inside_T | x.isneginf(), 0.0) for x in (student_B_T, teacher_B_T))
        weight_T = torch.exp(student.logprob_T.detach() - student.old_logprob_T.detach()).clamp(max=RATIO_CAP)
        of_token_T = (teacher.logprob_T - student.logprob_T).detach() * student.logprob_T
        of_bucket_T = (teacher_B_T - student_B_T).detach() * student_B_T
        residual_T = weight_T * (of_bucket_T - of_token_T)
        return coarse.loss(student, teacher) + residual_T.masked_fill(inside_T, 0.0).to(student.logprob_T.dtype)

    return replace(coarse, name="rkl_topk_sampled", loss=loss, sampled=True)


@cache
def _warn_of_leaking_support() -> None:
    _log.warning(
        "rkl_topk with tail=none does not vanish where student and teacher agree: it pushes probability out of the "
        "support, and its loss falls below 0. Use tail=bucket (an exact KL), or tail=renorm."
    )


def fkl_pg_scalar(*, k: int, tail: Tail = "none", support: SupportKind = "teacher") -> Term:
    """Follow TrOPD's script: minus the detached support KL as the sampled token's advantage (arXiv 2606.01249).

    Kept for fidelity; it cannot teach the teacher's alternatives, because only ``log q(y)`` carries gradient.
    """
    direct = fkl_topk(k=k, tail=tail, support=support)

    def loss(student: StudentView, teacher: TeacherView) -> Tensor:
        advantage_T = -direct.loss(student, teacher).detach()
        return -advantage_T * student.logprob_T

    return Term(name="fkl_pg_scalar", loss=loss, needs=direct.needs, on_policy=True, sampled=True)


def _on_support(student: StudentView, teacher: TeacherView) -> tuple[Tensor, Tensor]:
    student_TK = required(student.support_logprob_TK, field="StudentView.support_logprob_TK", need="top_k")
    return student_TK, required(teacher.support_logprob_TK, field="TeacherView.support_logprob_TK", need="top_k")


def _tails(student: StudentView, teacher: TeacherView) -> tuple[Tensor, Tensor]:
    student_T = required(student.support_logtail_T, field="StudentView.support_logtail_T", need="tail_mass")
    return student_T, required(teacher.support_logtail_T, field="TeacherView.support_logtail_T", need="tail_mass")


def _support_term(name: str, loss: Loss, *, k: int, tail: ReverseTail, support: SupportKind) -> Term:
    if tail == "sampled" and not name.startswith("rkl"):
        raise ConfigError(f"tail=sampled corrects a reverse KL, which {name} is not: take rkl_topk, or another tail.")
    check_tail(tail)
    if k < 1:
        raise ConfigError(f"{name} needs k >= 1 candidates, got {k}.")
    needs = Needs(top_k=k, support=support, tail_mass=tail == "bucket")
    return Term(name=f"{name}_{tail}", loss=loss, needs=needs, vanishes=tail != "none")


# --------------------------------------------------------------------------- full-vocabulary terms


def fkl_full() -> Term:
    """Return ``KL(p || q)`` over the vocabulary; gradient ``q_j - p_j``."""
    return replace(_full("fkl_full", "forward_kl", 0.5), names_alternatives=True)


def rkl_full() -> Term:
    """Return ``KL(q || p)`` over the vocabulary; gradient ``q_j (log(q_j/p_j) - KL)``."""
    return _full("rkl_full", "reverse_kl", 0.5)


def jsd_full(*, beta: float) -> Term:
    """Return ``beta KL(p||m) + (1-beta) KL(q||m)``, ``m = beta p + (1-beta) q`` (GKD, arXiv 2306.13649).

    The formula is 0 at both ends; there the limits of its direction are meant: 0 is ``fkl_full``, 1 is ``rkl_full``.
    """
    if not 0.0 <= beta <= 1.0:
        raise ConfigError(f"jsd_full needs beta in [0, 1], got {beta}.")
    if beta in (0.0, 1.0):
        return fkl_full() if beta == 0.0 else rkl_full()
    return _full("jsd_full", "jsd", beta)


def _full(name: str, kind: str, beta: float) -> Term:
    def loss(student: StudentView, teacher: TeacherView) -> Tensor:
        return required(student.divergence, field="StudentView.divergence", need="hidden_states")(kind, beta)

    return Term(name=name, loss=loss, needs=Needs(hidden_states=True))


# --------------------------------------------------------------------------- none, and combinators


def _zero(student: StudentView, teacher: TeacherView) -> Tensor:
    return torch.zeros_like(student.logprob_T)


NONE = Term(name="none", loss=_zero)
"""No loss. Compare with ``is`` to skip it."""


def scaled(term: Term, factor: float) -> Term:
    """Return ``factor * term``; the factor 0 is NONE."""
    if factor == 0.0:
        return NONE

    def loss(student: StudentView, teacher: TeacherView) -> Tensor:
        return factor * term.loss(student, teacher)

    return replace(term, loss=loss, on_policy=False)


def where_teacher_uncertain(term: Term, *, entropy: float) -> Term:
    """Return ``term`` on the tokens where the teacher's full-vocabulary entropy exceeds ``entropy`` nats, 0 elsewhere.

    Source: EOPD, arXiv 2603.07079.
    """

    def loss(student: StudentView, teacher: TeacherView) -> Tensor:
        entropy_T = required(teacher.entropy_T, field="TeacherView.entropy_T", need="teacher_entropy")
        loss_T = term.loss(student, teacher)
        return torch.where(entropy_T > entropy, loss_T, torch.zeros_like(loss_T))

    needs = merge_needs(term.needs, Needs(teacher_entropy=True))
    return replace(term, name=f"{term.name}_uncertain", loss=loss, needs=needs, on_policy=False)


def merge_needs(*needs: Needs) -> Needs:
    """Merge what all the parts need. Raises ConfigError when two parts want different supports."""
    supports = {n.support for n in needs if n.top_k > 0}
    if len(supports) > 1:
        raise ConfigError(f"one method can use one support, but its parts request {', '.join(sorted(supports))}.")
    return Needs(
        top_k=max((n.top_k for n in needs), default=0),
        support=supports.pop() if supports else "teacher",
        tail_mass=any(n.tail_mass for n in needs),
        student_entropy=any(n.student_entropy for n in needs),
        teacher_entropy=any(n.teacher_entropy for n in needs),
        old_logprob=any(n.old_logprob for n in needs),
        entropy_top=max((n.entropy_top for n in needs), default=0.0),
        hidden_states=any(n.hidden_states for n in needs),
        base_model=any(n.base_model for n in needs),
        reward=any(n.reward for n in needs),
    )
