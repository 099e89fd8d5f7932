"""Gates: which sampled tokens are trusted. A gate gives every token a weight in [0, 1] for the trusted term.

``rho = p(y) / q(y)``; the student's log-prob in it is chosen by ``reference_logprob`` and handed to the gate, so that
a gate drawn at the rollout's weights stays the same over every update made with that rollout. The only randomness is
``TokenView.uniform_T``, drawn beforehand, hence identical on every rank. No gradient flows through a gate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from megatron_tropd.errors import ConfigError
from megatron_tropd.losses.support import required
from megatron_tropd.losses.terms import merge_needs
from megatron_tropd.types import Needs, StudentView, SupportKind, TeacherView, TokenView

RatioSource = Literal["old", "current", "rollout"]
RATIO_SOURCES: tuple[RatioSource, ...] = ("old", "current", "rollout")

# (log q(y) of the ratio, views) -> trusted, bool or weight in [0, 1], [T]
Trust = Callable[[Tensor, StudentView, TeacherView, TokenView], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """A rule for the trust in each token, and the fields that it needs."""

    name: str
    trust: Trust
    needs: Needs = field(default_factory=Needs)


def reference_logprob(student: StudentView, tokens: TokenView, source: RatioSource) -> Tensor:
    """Return the student's ``log q(y)`` that enters the ratio, nats, no gradient.

    It is taken at the rollout's weights as the trainer computes it (old), at the present weights (current), or as the
    sampler reported it (rollout).
    """
    match source:
        case "old":
            return student.old_logprob_T.detach()
        case "current":
            return student.logprob_T.detach()
        case "rollout":
            return tokens.rollout_logprob_T.detach()
    raise ConfigError(f"ratio={source!r} must be one of {', '.join(RATIO_SOURCES)}.")


def acceptance(log_ratio_T: Tensor) -> Tensor:
    """Return ``min(1, rho)`` from ``log rho``: its complement averages to the total variation of p and q over y ~ q."""
    return log_ratio_T.clamp(max=0.0).exp()


# --------------------------------------------------------------------------- gates on the ratio


def bernoulli() -> Gate:
    """Trust with probability ``min(1, rho)``: the acceptance test of speculative decoding (TrOPD, 2606.01249)."""

    def trust(reference_T: Tensor, student: StudentView, teacher: TeacherView, tokens: TokenView) -> Tensor:
        return tokens.uniform_T < acceptance(teacher.logprob_T - reference_T)

    return Gate(name="bernoulli", trust=trust)


def soft() -> Gate:
    """Give the weight ``min(1, rho)``: the mean of ``bernoulli`` without its variance (our derivation)."""

    def trust(reference_T: Tensor, student: StudentView, teacher: TeacherView, tokens: TokenView) -> Tensor:
        return acceptance(teacher.logprob_T - reference_T)

    return Gate(name="soft", trust=trust)


def log_ratio_above(floor: float, *, name: str = "log_ratio_above") -> Gate:
    """Trust a token when ``log rho >= floor`` (nats)."""

    def trust(reference_T: Tensor, student: StudentView, teacher: TeacherView, tokens: TokenView) -> Tensor:
        return teacher.logprob_T - reference_T >= floor

    return Gate(name=name, trust=trust)


def threshold(c: float) -> Gate:
    """Trust a token when ``rho >= c``."""
    if c <= 0.0:
        raise ConfigError(f"threshold gate needs c > 0, got {c}: every token would be trusted; use the gate 'all'.")
    return log_ratio_above(math.log(c), name="threshold")


def probability_gap(c: float = 0.0) -> Gate:
    """Trust a token when ``p(y) - q(y) > c`` (AOPD, arXiv 2605.06387)."""
    if not -1.0 <= c < 1.0:
        raise ConfigError(f"probability_gap gate needs c in [-1, 1), got {c}: a gap of probabilities never exceeds 1.")

    def trust(reference_T: Tensor, student: StudentView, teacher: TeacherView, tokens: TokenView) -> Tensor:
        return teacher.logprob_T.exp() - reference_T.exp() > c

    return Gate(name="probability_gap", trust=trust)


# --------------------------------------------------------------------------- gates on rank and entropy


def teacher_topk(k: int, *, support: SupportKind = "teacher") -> Gate:
    """Trust a token when y is among the teacher's k most likely tokens (ties at rank k all count)."""
    needs = _rank_needs("teacher_topk", k, support)

    def trust(reference_T: Tensor, student: StudentView, teacher: TeacherView, tokens: TokenView) -> Tensor:
        sampled_T, others_TK = _teacher_rank(teacher, tokens)
        return _within_top(sampled_T, others_TK, k)

    return Gate(name="teacher_topk", trust=trust, needs=needs)


