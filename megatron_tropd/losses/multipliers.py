"""Per-token multipliers: which tokens of a rollout count for more. All are detached.

``drift_weight`` discounts stretches of a reused rollout where the student has moved away, ``prefix_drift_weight`` what
follows a stretch on which student and teacher differ, ``surprise_weight`` tokens that the student was sure of; the
engine divides by their sum. ``mismatch_weight`` corrects for a sampler whose probabilities differ from the trainer's;
it is an importance weight and enters the sum as it is.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from megatron_tropd.errors import ConfigError
from megatron_tropd.types import Region, StudentView, TeacherView, TokenView

Mismatch = Literal["none", "truncate", "mask", "truncate_and_mask"]
WHOLE_SEQUENCE = ("drift_gate", "prefix_drift")
"""Multipliers for which every token of a sequence must be at hand."""
MISMATCHES: tuple[Mismatch, ...] = ("none", "truncate", "mask", "truncate_and_mask")


@torch.no_grad()
def drift_weight(student: StudentView, tokens: TokenView, *, tau: float, block: int) -> Tensor:
    """Weigh tokens by ``exp(-tau |mean drift of the block|)``, ``drift = log q_old(y) - log q(y)``, ``[T]``, (0, 1].

    A block is ``block`` consecutive positions of one sequence (position 0 is the sequence's first token); its mean runs
    over the predictions given here, so a block must not be cut across calls. 1 everywhere when the rollout is new.
    Source: drift gate, arXiv 2606.24084.
    """
    keys_T2 = torch.stack((tokens.sequence_T, tokens.position_T // block), dim=-1)
    _, block_T, count_B = torch.unique(keys_T2, dim=0, return_inverse=True, return_counts=True)
    drift_T = (student.old_logprob_T - student.logprob_T).double()
    total_B = drift_T.new_zeros(count_B.shape).index_add(0, block_T, drift_T)
    return torch.exp(-tau * (total_B / count_B).abs())[block_T].to(student.logprob_T.dtype)


@torch.no_grad()
def prefix_drift_weight(student: StudentView, teacher: TeacherView, tokens: TokenView, *, gain: float) -> Tensor:
    """Weigh CONTINUATION tokens by ``1 + gain (1 - sum_{s<t} |r_s| / sum_s |r_s|)``, ``[T]``; 1 on PREFIX tokens.

    ``r = log p - log q`` at the rollout's weights, nats; both sums run over the sequence's CONTINUATION tokens, so a
    first token weighs ``1 + gain`` and one after all the differences 1; without any difference all weigh ``1 + gain``.
    Every token of a sequence must be given in one call. Source: IW-OPD, arXiv 2606.22600.
    """
    here_T = tokens.region_T == Region.CONTINUATION
    ratio_T = (teacher.logprob_T - student.old_logprob_T).double()
    gap_T = torch.where(here_T, ratio_T.abs(), 0.0)
    _, sequence_T, count_S = torch.unique_consecutive(tokens.sequence_T, return_inverse=True, return_counts=True)
    total_S = gap_T.new_zeros(count_S.shape).index_add(0, sequence_T, gap_T)
    before_T = gap_T.cumsum(0) - gap_T - (total_S.cumsum(0) - total_S)[sequence_T]
    share_T = torch.where(total_S[sequence_T] > 0, before_T / total_S[sequence_T].clamp(min=1e-300), 0.0)
    weight_T = torch.where(here_T, 1.0 + gain * (1.0 - share_T.clamp(0.0, 1.0)), 1.0)
    return weight_T.to(student.logprob_T.dtype)


@torch.no_grad()
def surprise_weight(student: StudentView, tokens: TokenView, *, gain: float) -> Tensor:
    """Weigh CONTINUATION tokens by ``1 + gain (1 - q_old(y))``, ``[T]``; 1 on PREFIX tokens.

    Source: SuRe, arXiv 2608.25643.
    """
    surprise_T = -torch.expm1(student.old_logprob_T)
    return torch.where(tokens.region_T == Region.CONTINUATION, 1.0 + gain * surprise_T, 1.0)


@torch.no_grad()
def mismatch_weight(student: StudentView, tokens: TokenView, *, kind: Mismatch, cap: float) -> Tensor:
    """Weigh each token given the gap ``g = log q_old(y) - log q_rollout(y)``, nats; ``[T]``.

    truncate: ``min(exp g, cap)``; mask: 1 while ``exp g`` lies in ``[1/cap, cap]``, else 0; or the product of both.
    """
    if kind not in MISMATCHES:
        raise ConfigError(f"mismatch={kind!r} must be one of {', '.join(MISMATCHES)}.")
    gap_T = student.old_logprob_T - tokens.rollout_logprob_T
    weight_T = torch.ones_like(gap_T)
    if kind in ("truncate", "truncate_and_mask"):
        weight_T = gap_T.clamp(max=math.log(cap)).exp()
    if kind in ("mask", "truncate_and_mask"):
        weight_T = weight_T * (gap_T.abs() <= math.log(cap))
    return weight_T
