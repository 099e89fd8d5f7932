"""Divergences over a small support of candidate tokens, and what they do with the mass outside it (the tail).

Tails, for a support A with masses ``m_A`` (teacher) and ``q_A`` (student):

    none    the plain partial sum over A. May be negative, and must stay so: a clamp at 0 would drop the token's
            gradient. Does not vanish at p = q.
    bucket  everything outside A becomes one more category: the exact KL of the coarsened distributions, >= 0.
    renorm  both sides are renormalized on A: an exact KL as well, blind to how much mass A holds.

``losses.terms.rkl_topk`` knows a fourth, ``sampled``: the bucket, and the sampled token for what is in it.

All log-probs are full-vocabulary log-softmax values in nats. Columns where ``mask_TK`` is False are ignored.
"""

from __future__ import annotations

import math
from typing import Literal, TypeVar

import torch
from torch import Tensor

from megatron_tropd.errors import ConfigError, EngineError

Tail = Literal["none", "bucket", "renorm"]
TAILS: tuple[Tail, ...] = ("none", "bucket", "renorm")
ReverseTail = Literal["none", "bucket", "renorm", "sampled"]  # of rkl_topk

# Log-probs carry the rounding of the logits they came from, several units in the last place of 1.0. A tail mass
# below this many of them is noise, and dividing by noise would blow up the gradient.
_TAIL_FLOOR_ULPS = 8.0

_Value = TypeVar("_Value")


def required(value: _Value | None, *, field: str, need: str) -> _Value:
    """Return ``value``, or an EngineError naming the missing view field and the ``Needs`` entry that requests it."""
    if value is None:
        raise EngineError(f"{field} is None, but the method requests it through Needs.{need}: provide it in the view.")
    return value


def check_tail(tail: str) -> None:
    """Refuse a ``tail`` that is none of TAILS."""
    if tail not in TAILS:
        raise ConfigError(f"tail={tail!r} must be one of {', '.join(TAILS)}.")


def log_mass(logprob_TK: Tensor, mask_TK: Tensor | None = None) -> Tensor:
    """Take the log of the probability held by the support, nats, ``[T]``; fp64, so that the sum adds no rounding."""
    wide_TK = logprob_TK.double()
    if mask_TK is not None:
        wide_TK = wide_TK.masked_fill(~mask_TK, -math.inf)
    return torch.logsumexp(wide_TK, dim=-1)


@torch.no_grad()
def log_tail(logprob_TK: Tensor, mask_TK: Tensor | None = None) -> Tensor:
    """Take the log of the mass outside the support from its own log-probs: nats, ``[T]``, finite, no gradient.

    For teachers that report nothing but their top k (a server); those with logits sum the tail itself
    (``vocab_parallel``). ``log(1 - sum)`` loses no digit here, so the error is that of the log-probs given: an absolute
    error d in them (1e-7 to 1e-6 in fp32) is a relative error ``d / tail`` of the tail, 1-10 % at a support mass of
    0.99999. Tails below 8 units in the last place of 1.0 (9.5e-7 in fp32) are noise and raised to that.
    """
    floor = _TAIL_FLOOR_ULPS * torch.finfo(logprob_TK.dtype).eps
    return torch.log(-torch.expm1(log_mass(logprob_TK, mask_TK).clamp(max=-floor)))


@torch.no_grad()
def entropy_at_most(logprob_TK: Tensor, logtail_T: Tensor, mask_TK: Tensor | None = None, *, vocab_size: int) -> Tensor:
    """Bound from above the entropy, nats, ``[T]``: exact on the support, the tail spread evenly over the other ids.

    ``logtail_T``: log mass outside the support, as ``log_tail`` gives it.
    """
    mask_TK = torch.ones_like(logprob_TK, dtype=torch.bool) if mask_TK is None else mask_TK
    wide_TK = logprob_TK.double()
    inside_T = -(wide_TK.exp() * wide_TK).masked_fill(~mask_TK, 0.0).sum(-1)
    others_T = (vocab_size - mask_TK.sum(-1)).double()
    tail_T = torch.where(others_T > 0, logtail_T.double(), -math.inf)
    outside_T = torch.where(tail_T.isneginf(), 0.0, tail_T.exp() * (others_T.clamp(min=1.0).log() - tail_T))
    return (inside_T + outside_T).to(logprob_TK.dtype)


def first_of_each(ids_TK: Tensor) -> Tensor:
    """Mark where a token lists an id for the first time, bool ``[T, K]``."""
    sorted_TK, order_TK = ids_TK.sort(dim=-1, stable=True)
    fresh_TK = torch.ones_like(ids_TK, dtype=torch.bool)
    fresh_TK[:, 1:] = sorted_TK[:, 1:] != sorted_TK[:, :-1]
    return torch.zeros_like(fresh_TK).scatter_(1, order_TK, fresh_TK)


