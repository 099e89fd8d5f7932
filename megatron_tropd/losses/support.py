"""Divergences over a small support of candidate tokens, and what they do with the mass outside it (the tail).

Tails, for a support A with masses ``m_A`` (teacher) and ``q_A`` (student):

    none    the plain partial sum over A. May be negative, and must stay so: a clamp at 0 would drop the token's
            gradient. Does not vanish at p = q.
    bucket  everything outside A becomes one more category: the exact KL of the coarsened distributions, >= 0.
    renorm  both sides are renormalised on A: an exact KL as well, blind to how much mass A holds.

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

# Log-probs carry the rounding of the logits they came from, several units in the last place of 1.0. A tail mass
# below this many of them is noise, and dividing by noise would blow up the gradient.
_TAIL_FLOOR_ULPS = 8.0

_Value = TypeVar("_Value")


def required(value: _Value | None, *, field: str, need: str) -> _Value:
    """``value``, or an EngineError naming the missing view field and the ``Needs`` entry that asks for it."""
    if value is None:
        raise EngineError(f"{field} is None, but the method asks for it through Needs.{need}: provide it in the view.")
    return value


def check_tail(tail: str) -> None:
    """Raises ConfigError unless ``tail`` is one of TAILS."""
    if tail not in TAILS:
        raise ConfigError(f"tail={tail!r} must be one of {', '.join(TAILS)}.")


def log_mass(logprob_TK: Tensor, mask_TK: Tensor | None = None) -> Tensor:
    """Log of the probability held by the support, nats, ``[T]``; fp64, so that the sum adds no rounding."""
    wide_TK = logprob_TK.double()
    if mask_TK is not None:
        wide_TK = wide_TK.masked_fill(~mask_TK, -math.inf)
    return torch.logsumexp(wide_TK, dim=-1)


def log_tail(logprob_TK: Tensor, mask_TK: Tensor | None = None) -> Tensor:
    """Log of the probability outside the support, nats, ``[T]``, fp64 and finite.

    ``log(1 - exp(s))`` with ``s`` the log mass of the support, through expm1 or log1p, whichever is exact there.

    Accuracy: no digit is lost here, so the error is that of the log-probs given. An absolute error d in them (about
    1e-7 for exact fp32 log-probs, 1e-6 when they were differences of fp32 logits near 20) is a relative error
    ``d / tail`` of the tail: 1-10 % at a support mass of 0.99999, in fp64 1e-11. Tails below 8 units in the last
    place of 1.0 (9.5e-7 in fp32) are raised to that; the gradient passes through the floor as if it were the true
    tail, so that equal distributions still give a zero gradient and others a bounded one.
    """
    log_mass_T = log_mass(logprob_TK, mask_TK)
    floor = _TAIL_FLOOR_ULPS * torch.finfo(logprob_TK.dtype).eps
    floored_T = log_mass_T + (log_mass_T.clamp(max=-floor) - log_mass_T).detach()
    # Each formula sees a harmless value where the other one is used: `where` hides a nan forward, not backward.
    heavy_T = floored_T > -math.log(2.0)
    from_heavy_T = torch.log(-torch.expm1(torch.where(heavy_T, floored_T, -1.0)))
    from_light_T = torch.log1p(-torch.exp(torch.where(heavy_T, -1.0, floored_T)))
    return torch.where(heavy_T, from_heavy_T, from_light_T)


def kl_on_support(first_TK: Tensor, second_TK: Tensor, *, tail: Tail, mask_TK: Tensor | None = None) -> Tensor:
    """``sum_A f (log f - log g)`` plus the tail's share, nats, ``[T]``; differentiable in both arguments.

    Args:
        first_TK: log-probs of the distribution the expectation is under (teacher: forward KL, student: reverse KL).
        second_TK: log-probs of the other one on the same ids.
        tail: what to do with the mass outside the support, see the module docstring.
        mask_TK: True where a column counts; None: everywhere.
    """
    check_tail(tail)
    dtype = first_TK.dtype
    if tail == "renorm":
        first_TK = first_TK - log_mass(first_TK, mask_TK).to(dtype)[:, None]
        second_TK = second_TK - log_mass(second_TK, mask_TK).to(dtype)[:, None]
    if mask_TK is not None:
        first_TK = first_TK.masked_fill(~mask_TK, 0.0)
        second_TK = second_TK.masked_fill(~mask_TK, 0.0)
    kl_T = (first_TK.exp() * (first_TK - second_TK)).sum(-1)
    if tail != "bucket":
        return kl_T
    return kl_T + _bucket(first_TK, second_TK, mask_TK).to(dtype)


def _bucket(first_TK: Tensor, second_TK: Tensor, mask_TK: Tensor | None) -> Tensor:
    first_tail_T, second_tail_T = log_tail(first_TK, mask_TK), log_tail(second_TK, mask_TK)
    return first_tail_T.exp() * (first_tail_T - second_tail_T)
