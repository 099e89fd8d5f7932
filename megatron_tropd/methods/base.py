"""Methods, and the only code that interprets one.

A method says, for every valid token, which loss it gets:

    PREFIX        prefix
    CONTINUATION  g * trusted + (1 - g) * outlier + extra        g in [0, 1] from the gate
                  + reward_weight * reward + reference_weight * reference

It never communicates, masks, averages or reads config: those wishes (normalization, special tokens, temperature,
schedule) are plain fields that the trainer honors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from megatron_tropd.losses.gates import ALL, Gate, RatioSource, acceptance, reference_logprob
from megatron_tropd.losses.multipliers import drift_weight, mismatch_weight, prefix_drift_weight, surprise_weight
from megatron_tropd.losses.reduce import Normalization
from megatron_tropd.losses.terms import NONE, Term, merge_needs
from megatron_tropd.methods.options import MethodOptions, SpecialTokens
from megatron_tropd.methods.schedule import PrefixSchedule, unguided
from megatron_tropd.types import Needs, Region, StudentView, TeacherView, TokenLoss, TokenView

LOG_CERTAIN = math.log(0.9)
"""Log-prob, nats, above which a student is certain of a token: less than a tenth of a push on its log-prob is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A distillation objective composed of parts. Build one with ``megatron_tropd.methods.build_method``."""

    gate: Gate
    trusted: Term
    outlier: Term = NONE
    prefix: Term = NONE
    extra: Term = NONE  # added on every CONTINUATION token, whatever the gate says
    reward: Term = NONE  # the same, ``settings.reward_weight`` times: the answer's own reward
    reference: Term = NONE  # the same, ``settings.reference_weight`` times: not to leave a reference
    schedule: PrefixSchedule = field(default_factory=unguided)
    settings: MethodOptions = field(default_factory=MethodOptions)
    name: str = ""
    end_ids: tuple[int, ...] = ()  # ids that end a response and count as one token in the views; empty: none do

    @property
    def needs(self) -> Needs:
        """Return the fields that the views must contain."""
        needs = merge_needs(self.gate.needs, *(term.needs for term in self._terms))
        return replace(needs, end_ids=self.end_ids)

    @property
    def guided(self) -> bool:
        """Say whether some sequences start with a teacher-written prefix."""
        return self.schedule.guided

    @property
    def normalization(self) -> Normalization:
        """Say what the loss is a mean over: tokens, sequences or regions."""
        return self.settings.normalization

    @property
    def temperature(self) -> float:
        """Return the divisor of student and teacher logits, applied before every log-prob in the views."""
        return self.settings.temperature

    @property
    def ratio(self) -> RatioSource:
        """Say which student log-prob enters the gate's ratio."""
        return self.settings.ratio

    @property
    def special_tokens(self) -> SpecialTokens:
        """Say whether special tokens keep their loss: see ``losses.reduce.special_token_keep``."""
        return self.settings.special_tokens

    @property
    def vanishes_at_teacher(self) -> bool:
        """Say whether the loss gradient is 0 when student and teacher agree (some objectives are not meant to)."""
        return all(term.vanishes for term in self._terms)

    @property
    def on_policy_terms(self) -> tuple[str, ...]:
        """Name the terms whose gradient takes the student's own tokens for samples of the weights that learn."""
        return tuple(dict.fromkeys(term.name for term in self._continuation if term.on_policy))

    @property
    def sampled_terms(self) -> tuple[str, ...]:
        """Name the terms whose gradient takes the student's tokens for draws from its own distribution, as it is."""
        return tuple(dict.fromkeys(term.name for term in self._continuation if term.sampled))

    @property
    def _continuation(self) -> tuple[Term, ...]:
        return (self.trusted, self.outlier, self.extra, self.reward, self.reference)

    @property
    def distills(self) -> bool:
        """Say whether something that the student writes is compared with what the teacher would write."""
        return not (self.trusted is NONE and self.outlier is NONE and self.extra is NONE)

    @property
    def teaches_certain_students(self) -> bool:
        """Say whether an outlier of which the student is certain still has a gradient that does not vanish."""
        of_outliers = self.trusted if self.gate is ALL else self.outlier
        return of_outliers.names_alternatives or self.extra.names_alternatives

    @property
    def _terms(self) -> tuple[Term, ...]:
        return (self.trusted, self.outlier, self.prefix, self.extra, self.reward, self.reference)

    def token_loss(self, student: StudentView, teacher: TeacherView, tokens: TokenView) -> TokenLoss:
        """Return the loss of every valid token, nats, before masks, weights and sums; ``[T]``, differentiable in the
        student.

        ``weight_T``, when there, is not yet multiplied into ``loss_T``.
        """
        gate_T = self.gate_weight(student, teacher, tokens)
        prefix_T = (tokens.region_T == Region.PREFIX).to(gate_T.dtype)
        continuation_T = (1.0 - prefix_T) * self._mismatch_weight(student, tokens)
        shares = (
            (self.trusted, continuation_T * gate_T),
            (self.outlier, continuation_T * (1.0 - gate_T)),
            (self.prefix, prefix_T),
            (self.extra, continuation_T),
            (self.reward, continuation_T * self.settings.reward_weight),
            (self.reference, continuation_T * self.settings.reference_weight),
        )
        loss_T = torch.where(torch.zeros_like(prefix_T, dtype=torch.bool), student.logprob_T, 0.0)
        for term, weight_T in _merge(shares).items():
            loss_T = loss_T + _weighted(term, weight_T, student, teacher)
        stats = _stats(gate_T, student, teacher, tokens, self.ratio)
        return TokenLoss(
            loss_T=loss_T,
            stats=stats,
            weight_T=self._multiplier(student, teacher, tokens),
            stat_weights={"stuck_fraction": stats["total_variation"]},
        )

    @torch.no_grad()
    def gate_weight(self, student: StudentView, teacher: TeacherView, tokens: TokenView) -> Tensor:
        """Return the trust in each token, in [0, 1]; 1 on PREFIX tokens, which no gate judges; ``[T]``."""
        reference_T = reference_logprob(student, tokens, self.ratio)
        trust_T = self.gate.trust(reference_T, student, teacher, tokens).to(reference_T.dtype)
        return torch.where(tokens.region_T == Region.PREFIX, 1.0, trust_T)

    def _mismatch_weight(self, student: StudentView, tokens: TokenView) -> Tensor | float:
        if self.settings.mismatch == "none":
            return 1.0
        return mismatch_weight(student, tokens, kind=self.settings.mismatch, cap=self.settings.mismatch_cap)

    def _multiplier(self, student: StudentView, teacher: TeacherView, tokens: TokenView) -> Tensor | None:
        settings = self.settings
        match settings.multiplier:
            case "drift_gate":
                return drift_weight(student, tokens, tau=settings.drift_tau, block=settings.drift_block)
            case "prefix_drift":
                return prefix_drift_weight(student, teacher, tokens, gain=settings.prefix_drift_gain)
            case "surprise":
                return surprise_weight(student, tokens, gain=settings.surprise_gain)
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """A named method: its own options, how to build it, and where it comes from."""

    summary: str
    source: str
    build: Callable[[Any], Method]  # from an instance of ``options``
    options: type[MethodOptions]
    defaults: Mapping[str, object] = field(default_factory=dict)  # replaces those of the options


