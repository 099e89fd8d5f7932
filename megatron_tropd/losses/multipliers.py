"""Per-token multipliers for data that is not quite from the present student. All are detached.

``drift_weight`` discounts stretches of a reused rollout where the student has moved away; the engine divides by its
sum. ``mismatch_weight`` corrects for a sampler whose probabilities differ from the trainer's; it is an importance
weight and enters the sum as it is.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from megatron_tropd.errors import ConfigError
from megatron_tropd.types import StudentView, TokenView

Mismatch = Literal["none", "truncate", "mask", "truncate_and_mask"]
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
