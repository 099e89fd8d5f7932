"""Log-probabilities, top-k and divergences of a vocabulary-parallel output layer, without its logits.

Each function takes the final hidden states and this rank's shard of the output weight and fuses the projection with
what the loss needs of the softmax: at most ``chunk_tokens x v`` logits exist at a time, and the backward makes them
again. The maths is that of the softmax; what is particular to vocabulary parallelism:

* ``group``: ranks that share one vocabulary; rank r holds the global ids ``[r v, (r + 1) v)``. None: not sharded.
* ``vocab_size``: the true size. Columns at or beyond it are padding: no probability, no gradient, never read.
* ``hidden`` is whole on every rank. **Its gradient is this rank's partial sum** over its shard, which the caller's
  region mapping (``parallel.collectives``) adds up. The weight's gradient is complete for the shard.
* The gradient that comes in is the same on every rank, as the results are.

Forward: at most two collectives, a gather of three floats per token and rank and a sum of K per token, with or without
a tail (``_tail``). Backward: none.
Products are in the dtype of the inputs, softmax statistics and sums over tiles in fp32 (fp64 when the inputs are).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_tropd.losses.support import first_of_each
from megatron_tropd.losses.vocab_parallel.backends import kernels
from megatron_tropd.losses.vocab_parallel.backends import triton_tiles as _kernel_tiles
from megatron_tropd.losses.vocab_parallel.backends.torch_statistics import (
    Picks,
    Statistics,
    check_ids,
    chunk_gradient,
    chunk_statistics,
    merge_ranks,
)
from megatron_tropd.losses.vocab_parallel.tail import MASKED_LOGIT, log_share, seen, split_gradient, with_listed
from megatron_tropd.losses.vocab_parallel.tiles import (
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
from megatron_tropd.parallel.collectives import Group, all_gather_stack, all_reduce_sum


@dataclass(frozen=True, slots=True, kw_only=True)
class LogProbs:
    """Of ``q = softmax(hidden @ weight.T / temperature)``, per token, nats, fp32, each with gradient."""

    logprob_TK: Tensor  # log q at the given ids
    entropy_T: Tensor  # -sum q log q over the true vocabulary
    logsumexp_T: Tensor  # of the logits already divided by the temperature
    logtail_T: Tensor | None = None  # log of the mass on ids that are not listed; -inf when all are; when asked for


def linear_logprobs(
    hidden_TD: Tensor,
    weight_vD: Tensor,
    ids_TK: Tensor,
    *,
    group: Group = None,
    vocab_size: int,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    tail: bool = False,
    cache_bytes: int = 0,
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
        cache_bytes: keep up to so many bytes of products until the backward, which else makes them all again.
        tail: also the log of the mass outside the given ids (each counts once), at full accuracy however small it is.

    Raises:
        ConfigError: sizes, dtypes or options that do not fit together.
        DataError: an id outside ``[0, vocab_size)``. On an accelerator looking would stall the stream, so there such
            an id gets the log-probability nan instead, which no later check of the loss can miss.

    With incoming gradients g (picked), h (entropy), e (logsumexp), the gradient with respect to logit j is
    ``sum_k g_k 1[j = id_k] + q_j (e - sum_k g_k - h (log q_j + H))``; a gradient t of the log tail adds
    ``t (q_j / tail 1[j not listed] - q_j)``.
    """
    check_projection(hidden_TD, weight_vD)
    check_temperature(temperature)
    shard = shard_of(weight_vD, vocab_size=vocab_size, group=group)
    valid_TK = check_ids(ids_TK, num_tokens=hidden_TD.shape[0], vocab_size=vocab_size)
    by_kernels = kernels.serve(hidden_TD.device, hidden_TD.dtype, ids=ids_TK.shape[1])
    tiles = plan_tiles(hidden_TD, weight_vD, shard, chunk_tokens=chunk_tokens, by_kernels=by_kernels)
    plan = _Plan(
        shard=shard, tiles=tiles, temperature=temperature, group=group, by_kernels=by_kernels, cache_bytes=cache_bytes
    )
    ids_TK, is_first_TK = ids_TK.long(), None
    if tail:
        is_first_TK = first_of_each(ids_TK)
        is_first_TK = is_first_TK if valid_TK is None else is_first_TK & valid_TK
    answer = _LinearLogProbs.apply(hidden_TD, weight_vD, ids_TK, is_first_TK, plan)
    logprob_TK, entropy_T, logsumexp_T, logtail_T = answer
    if valid_TK is not None:
        logprob_TK = logprob_TK.masked_fill(~valid_TK, torch.nan)
    return LogProbs(logprob_TK=logprob_TK, entropy_T=entropy_T, logsumexp_T=logsumexp_T, logtail_T=logtail_T)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    shard: Shard
    tiles: Tiles
    temperature: float
    group: Group
    by_kernels: bool
    cache_bytes: int


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_vD: Tensor, ids_TK: Tensor, is_first_TK: Tensor | None, plan: _Plan
    ) -> tuple[Tensor | None, ...]:
        picked_TK = torch.zeros(ids_TK.shape, dtype=statistics_dtype(hidden_TD), device=hidden_TD.device)
        projection = Projection(
            hidden_TD,
            weight_vD,
            tiles=plan.tiles,
            temperature=plan.temperature,
            cache_bytes=plan.cache_bytes if any(ctx.needs_input_grad) else 0,
        )
        local = _local_statistics(projection, ids_TK, is_first_TK, plan, picked_TK)

        whole = outside = merge_ranks(all_gather_stack(local.stacked(), plan.group))
        picked_TK = all_reduce_sum(picked_TK, plan.group)  # every id lies on one rank, all others contribute 0
        logtail_T, empty_T = None, None
        if is_first_TK is not None:
            whole = with_listed(outside, picked_TK, is_first_TK)
            logtail_T = log_share(outside, whole)
            empty_T = logtail_T.isneginf()
        entropy_T, logsumexp_T = whole.entropy_T, whole.logsumexp_T
        logprob_TK = whole.logprob_(picked_TK)

        # of the columns that are not hidden; where there is none, numbers that can be divided by
        max_T = outside.max_T if empty_T is None else outside.max_T.masked_fill(empty_T, 0.0)
        sumexp_T = outside.sumexp_T if empty_T is None else outside.sumexp_T.masked_fill(empty_T, 1.0)
        tail = (None, None, None) if is_first_TK is None else (is_first_TK, logprob_TK, logtail_T)
        ctx.save_for_backward(hidden_TD, weight_vD, ids_TK, max_T, sumexp_T, entropy_T, *tail, *projection.kept)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        return logprob_TK, entropy_T, logsumexp_T, logtail_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_TK, grad_entropy_T, grad_logsumexp_T, grad_logtail_T = grads
        hidden_TD, weight_vD, ids_TK, max_T, sumexp_T, entropy_T, *others = ctx.saved_tensors
        is_first_TK, logprob_TK, logtail_T, *kept = others
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
        if is_first_TK is not None:
            split = split_gradient(
                constant_T=constant_T,
                slope_T=slope_T,
                grad_logtail_T=grad_logtail_T,
                logtail_T=logtail_T,
                logprob_TK=logprob_TK,
                is_first_TK=is_first_TK,
            )
            constant_T, slope_T = split.constant_T, split.slope_T
            grad_TK = split.listed_TK if grad_TK is None else grad_TK + split.listed_TK

        gradient = ProjectionGradient(
            hidden_TD,
            weight_vD,
            tiles=plan.tiles,
            temperature=plan.temperature,
            needs_hidden=ctx.needs_input_grad[0],
            needs_weight=ctx.needs_input_grad[1],
        )
        projection = Projection(hidden_TD, weight_vD, tiles=plan.tiles, temperature=plan.temperature, kept=kept)
        make = _kernel_tiles.SoftmaxGradient if plan.by_kernels else _SoftmaxGradient
        dlogits = make(
            projection,
            numbers=(max_T, sumexp_T, constant_T, slope_T),
            ids_TK=ids_TK,
            grad_TK=grad_TK,
            is_first_TK=is_first_TK,
            first_id=plan.shard.start,
        )
        for rows, columns in plan.tiles:
            gradient.add(rows, columns, dlogits.tile(rows, columns))
        return *gradient.result(), None, None, None


