"""The most likely tokens of a vocabulary-parallel softmax, in an order that no layout or tiling can change.

Candidates travel as keys (``_candidates``), so merging tiles and ranks is exact and resolves ties alike everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tropd.errors import ConfigError
from megatron_tropd.losses.support import first_of_each
from megatron_tropd.losses.vocab_parallel.backends import kernels
from megatron_tropd.losses.vocab_parallel.backends import triton_tiles as _kernel_tiles
from megatron_tropd.losses.vocab_parallel.backends.torch_statistics import (
    Picks,
    Statistics,
    check_ids,
    chunk_statistics,
    merge_ranks,
)
from megatron_tropd.losses.vocab_parallel.candidates import NO_CANDIDATE, decode, encode, entrants
from megatron_tropd.losses.vocab_parallel.tail import MASKED_LOGIT, log_share, seen, with_listed
from megatron_tropd.losses.vocab_parallel.tiles import (
    Buffer,
    Projection,
    Shard,
    Tiles,
    check_projection,
    check_temperature,
    plan_tiles,
    shard_of,
)
from megatron_tropd.parallel.collectives import Group, all_gather_stack


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """The k most likely tokens per position, nats, fp32, no gradient; identical on every rank."""

    ids_TK: Tensor  # global ids, int64: by log-probability descending, equal ones by id ascending
    logprob_TK: Tensor  # under the full (true) vocabulary, not renormalised
    entropy_T: Tensor  # -sum q log q over the true vocabulary
    picked_logprob_TJ: Tensor | None = None  # log-probabilities of the ids that were asked for
    logtail_T: Tensor | None = None  # log of the mass on all but ids_TK and the ids asked for; -inf: there is none


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
    """Top-k tokens, entropy and, in the same pass, the log-probabilities of given ids (say, the sampled tokens).

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
    by_kernels = kernels.serve(hidden_TD.device, hidden_TD.dtype, k=k)
    tiles = plan_tiles(hidden_TD, weight_vD, shard, chunk_tokens=chunk_tokens, by_kernels=by_kernels)
    wanted_TJ = hidden_TD.new_empty((hidden_TD.shape[0], 0), dtype=torch.int64) if ids_TJ is None else ids_TJ
    valid_TJ = check_ids(wanted_TJ, num_tokens=hidden_TD.shape[0], vocab_size=vocab_size)

    ids_TJ_, counts_TJ = wanted_TJ.long(), None
    if tail:
        counts_TJ = first_of_each(ids_TJ_)
        counts_TJ = counts_TJ if valid_TJ is None else counts_TJ & valid_TJ

    projection = Projection(hidden_TD, weight_vD, tiles=tiles, temperature=temperature)
    search = _candidates_by_kernels if by_kernels else _local_candidates
    local = search(projection, k, ids_TJ_, counts_TJ, shard=shard, tiles=tiles)
    keys_TX, whole, picked_TJ = _merge_over_ranks(*local, group=group)
    logtail_T = None
    if counts_TJ is None:
        keys_TK = keys_TX.topk(k, sorted=False).values
    else:
        listed_TJ = encode(picked_TJ, ids_TJ_).masked_fill_(~counts_TJ, NO_CANDIDATE)
        keys_TK, outside, whole = _with_listed_ids(keys_TX, whole, listed_TJ, k)
        logtail_T = log_share(outside, whole)

    logit_TK, ids_TK = decode(keys_TK)
    # logits that differ in the last bit can have equal log-probabilities: sort once more by what is returned
    logprob_TK, ids_TK = decode(encode(whole.logprob_(logit_TK), ids_TK).sort(-1, descending=True).values)
    picked_logprob_TJ = None
    if ids_TJ is not None:
        picked_logprob_TJ = whole.logprob_(picked_TJ)
        if valid_TJ is not None:
            picked_logprob_TJ.masked_fill_(~valid_TJ, torch.nan)
    return TopK(
        ids_TK=ids_TK,
        logprob_TK=logprob_TK,
        entropy_T=whole.entropy_T,
        picked_logprob_TJ=picked_logprob_TJ,
        logtail_T=logtail_T,
    )


def _local_candidates(
    projection: Projection, k: int, ids_TJ: Tensor, counts_TJ: Tensor | None, *, shard: Shard, tiles: Tiles
) -> tuple[Tensor, Statistics, Tensor]:
    """(keys of the best k, statistics, picked logits or 0) over this rank's columns.

    With ``counts_TJ`` (a tail is wanted) the ids that count are no candidates, and the statistics are of the columns
    that are neither such ids nor among the best k.
    """
    num_tokens, device = tiles.num_tokens, ids_TJ.device
    keys_TK = torch.full((num_tokens, k), NO_CANDIDATE, dtype=torch.int64, device=device)
    picked_TJ = torch.zeros(ids_TJ.shape, dtype=torch.float32, device=device)
    local = Statistics.empty(num_tokens, dtype=torch.float32, device=device)
    scratch = Buffer(tiles, dtype=torch.float32, device=device)
    for rows, columns in tiles:
        logits_Rw = projection.logits(rows, columns).float()
        first_id = shard.start + columns.start
        picks = Picks.of(ids_TJ[rows], first_id=first_id, width=logits_Rw.shape[1])
        picks.read_into(picked_TJ[rows], logits_Rw)
        if counts_TJ is not None:
            picks.hide(logits_Rw, counts_TJ[rows], hidden=MASKED_LOGIT)
        best_RX = entrants(logits_Rw, keys_TK[rows], first_id=first_id)
        if counts_TJ is None:
            keys_TK[rows] = torch.cat([keys_TK[rows], best_RX], dim=-1).topk(k, sorted=False).values
            local.merge_(rows, chunk_statistics(logits_Rw, scratch.tile(rows, columns)))
            continue
        best_RX = _taken_out_(logits_Rw, best_RX, first_id=first_id)
        sorted_RX = torch.cat([keys_TK[rows], best_RX], dim=-1).sort(dim=-1, descending=True).values
        keys_TK[rows] = sorted_RX[:, :k]
        local.merge_(rows, seen(chunk_statistics(logits_Rw, scratch.tile(rows, columns))))
        local.merge_(rows, _statistics_of(sorted_RX[:, k:]))
    return keys_TK, local, picked_TJ


