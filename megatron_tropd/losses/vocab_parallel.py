"""Log-probabilities, top-k and divergences of a vocabulary-parallel output layer, without its logits.

Each function takes the final hidden states and this rank's shard of the output weight and fuses the projection with
what the loss needs of the softmax: at most ``chunk_tokens x v`` logits exist at a time, and the backward makes them
again. The maths is that of the softmax; what is particular to vocabulary parallelism:

* ``group``: ranks that share one vocabulary; rank r holds the global ids ``[r v, (r + 1) v)``. None: not sharded.
* ``vocab_size``: the true size. Columns at or beyond it are padding: no probability, no gradient, never read.
* ``hidden`` is whole on every rank. **Its gradient is this rank's partial sum** over its shard, which the caller's
  region mapping (``parallel.collectives``) adds up. The weight's gradient is complete for the shard.
* The gradient that comes in is the same on every rank, as the results are.

Forward: at most two collectives, a gather of three floats per token and rank and a sum of K per token. Backward: none.
Products are in the dtype of the inputs, softmax statistics and sums over tiles in fp32 (fp64 when the inputs are).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_tropd.losses._chunking import (
    Buffer,
    Projection,
    ProjectionGradient,
    Shard,
    Tiles,
    check_projection,
    check_temperature,
    plan_tiles,
    shard_of,
    statistics_dtype,
)
from megatron_tropd.losses._divergence import linear_divergence
from megatron_tropd.losses._statistics import (
    Picks,
    Statistics,
    check_ids,
    chunk_gradient,
    chunk_statistics,
    merge_ranks,
)
from megatron_tropd.losses._topk import TopK, linear_topk
from megatron_tropd.parallel.collectives import Group, all_gather_stack, all_reduce_sum

__all__ = ["LogProbs", "TopK", "linear_divergence", "linear_logprobs", "linear_topk"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogProbs:
    """Of ``q = softmax(hidden @ weight.T / temperature)``, per token, nats, fp32, each with gradient."""

    logprob_TK: Tensor  # log q at the given ids
    entropy_T: Tensor  # -sum q log q over the true vocabulary
    logsumexp_T: Tensor  # of the logits already divided by the temperature


def linear_logprobs(
    hidden_TD: Tensor,
    weight_vD: Tensor,
    ids_TK: Tensor,
    *,
    group: Group = None,
    vocab_size: int,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> LogProbs:
    """Log-probabilities of given tokens, entropy and logsumexp over the whole vocabulary.

    Args:
        hidden_TD: final hidden states, the same on every rank. Its gradient is a partial sum, see the module.
        weight_vD: this rank's rows of the output weight, same dtype.
        ids_TK: global token ids, the same on every rank, in any order, duplicates allowed; K may be 0.
        group: ranks that share the vocabulary; None when it is not sharded.
        vocab_size: true size; further columns are padding.
        temperature: divides the logits.
        chunk_tokens: at most ``chunk_tokens * v`` logits are held; None picks a size for the device.

    Raises:
        ConfigError: sizes, dtypes or options that do not fit together.
        DataError: an id outside ``[0, vocab_size)``. On an accelerator looking would stall the stream, so there such
            an id gets the log-probability nan instead, which no later check of the loss can miss.

    With incoming gradients g (picked), h (entropy), e (logsumexp), the gradient with respect to logit j is
    ``sum_k g_k 1[j = id_k] + q_j (e - sum_k g_k - h (log q_j + H))``.
    """
    check_projection(hidden_TD, weight_vD)
    check_temperature(temperature)
    shard = shard_of(weight_vD, vocab_size=vocab_size, group=group)
    tiles = plan_tiles(hidden_TD, weight_vD, shard, chunk_tokens=chunk_tokens)
    valid_TK = check_ids(ids_TK, num_tokens=hidden_TD.shape[0], vocab_size=vocab_size)
    plan = _Plan(shard=shard, tiles=tiles, temperature=temperature, group=group)
    logprob_TK, entropy_T, logsumexp_T = _LinearLogProbs.apply(hidden_TD, weight_vD, ids_TK.long(), plan)
    if valid_TK is not None:
        logprob_TK = logprob_TK.masked_fill(~valid_TK, torch.nan)
    return LogProbs(logprob_TK=logprob_TK, entropy_T=entropy_T, logsumexp_T=logsumexp_T)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    shard: Shard
    tiles: Tiles
    temperature: float
    group: Group


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_vD: Tensor, ids_TK: Tensor, plan: _Plan) -> tuple[Tensor, ...]:
        picked_TK = torch.zeros(ids_TK.shape, dtype=statistics_dtype(hidden_TD), device=hidden_TD.device)
        local = _local_statistics(hidden_TD, weight_vD, ids_TK, plan, picked_TK)

        whole = merge_ranks(all_gather_stack(local.stacked(), plan.group))
        picked_TK = all_reduce_sum(picked_TK, plan.group)  # every id lies on one rank, all others contribute 0
        entropy_T, logsumexp_T = whole.entropy_T, whole.logsumexp_T
        logprob_TK = whole.logprob_(picked_TK)

        ctx.save_for_backward(hidden_TD, weight_vD, ids_TK, whole.max_T, whole.sumexp_T, entropy_T)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        return logprob_TK, entropy_T, logsumexp_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_TK, grad_entropy_T, grad_logsumexp_T = grads
        hidden_TD, weight_vD, ids_TK, max_T, sumexp_T, entropy_T = ctx.saved_tensors
        plan: _Plan = ctx.plan

        # d loss / d logit = q (constant + slope log q) + what the picked ids add
        constant_T = torch.zeros_like(max_T)
        slope_T = None
        if grad_TK is not None:
            constant_T -= grad_TK.sum(-1)
        if grad_logsumexp_T is not None:
            constant_T += grad_logsumexp_T
        if grad_entropy_T is not None:
            constant_T -= grad_entropy_T * entropy_T
            slope_T = -grad_entropy_T

        gradient = ProjectionGradient(
            hidden_TD,
            weight_vD,
            tiles=plan.tiles,
            temperature=plan.temperature,
            needs_hidden=ctx.needs_input_grad[0],
            needs_weight=ctx.needs_input_grad[1],
        )
        projection = Projection(hidden_TD, weight_vD, tiles=plan.tiles, temperature=plan.temperature)
        scratch = Buffer(plan.tiles, dtype=max_T.dtype, device=max_T.device)
        for rows, columns in plan.tiles:
            dlogits_Rw = chunk_gradient(
                projection.logits(rows, columns),
                scratch.tile(rows, columns),
                max_R=max_T[rows],
                sumexp_R=sumexp_T[rows],
                constant_R=constant_T[rows],
                slope_R=None if slope_T is None else slope_T[rows],
            )
            if grad_TK is not None:
                _picks(ids_TK, plan, rows, columns).add_to(dlogits_Rw, grad_TK[rows])
            gradient.add(rows, columns, dlogits_Rw)
        return *gradient.result(), None, None


def _local_statistics(
    hidden_TD: Tensor, weight_vD: Tensor, ids_TK: Tensor, plan: _Plan, picked_TK: Tensor
) -> Statistics:
    """Statistics over this rank's columns; fills in ``picked_TK`` where it holds the id and leaves the rest."""
    dtype, device = statistics_dtype(hidden_TD), hidden_TD.device
    local = Statistics.empty(hidden_TD.shape[0], dtype=dtype, device=device)
    projection = Projection(hidden_TD, weight_vD, tiles=plan.tiles, temperature=plan.temperature)
    scratch = Buffer(plan.tiles, dtype=dtype, device=device)
    for rows, columns in plan.tiles:
        logits_Rw = projection.logits(rows, columns)
        _picks(ids_TK, plan, rows, columns).read_into(picked_TK[rows], logits_Rw)
        local.merge_(rows, chunk_statistics(logits_Rw, scratch.tile(rows, columns)))
    return local


def _picks(ids_TK: Tensor, plan: _Plan, rows: slice, columns: slice) -> Picks:
    first_id = plan.shard.start + columns.start
    return Picks.of(ids_TK[rows], first_id=first_id, width=columns.stop - columns.start)
