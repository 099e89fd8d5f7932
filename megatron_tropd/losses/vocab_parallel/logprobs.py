"""Log-probabilities of a vocabulary-parallel output layer, without its logits.

``linear_logprobs``, ``linear_topk`` and ``linear_divergence`` take the final hidden states and this rank's shard of the
output weight, and fuse the projection with what the loss needs of the softmax: at most ``chunk_tokens x v`` logits
exist at a time, and the backward makes them again. The maths is that of the softmax; what is particular to vocabulary
parallelism:

* ``group``: ranks that share one vocabulary; rank r holds the global ids ``[r v, (r + 1) v)``. None: not sharded.
* ``vocab_size``: the true size. Columns at or beyond it are padding: no probability, no gradient, never read.
* ``hidden`` is complete on every rank. **Its gradient is this rank's partial sum** over its shard, which the caller's
  region mapping (``parallel.collectives``) adds up. The weight's gradient is complete for the shard.
* The gradient that comes in is the same on every rank, as the results are.

Forward: at most two collectives, a gather of three floats per token and rank and a sum of K per token, with or without
a tail (``tail.py``). Backward: none.
Logits, softmax statistics and sums over tiles are fp32 whatever the inputs are (fp64 when the inputs are): see
``projection.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_tropd.losses.support import first_of_each
from megatron_tropd.losses.vocab_parallel.backends import choose_backend
from megatron_tropd.losses.vocab_parallel.backends.protocol import Backend, ListedIds, SoftmaxGradient
from megatron_tropd.losses.vocab_parallel.checks import check_ids, check_projection, check_temperature
from megatron_tropd.losses.vocab_parallel.projection import Factors, Projection, ProjectionGradient
from megatron_tropd.losses.vocab_parallel.statistics import Normalizer, Statistics, merge_ranks
from megatron_tropd.losses.vocab_parallel.tail import log_share, split_gradient, with_listed
from megatron_tropd.losses.vocab_parallel.tiles import Shard, Tiles, plan_tiles, shard_of
from megatron_tropd.parallel.collectives import Group, all_gather_stack, all_reduce_sum


@dataclass(frozen=True, slots=True, kw_only=True)
class LogProbs:
    """Of ``q = softmax(hidden @ weight.T / temperature)``, per token, nats, fp32, each with gradient."""

    logprob_TK: Tensor  # log q at the given ids
    entropy_T: Tensor  # -sum q log q over the true vocabulary
    logsumexp_T: Tensor  # of the logits already divided by the temperature
    logtail_T: Tensor | None = None  # log of the mass on ids that are not listed; -inf when all are; when requested


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
    """Take log-probabilities of given tokens, entropy and logsumexp over the full vocabulary.

    Args:
        hidden_TD: final hidden states, the same on every rank. Its gradient is a partial sum, see the module.
        weight_vD: this rank's rows of the output weight, same dtype.
        ids_TK: global token ids, the same on every rank, in any order, duplicates allowed; K may be 0.
        group: ranks that share the vocabulary; None when it is not sharded.
        vocab_size: true size; further columns are padding.
        temperature: divides the logits.
        chunk_tokens: at most ``chunk_tokens * v`` logits are held; None picks a size for the device.
        cache_bytes: hold up to so many bytes of logits (4 each) until the backward, which else makes them all again.
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
    backend = choose_backend(hidden_TD, ids=ids_TK.shape[1])
    limits = backend.limits(hidden_TD.device)
    plan = _LogProbsPlan(
        shard=shard,
        tiles=plan_tiles(hidden_TD, weight_vD, shard, chunk_tokens=chunk_tokens, limits=limits),
        temperature=temperature,
        group=group,
        backend=backend,
        cache_bytes=cache_bytes,
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
class _LogProbsPlan:
    shard: Shard
    tiles: Tiles
    temperature: float
    group: Group
    backend: Backend
    cache_bytes: int


class _LinearLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_vD: Tensor, ids_TK: Tensor, is_first_TK: Tensor | None, plan: _LogProbsPlan
    ) -> tuple[Tensor | None, ...]:
        projection = Projection(
            Factors(hidden_TD, weight_vD),
            tiles=plan.tiles,
            temperature=plan.temperature,
            cache_bytes=plan.cache_bytes if any(ctx.needs_input_grad) else 0,
        )
        outside, picked_TK = _statistics(projection, ids_TK, is_first_TK, plan)
        full, logtail_T, empty_T = outside, None, None
        if is_first_TK is not None:
            full = with_listed(outside, picked_TK, is_first_TK)
            logtail_T = log_share(outside, full)
            empty_T = logtail_T.isneginf()
        entropy_T, logsumexp_T = full.entropy_T, full.logsumexp_T
        logprob_TK = full.logprob_(picked_TK)

        # of the columns that are not masked; where there is none, numbers that can be divided by
        max_T = outside.max_T if empty_T is None else outside.max_T.masked_fill(empty_T, 0.0)
        sumexp_T = outside.sumexp_T if empty_T is None else outside.sumexp_T.masked_fill(empty_T, 1.0)
        tail = (None, None, None) if is_first_TK is None else (is_first_TK, logprob_TK, logtail_T)
        ctx.save_for_backward(hidden_TD, weight_vD, ids_TK, max_T, sumexp_T, entropy_T, *tail, *projection.cached_tiles)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        return logprob_TK, entropy_T, logsumexp_T, logtail_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_TK, grad_entropy_T, grad_logsumexp_T, grad_logtail_T = grads
        hidden_TD, weight_vD, ids_TK, max_T, sumexp_T, entropy_T, *others = ctx.saved_tensors
        is_first_TK, logprob_TK, logtail_T, *cached_tiles = others
        plan: _LogProbsPlan = ctx.plan

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

        gradient = SoftmaxGradient(
            normalizer=Normalizer(max_T, sumexp_T),
            constant_T=constant_T,
            slope_T=slope_T,
            listed=ListedIds(ids_TK=ids_TK, first_id=plan.shard.start, is_first_TK=is_first_TK),
            grad_TK=grad_TK,
        )
        factors = Factors(hidden_TD, weight_vD)
        return *_input_gradients(factors, gradient, plan, cached_tiles, ctx.needs_input_grad), None, None, None


def _statistics(
    projection: Projection, ids_TK: Tensor, is_first_TK: Tensor | None, plan: _LogProbsPlan
) -> tuple[Statistics, Tensor]:
    """Take the statistics over all ranks' columns, without those of the masked ids, and the logits of the ids."""
    listed = ListedIds(ids_TK=ids_TK, first_id=plan.shard.start, is_first_TK=is_first_TK)
    work = plan.backend.statistics(projection, listed)
    for tile in plan.tiles:
        work.add(tile)
    local, picked_TK = work.result()
    full = merge_ranks(all_gather_stack(local.stacked(), plan.group))
    return full, all_reduce_sum(picked_TK, plan.group)  # every id lies on one rank, all others contribute 0


def _input_gradients(
    factors: Factors,
    gradient: SoftmaxGradient,
    plan: _LogProbsPlan,
    cached_tiles: list[Tensor],
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, Tensor | None]:
    """Carry a gradient from the logits, tile by tile, to (hidden states, weight)."""
    shape: dict[str, Any] = {"tiles": plan.tiles, "temperature": plan.temperature}
    projection = Projection(factors, cached_tiles=cached_tiles, **shape)
    sums = ProjectionGradient(factors, needs_hidden=needed[0], needs_weight=needed[1], **shape)
    dlogits = plan.backend.softmax_gradient(projection, gradient)
    for tile in plan.tiles:
        sums.add(tile, dlogits.at(tile))
    return sums.result()