class _SoftmaxGradient:
    """Makes the tiles of ``q (constant + slope log q)`` plus what the picked ids add; twin in ``_kernel_tiles``."""

    def __init__(
        self,
        projection: Projection,
        *,
        numbers: tuple[Tensor, Tensor, Tensor, Tensor | None],
        ids_TK: Tensor,
        grad_TK: Tensor | None,
        is_first_TK: Tensor | None,
        first_id: int,
    ) -> None:
        """``numbers``: max, sumexp, constant and slope per token. ``is_first_TK``: these picked columns are hidden."""
        self._projection, self._numbers, self._first_id = projection, numbers, first_id
        self._ids_TK, self._grad_TK, self._counts_TK = ids_TK, grad_TK, is_first_TK
        self._scratch = projection.buffer()

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """``[R, w]``, valid until the next call."""
        logits_Rw = self._projection.logits(rows, columns)
        picks = Picks.of(self._ids_TK[rows], first_id=self._first_id + columns.start, width=logits_Rw.shape[1])
        if self._counts_TK is not None:
            picks.hide(logits_Rw, self._counts_TK[rows], hidden=MASKED_LOGIT)
        max_T, sumexp_T, constant_T, slope_T = self._numbers
        dlogits_Rw = chunk_gradient(
            logits_Rw,
            self._scratch.tile(rows, columns),
            max_R=max_T[rows],
            sumexp_R=sumexp_T[rows],
            constant_R=constant_T[rows],
            slope_R=None if slope_T is None else slope_T[rows],
        )
        if self._grad_TK is not None:
            picks.add_to(dlogits_Rw, self._grad_TK[rows])
        return dlogits_Rw


def _local_statistics(
    projection: Projection, ids_TK: Tensor, is_first_TK: Tensor | None, plan: _Plan, picked_TK: Tensor
) -> Statistics:
    """Statistics over this rank's columns, without those of the ids that count when such are named.

    Fills in ``picked_TK`` where this rank holds the id and leaves the rest.
    """
    local = Statistics.empty(plan.tiles.num_tokens, dtype=picked_TK.dtype, device=picked_TK.device)
    if plan.by_kernels:
        _kernel_tiles.add_statistics(
            projection,
            plan.tiles,
            local,
            picked_TK,
            ids_TK=ids_TK,
            first_id=plan.shard.start,
            hide=is_first_TK is not None,
        )
        return local
    scratch = projection.buffer()
    for rows, columns in plan.tiles:
        logits_Rw = projection.logits(rows, columns)
        picks = Picks.of(ids_TK[rows], first_id=plan.shard.start + columns.start, width=logits_Rw.shape[1])
        picks.read_into(picked_TK[rows], logits_Rw)
        if is_first_TK is not None:
            picks.hide(logits_Rw, is_first_TK[rows], hidden=MASKED_LOGIT)
        tile = chunk_statistics(logits_Rw, scratch.tile(rows, columns))
        local.merge_(rows, tile if is_first_TK is None else seen(tile))
    return local