def _merge(shares: tuple[tuple[Term, Tensor], ...]) -> dict[Term, Tensor]:
    """Sum the weights per distinct term, so that a term used twice (a full-vocabulary one is costly) is computed
    once.
    """
    weights: dict[Term, Tensor] = {}
    for term, weight_T in shares:
        if term is not NONE:
            weights[term] = weights[term] + weight_T if term in weights else weight_T
    return weights


def _weighted(term: Term, weight_T: Tensor, student: StudentView, teacher: TeacherView) -> Tensor:
    """Return ``weight * term``, exactly 0 in value and gradient where the weight is 0, even where the term is not
    finite.
    """
    keep_T = weight_T > 0.0
    loss_T = term.loss(_gradient_only_where(keep_T, student), teacher)
    return torch.where(keep_T, weight_T.detach() * loss_T, torch.zeros_like(loss_T))


def _gradient_only_where(keep_T: Tensor, student: StudentView) -> StudentView:
    """Drop gradients outside ``keep_T`` and keep the values; they are dropped, not multiplied by 0 (0 * inf would be
    nan).
    """
    support_TK, logtail_T = student.support_logprob_TK, student.support_logtail_T
    if support_TK is not None:
        support_TK = torch.where(keep_T[:, None], support_TK, support_TK.detach())
    if logtail_T is not None:
        logtail_T = torch.where(keep_T, logtail_T, logtail_T.detach())
    logprob_T = torch.where(keep_T, student.logprob_T, student.logprob_T.detach())
    return replace(student, logprob_T=logprob_T, support_logprob_TK=support_TK, support_logtail_T=logtail_T)


@torch.no_grad()
def _stats(
    gate_T: Tensor, student: StudentView, teacher: TeacherView, tokens: TokenView, ratio: RatioSource
) -> dict[str, Tensor]:
    """Return per-token values, nats or shares; ``prefix_*`` are meant for PREFIX tokens, all others for
    CONTINUATION.

    ``stuck_fraction`` is to be averaged over outliers: each token by its chance to fail the acceptance test, whatever
    the method's own gate, 1 - min(1, rho).
    """
    reference_T = reference_logprob(student, tokens, ratio)
    stats = {
        "trusted_fraction": gate_T,
        "outlier_fraction": 1.0 - gate_T,
        "total_variation": 1.0 - acceptance(teacher.logprob_T - reference_T),
        "stuck_fraction": (reference_T > LOG_CERTAIN).to(reference_T.dtype),
        "reverse_kl": student.old_logprob_T - teacher.logprob_T,
        "logprob_gap": (tokens.rollout_logprob_T - student.old_logprob_T).abs(),
        "prefix_nll": -student.logprob_T.detach(),
    }
    entropies = {
        "student_entropy": student.entropy_T,
        "teacher_entropy": teacher.entropy_T,
        "teacher_entropy_bound": teacher.entropy_bound_T,
    }
    return stats | {name: entropy_T.detach() for name, entropy_T in entropies.items() if entropy_T is not None}