def _candidates_by_kernels(
    projection: Projection, k: int, ids_TJ: Tensor, counts_TJ: Tensor | None, *, shard: Shard, tiles: Tiles
) -> tuple[Tensor, Statistics, Tensor]:
    """``_local_candidates`` where kernels look for them."""
    picked_TJ = torch.zeros(ids_TJ.shape, dtype=torch.float32, device=ids_TJ.device)
    local = Statistics.empty(tiles.num_tokens, dtype=torch.float32, device=ids_TJ.device)
    keys_TC = _kernel_tiles.candidates(
        projection,
        tiles,
        k,
        local,
        picked_TJ,
        ids_TJ=ids_TJ,
        first_id=shard.start,
        tail=counts_TJ is not None,
    )
    if counts_TJ is None:
        return keys_TC.topk(k, sorted=False).values, local, picked_TJ
    sorted_TC = keys_TC.sort(dim=-1, descending=True).values
    local.merge_(slice(None), _statistics_of(sorted_TC[:, k:]))
    return sorted_TC[:, :k], local, picked_TJ


def _taken_out_(logits_Rw: Tensor, keys_RX: Tensor, *, first_id: int) -> Tensor:
    """Hide the tile's candidates; returns their keys, without those of columns that were hidden before."""
    value_RX, ids_RX = decode(keys_RX)
    real_RX = keys_RX != NO_CANDIDATE
    # added, since what fills a row up has to leave some column as it is
    column_RX = torch.where(real_RX, ids_RX - first_id, 0)
    logits_Rw.scatter_add_(1, column_RX, torch.where(real_RX, MASKED_LOGIT, 0.0).to(logits_Rw.dtype))
    return keys_RX.masked_fill(~real_RX | (value_RX <= 0.5 * MASKED_LOGIT), NO_CANDIDATE)


def _statistics_of(keys_RX: Tensor) -> Statistics:
    value_RX = decode(keys_RX)[0].masked_fill_(keys_RX == NO_CANDIDATE, MASKED_LOGIT)
    return seen(chunk_statistics(value_RX, torch.empty_like(value_RX)))


def _merge_over_ranks(
    keys_TK: Tensor, local: Statistics, picked_TJ: Tensor, *, group: Group
) -> tuple[Tensor, Statistics, Tensor]:
    """The same three of all ranks, the keys side by side. One collective: the floats travel as the bits of integers."""
    k = keys_TK.shape[1]
    floats = [local.stacked().t(), picked_TJ]
    if picked_TJ.shape[1] % 2 == 0:
        floats.append(picked_TJ.new_zeros(len(picked_TJ), 1))  # two floats to an integer
    packed_TX = torch.cat([keys_TK, torch.cat(floats, dim=-1).view(torch.int64)], dim=-1)
    every_nTX = all_gather_stack(packed_TX, group)

    keys_TX = every_nTX[..., :k].transpose(0, 1).flatten(1)
    float_nTX = every_nTX[..., k:].contiguous().view(torch.float32)
    whole = merge_ranks(float_nTX[..., :3].movedim(-1, 1))
    # every id lies on one rank, all others contribute 0
    picked_TJ = float_nTX[..., 3 : 3 + picked_TJ.shape[1]].sum(0)
    return keys_TX, whole, picked_TJ


def _with_listed_ids(
    keys_TX: Tensor, outside: Statistics, listed_TJ: Tensor, k: int
) -> tuple[Tensor, Statistics, Statistics]:
    """(keys of the best k, statistics of what is neither among them nor listed, statistics of everything).

    ``keys_TX`` and ``listed_TJ`` share no id; what of the former is not among the best k lies outside.
    """
    keys_TY, origin_TY = torch.cat([keys_TX, listed_TJ], dim=-1).sort(dim=-1, descending=True)
    value_TY, real_TY = decode(keys_TY)[0], keys_TY != NO_CANDIDATE
    beaten_TY = real_TY & (origin_TY < keys_TX.shape[1])
    beaten_TY[:, :k] = False
    outside = with_listed(outside, value_TY, beaten_TY)
    return keys_TY[:, :k], outside, with_listed(outside, value_TY, real_TY & ~beaten_TY)