def tail_beside(logtail_T: Tensor, logprob_T: Tensor, inside_T: Tensor) -> Tensor:
    """Take the log mass outside a support, from that outside the support *and* one more id; differentiable in both.

    Args:
        logtail_T: log mass on what is neither in the support nor the id.
        logprob_T: log-prob of the id.
        inside_T: bool, True where the id is in the support anyway.
    """
    return torch.where(inside_T, logtail_T, torch.logaddexp(logtail_T, logprob_T))


def _seen_on_support(logprob_TK: Tensor, mask_TK: Tensor | None, tail: Tail) -> Tensor:
    """Return log-probs as ``tail`` makes them, ``[T, K]``: renormalized, or as they are; 0 where none counts."""
    if tail == "renorm":
        logprob_TK = logprob_TK - log_mass(logprob_TK, mask_TK).to(logprob_TK.dtype)[:, None]
    return logprob_TK if mask_TK is None else logprob_TK.masked_fill(~mask_TK, 0.0)


def kl_on_support(
    first_TK: Tensor,
    second_TK: Tensor,
    *,
    tail: Tail,
    mask_TK: Tensor | None = None,
    logtails: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return ``sum_A f (log f - log g)`` plus the tail's share, nats, ``[T]``; differentiable in both distributions.

    Args:
        first_TK: log-probs of the distribution the expectation is under (teacher: forward KL, student: reverse KL).
        second_TK: log-probs of the other one on the same ids.
        tail: what to do with the mass outside the support, see the module docstring.
        mask_TK: True where a column counts; None: everywhere.
        logtails: log of either's mass outside the support, ``[T]``, for the bucket; -inf: nothing is outside.

    Raises:
        EngineError: a bucket without the tails it needs.
    """
    check_tail(tail)
    dtype = first_TK.dtype
    first_TK, second_TK = (_seen_on_support(x, mask_TK, tail) for x in (first_TK, second_TK))
    kl_T = (first_TK.exp() * (first_TK - second_TK)).sum(-1)
    if tail != "bucket":
        return kl_T
    first_tail_T, second_tail_T = required(logtails, field="logtails", need="tail_mass")
    # an empty tail adds 0 and has no gradient; it is replaced before any arithmetic, which would make nan of it
    empty_T = first_tail_T.isneginf()
    first_tail_T, second_tail_T = first_tail_T.masked_fill(empty_T, 0.0), second_tail_T.masked_fill(empty_T, 0.0)
    return kl_T + (first_tail_T.exp() * (first_tail_T - second_tail_T)).to(dtype)


def jsd_on_support(
    teacher_TK: Tensor,
    student_TK: Tensor,
    *,
    beta: float,
    tail: Tail,
    mask_TK: Tensor | None = None,
    logtails: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Return ``beta KL(p||m) + (1-beta) KL(q||m)``, ``m = beta p + (1-beta) q``, nats, ``[T]``; 0 < beta < 1.

    Arguments as of ``kl_on_support``, the teacher's p first; the mixture is of the two as ``tail`` makes them.
    """
    check_tail(tail)
    dtype = student_TK.dtype
    teacher_TK, student_TK = (_seen_on_support(x, mask_TK, tail) for x in (teacher_TK, student_TK))
    jsd_T = _jsd_parts(teacher_TK, student_TK, beta).sum(-1)
    if tail != "bucket":
        return jsd_T
    # an empty tail has no mass and no gradient; the log of what holds none is as good finite, and no source of nan
    teacher_T, student_T = required(logtails, field="logtails", need="tail_mass")
    tail_T = _jsd_parts(teacher_T.clamp(min=_LOG_NOTHING), student_T.clamp(min=_LOG_NOTHING), beta)
    return jsd_T + tail_T.to(dtype)


_LOG_NOTHING = -1e4


def _jsd_parts(logp: Tensor, logq: Tensor, beta: float) -> Tensor:
    """Return ``beta p log(p/m) + (1-beta) q log(q/m)`` entry by entry: exactly 0, gradient too, where both agree."""
    log_ratio = logq - logp
    of_teacher = logp.exp() * _log_mixed(log_ratio, beta)
    of_student = logq.exp() * _log_mixed(-log_ratio, 1.0 - beta)
    return -(beta * of_teacher + (1.0 - beta) * of_student)


def _log_mixed(x: Tensor, share: float) -> Tensor:
    """Return ``log(share + (1-share) exp(x))``, which keeps its digits at x = 0 and is finite for every x."""
    below = torch.log1p((1.0 - share) * torch.expm1(x.clamp(max=0.0)))
    return torch.where(x <= 0.0, below, x + torch.log1p(share * torch.expm1(-x.clamp(min=0.0))))
