"""The most likely tokens of a vocabulary-parallel softmax, in an order that no layout or tiling can change.

Candidates travel as keys (``candidates.py``), so merging tiles and ranks is exact and resolves ties alike everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tropd.errors import ConfigError
from megatron_tropd.losses.support import first_of_each
from megatron_tropd.losses.vocab_parallel.backends import choose_backend
from megatron_tropd.losses.vocab_parallel.backends.protocol import ListedIds
from megatron_tropd.losses.vocab_parallel.candidates import NO_CANDIDATE, decode, encode
from megatron_tropd.losses.vocab_parallel.checks import check_ids, check_projection, check_temperature
from megatron_tropd.losses.vocab_parallel.projection import Factors, Projection
from megatron_tropd.losses.vocab_parallel.statistics import Statistics, merge_ranks
from megatron_tropd.losses.vocab_parallel.tail import log_share, with_listed
from megatron_tropd.losses.vocab_parallel.tiles import plan_tiles, shard_of
from megatron_tropd.parallel.collectives import Group, all_gather_stack


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """The k most likely tokens per position, nats, fp32, no gradient; identical on every rank."""

    ids_TK: Tensor  # global ids, int64: by log-probability descending, equal ones by id ascending
    logprob_TK: Tensor  # under the full (true) vocabulary, not renormalized
    entropy_T: Tensor  # -sum q log q over the true vocabulary
    picked_logprob_TJ: Tensor | None = None  # log-probabilities of the query ids
    logtail_T: Tensor | None = None  # log of the mass on all but ids_TK and the query ids; -inf: there is none


@torch.no_grad()
def linear_topk(
    hidden_TD: Tensor,
    weight_vD: Tensor,
    k: int,
    *,
    group: Group = None,
    vocab_size: int,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    ids_TJ: Tensor | None = None,
    tail: bool = False,
) -> TopK:
    """Find top-k tokens, entropy and, in the same pass, the log-probabilities of query ids (say, the sampled tokens).

    Args, sharding and errors as ``linear_logprobs``; one collective. ``ids_TJ``: global ids ``[T, J]`` or None.
    ``tail``: also the log of the mass outside both the top k and ``ids_TJ``, at full accuracy however small it is.

    Raises:
        ConfigError: also when ``k`` is not in ``[1, vocab_size]``.
    """
    check_projection(hidden_TD, weight_vD)
    check_temperature(temperature)
    if not 1 <= k <= vocab_size:
        raise ConfigError(f"k must lie in [1, vocab_size] = [1, {vocab_size}], got {k}.")
    shard = shard_of(weight_vD, vocab_size=vocab_size, group=group)
    query_TJ = hidden_TD.new_empty((hidden_TD.shape[0], 0), dtype=torch.int64) if ids_TJ is None else ids_TJ
    valid_TJ = check_ids(query_TJ, num_tokens=hidden_TD.shape[0], vocab_size=vocab_size)
    query_TJ, is_first_TJ = query_TJ.long(), None
    if tail:
        is_first_TJ = first_of_each(query_TJ)
        is_first_TJ = is_first_TJ if valid_TJ is None else is_first_TJ & valid_TJ

    backend = choose_backend(hidden_TD, k=k)
    limits = backend.limits(hidden_TD.device)
    tiles = plan_tiles(hidden_TD, weight_vD, shard, chunk_tokens=chunk_tokens, limits=limits)
    projection = Projection(Factors(hidden_TD, weight_vD), tiles=tiles, temperature=temperature)
    listed = ListedIds(ids_TK=query_TJ, first_id=shard.start, is_first_TK=is_first_TJ)
    work = backend.candidates(projection, listed, k=k)
    for tile in tiles:
        work.add(tile)
    keys_TX, full, picked_TJ = _merge_over_ranks(*work.result(), group=group)
    logtail_T = None
    if is_first_TJ is None:
        keys_TK = keys_TX.topk(k, sorted=False).values
    else:
        listed_TJ = encode(picked_TJ, query_TJ).masked_fill_(~is_first_TJ, NO_CANDIDATE)
        keys_TK, outside, full = _with_listed_ids(keys_TX, full, listed_TJ, k)
        logtail_T = log_share(outside, full)

    logit_TK, ids_TK = decode(keys_TK)
    # logits that differ in the last bit can have equal log-probabilities: sort once more by what is returned
    logprob_TK, ids_TK = decode(encode(full.logprob_(logit_TK), ids_TK).sort(-1, descending=True).values)
    picked_logprob_TJ = None
    if ids_TJ is not None:
        picked_logprob_TJ = full.logprob_(picked_TJ)
        if valid_TJ is not None:
            picked_logprob_TJ.masked_fill_(~valid_TJ, torch.nan)
    return TopK(
        ids_TK=ids_TK,
        logprob_TK=logprob_TK,
        entropy_T=full.entropy_T,
        picked_logprob_TJ=picked_logprob_TJ,
        logtail_T=logtail_T,
    )


def _merge_over_ranks(
    keys_TK: Tensor, local: Statistics, picked_TJ: Tensor, *, group: Group
) -> tuple[Tensor, Statistics, Tensor]:
    """Gather the same three of all ranks, the keys side by side, in one collective: floats travel as integers' bits."""
    k = keys_TK.shape[1]
    floats = [local.stacked().t(), picked_TJ]
    if picked_TJ.shape[1] % 2 == 0:
        floats.append(picked_TJ.new_zeros(len(picked_TJ), 1))  # two floats to an integer
    packed_TX = torch.cat([keys_TK, torch.cat(floats, dim=-1).view(torch.int64)], dim=-1)
    every_nTX = all_gather_stack(packed_TX, group)

    keys_TX = every_nTX[..., :k].transpose(0, 1).flatten(1)
    float_nTX = every_nTX[..., k:].contiguous().view(torch.float32)
    full = merge_ranks(float_nTX[..., :3].movedim(-1, 1))
    # every id lies on one rank, all others contribute 0
    picked_TJ = float_nTX[..., 3 : 3 + picked_TJ.shape[1]].sum(0)
    return keys_TX, full, picked_TJ


def _with_listed_ids(
    keys_TX: Tensor, outside: Statistics, listed_TJ: Tensor, k: int
) -> tuple[Tensor, Statistics, Statistics]:
    """Return (keys of the best k, statistics of what is neither among them nor listed, statistics of everything).

    ``keys_TX`` and ``listed_TJ`` share no id; what of the former is not among the best k lies outside.
    """
    keys_TY, origin_TY = torch.cat([keys_TX, listed_TJ], dim=-1).sort(dim=-1, descending=True)
    value_TY, real_TY = decode(keys_TY)[0], keys_TY != NO_CANDIDATE
    beaten_TY = real_TY & (origin_TY < keys_TX.shape[1])
    beaten_TY[:, :k] = False
    outside = with_listed(outside, value_TY, beaten_TY)
    return keys_TY[:, :k], outside, with_listed(outside, value_TY, real_TY & ~beaten_TY)
