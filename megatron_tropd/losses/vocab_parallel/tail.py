"""The mass outside a support of listed ids, summed over the columns that hold it: never ``1 - sum``, which keeps no
digit of a tail that is small against 1.

Listed columns are masked in a tile (their logit becomes MASKED_LOGIT, whose exponential is 0) before its statistics are
taken, so these are of the columns *outside*. The statistics of the full vocabulary are those and the few listed logits
merged: both sets come from one pass, and nothing more than their own numbers travels between ranks. The gradient is
split the same way, so the hot loops over a tile stay what they are without a tail.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tropd.losses.vocab_parallel.statistics import (
    MASKED_LOGIT,
    Statistics,
    chunk_statistics,
    drop_fully_masked,
)


def with_listed(outside: Statistics, logits_TK: Tensor, is_first_TK: Tensor) -> Statistics:
    """Take the listed logits, each id once, into the statistics of the columns outside."""
    full = Statistics(outside.max_T.clone(), outside.sumexp_T.clone(), outside.weighted_T.clone())
    if logits_TK.shape[1]:
        few_TK = logits_TK.masked_fill(~is_first_TK, MASKED_LOGIT)
        full.merge_(slice(None), drop_fully_masked(chunk_statistics(few_TK, torch.empty_like(few_TK))))
    return full


def log_share(outside: Statistics, full: Statistics) -> Tensor:
    """Take the log of the probability outside, nats, ``[T]``; -inf where nothing is outside."""
    # the difference of the maxima first: it keeps the digits that the difference of two logsumexps would lose
    return (outside.max_T - full.max_T) + (outside.log_sumexp_T - full.log_sumexp_T)


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitGradient:
    """A gradient ``q_j (constant + slope log q_j)``, and one of the log tail, on either side of the support's edge."""

    listed_TK: Tensor  # to be added at the listed ids, where the tile's own part is 0
    constant_T: Tensor  # outside: ``u_j (constant + slope log u_j)`` with u the softmax over the columns outside
    slope_T: Tensor | None


def split_gradient(
    *,
    constant_T: Tensor,
    slope_T: Tensor | None,
    grad_logtail_T: Tensor | None,
    logtail_T: Tensor,
    logprob_TK: Tensor,
    is_first_TK: Tensor,
) -> SplitGradient:
    """Split the gradient: with t the tail's mass and m the support's, ``q_j = t u_j`` outside.

    ``d log t / d l_j`` is ``u_j - q_j = m u_j`` outside and ``-q_j`` on the support; taken as 0 where there is no tail.
    """
    empty_T = logtail_T.isneginf()
    grad_T = torch.zeros_like(logtail_T) if grad_logtail_T is None else grad_logtail_T.masked_fill(empty_T, 0.0)
    inside_TK = logprob_TK.exp().masked_fill(~is_first_TK, 0.0)
    listed_TK, outside_T = (constant_T - grad_T).unsqueeze(-1), constant_T
    if slope_T is not None:
        listed_TK = listed_TK + slope_T.unsqueeze(-1) * logprob_TK
        outside_T = constant_T + slope_T * logtail_T.masked_fill(empty_T, 0.0)
    tail_T = logtail_T.exp()
    return SplitGradient(
        listed_TK=inside_TK * listed_TK,
        # m as a sum of its own, not as 1 - t: each of the two may be the small one
        constant_T=grad_T * inside_TK.sum(-1) + tail_T * outside_T,
        slope_T=None if slope_T is None else slope_T * tail_T,
    )