def teacher_topp(p: float, *, k: int, support: SupportKind = "teacher") -> Gate:
    """Trust a token when y is in the teacher's nucleus: the tokens more likely than y hold less than ``p`` together.

    Only the teacher's top k are seen. Where they hold less than ``p``, the nucleus is cut at rank k.
    """
    if not 0.0 < p <= 1.0:
        raise ConfigError(f"teacher_topp gate needs p in (0, 1], got {p}.")
    needs = _rank_needs("teacher_topp", k, support)

    def trust(reference_T: Tensor, student: StudentView, teacher: TeacherView, tokens: TokenView) -> Tensor:
        sampled_T, others_TK = _teacher_rank(teacher, tokens)
        likelier_T = (others_TK.exp() * (others_TK > sampled_T[:, None])).sum(-1)
        return _within_top(sampled_T, others_TK, k) & (likelier_T < p)

    return Gate(name="teacher_topp", trust=trust, needs=needs)


def _rank_needs(name: str, k: int, support: SupportKind) -> Needs:
    if k < 1:
        raise ConfigError(f"{name} gate needs k >= 1, got {k}.")
    if support == "student":
        raise ConfigError(f"{name} gate needs the teacher's top k, which support='student' lacks: use 'union'.")
    return Needs(top_k=k, support=support)


def _teacher_rank(teacher: TeacherView, tokens: TokenView) -> tuple[Tensor, Tensor]:
    """Return ``(log p(y) as the support has it or -inf, log p of the counting columns, -inf elsewhere)``, nats.

    Comparing entries of one tensor is exact; ``teacher.logprob_T`` may differ from it in the last digit.
    """
    ids_TK = required(teacher.support_ids_TK, field="TeacherView.support_ids_TK", need="top_k")
    logprob_TK = required(teacher.support_logprob_TK, field="TeacherView.support_logprob_TK", need="top_k")
    if teacher.support_mask_TK is not None:
        logprob_TK = logprob_TK.masked_fill(~teacher.support_mask_TK, -math.inf)
    sampled_T = logprob_TK.masked_fill(ids_TK != tokens.target_T[:, None], -math.inf).amax(-1)
    return sampled_T, logprob_TK


def _within_top(sampled_T: Tensor, others_TK: Tensor, k: int) -> Tensor:
    kth_T = others_TK.topk(min(k, others_TK.shape[-1]), dim=-1).values[:, -1]
    return (sampled_T >= kth_T) & (sampled_T > -math.inf)


def entropy_top(fraction: float) -> Gate:
    """Trust a token when the student's entropy at the rollout is in the top ``fraction`` of the global batch."""
    if not 0.0 < fraction < 1.0:
        raise ConfigError(f"entropy_top gate needs a fraction in (0, 1), got {fraction}.")

    def trust(reference_T: Tensor, student: StudentView, teacher: TeacherView, tokens: TokenView) -> Tensor:
        entropy_T = student.entropy_T if student.old_entropy_T is None else student.old_entropy_T
        entropy_T = required(entropy_T, field="StudentView.old_entropy_T", need="student_entropy")
        return entropy_T.detach() > tokens.entropy_threshold

    # The quantile spans the global batch, so every entropy must be known before the first loss.
    needs = Needs(student_entropy=True, old_logprob=True, entropy_top=fraction)
    return Gate(name="entropy_top", trust=trust, needs=needs)


def correct(least: float = 0.5) -> Gate:
    """Trust every token of an answer whose reward is at least ``least``; to a grader 1 is right and 0 is wrong.

    Answers without a reward (nan) are not trusted, and not distrusted either: ``engine.batch`` leaves them out.
    """

    def trust(reference_T: Tensor, student: StudentView, teacher: TeacherView, tokens: TokenView) -> Tensor:
        return required(tokens.reward_T, field="TokenView.reward_T", need="reward") >= least

    return Gate(name="correct", trust=trust, needs=Needs(reward=True))


# --------------------------------------------------------------------------- constants and combinators


def _always(reference_T: Tensor, student: StudentView, teacher: TeacherView, tokens: TokenView) -> Tensor:
    return torch.ones_like(reference_T)


def _never(reference_T: Tensor, student: StudentView, teacher: TeacherView, tokens: TokenView) -> Tensor:
    return torch.zeros_like(reference_T)


ALL = Gate(name="all", trust=_always)
"""Every token is trusted."""

NOTHING = Gate(name="none", trust=_never)
"""No token is trusted."""


def both(first: Gate, second: Gate) -> Gate:
    """Trust as far as both gates trust: the product of their weights."""

    def trust(reference_T: Tensor, student: StudentView, teacher: TeacherView, tokens: TokenView) -> Tensor:
        views = (reference_T, student, teacher, tokens)
        return first.trust(*views).to(reference_T.dtype) * second.trust(*views).to(reference_T.dtype)

    return Gate(name=f"{first.name}+{second.name}", trust=trust, needs=merge_needs(first.needs, second.needs))


def staged(first: Gate, second: Gate, *, switch: float = 0.5) -> Gate:
    """Return ``first`` while ``TokenView.progress < switch``, then ``second`` (REOPOLD, arXiv 2603.11137)."""

    def trust(reference_T: Tensor, student: StudentView, teacher: TeacherView, tokens: TokenView) -> Tensor:
        gate = first if tokens.progress < switch else second
        return gate.trust(reference_T, student, teacher, tokens)

    return Gate(name=f"{first.name}>{second.name}", trust=trust, needs=merge_needs(first.needs, second.needs))
