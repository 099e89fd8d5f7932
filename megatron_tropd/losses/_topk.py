"""The most likely tokens of a vocabulary-parallel softmax, in an order that no layout or tiling can change.

Candidates travel as one int64 each: the logit's bits, made monotone, above the complement of the token id. Comparing
these numbers compares (logit, then smaller id), so merging tiles and ranks by ``topk`` is exact and resolves ties alike
everywhere. Ties are common: bfloat16 logits have 8 significant bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tropd.errors import ConfigError
from megatron_tropd.losses._chunking import (
    Buffer,
    Projection,
    Shard,
    Tiles,
    check_projection,
    check_temperature,
    plan_tiles,
    shard_of,
)
from megatron_tropd.losses._statistics import Picks, Statistics, check_ids, chunk_statistics, merge_ranks
from megatron_tropd.parallel.collectives import Group, all_gather_stack

_LOW_32 = 0xFFFFFFFF
_NO_CANDIDATE = torch.iinfo(torch.int64).min  # below the key of every finite logit


@dataclass(frozen=True, slots=True, kw_only=True)
class TopK:
    """The k most likely tokens per position, nats, fp32, no gradient; identical on every rank."""

    ids_TK: Tensor  # global ids, int64: by log-probability descending, equal ones by id ascending
    logprob_TK: Tensor  # under the full (true) vocabulary, not renormalised
    entropy_T: Tensor  # -sum q log q over the true vocabulary
    picked_logprob_TJ: Tensor | None = None  # log-probabilities of the ids that were asked for


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
) -> TopK:
    """Top-k tokens, entropy and, in the same pass, the log-probabilities of given ids (say, the sampled tokens).

    Args, sharding and errors as ``linear_logprobs``; one collective. ``ids_TJ``: global ids ``[T, J]`` or None.

    Raises:
        ConfigError: also when ``k`` is not in ``[1, vocab_size]``.
    """
    check_projection(hidden_TD, weight_vD)
    check_temperature(temperature)
    if not 1 <= k <= vocab_size:
        raise ConfigError(f"k must lie in [1, vocab_size] = [1, {vocab_size}], got {k}.")
    shard = shard_of(weight_vD, vocab_size=vocab_size, group=group)
    tiles = plan_tiles(hidden_TD, weight_vD, shard, chunk_tokens=chunk_tokens)
    wanted_TJ = hidden_TD.new_empty((hidden_TD.shape[0], 0), dtype=torch.int64) if ids_TJ is None else ids_TJ
    valid_TJ = check_ids(wanted_TJ, num_tokens=hidden_TD.shape[0], vocab_size=vocab_size)

    projection = Projection(hidden_TD, weight_vD, tiles=tiles, temperature=temperature)
    keys_TK, local, picked_TJ = _local_candidates(projection, k, wanted_TJ.long(), shard=shard, tiles=tiles)
    keys_TK, whole, picked_TJ = _merge_over_ranks(keys_TK, local, picked_TJ, group=group)

    logit_TK, ids_TK = _decode(keys_TK)
    # logits that differ in the last bit can have equal log-probabilities: sort once more by what is returned
    logprob_TK, ids_TK = _decode(_encode(whole.logprob_(logit_TK), ids_TK).sort(-1, descending=True).values)
    picked_logprob_TJ = None
    if ids_TJ is not None:
        picked_logprob_TJ = whole.logprob_(picked_TJ)
        if valid_TJ is not None:
            picked_logprob_TJ.masked_fill_(~valid_TJ, torch.nan)
    return TopK(ids_TK=ids_TK, logprob_TK=logprob_TK, entropy_T=whole.entropy_T, picked_logprob_TJ=picked_logprob_TJ)


def _local_candidates(
    projection: Projection, k: int, ids_TJ: Tensor, *, shard: Shard, tiles: Tiles
) -> tuple[Tensor, Statistics, Tensor]:
    """(keys of the best k, statistics, picked logits or 0) over this rank's columns."""
    num_tokens, device = tiles.num_tokens, ids_TJ.device
    keys_TK = torch.full((num_tokens, k), _NO_CANDIDATE, dtype=torch.int64, device=device)
    picked_TJ = torch.zeros(ids_TJ.shape, dtype=torch.float32, device=device)
    local = Statistics.empty(num_tokens, dtype=torch.float32, device=device)
    scratch = Buffer(tiles, dtype=torch.float32, device=device)
    for rows, columns in tiles:
        logits_Rw = projection.logits(rows, columns).float()
        first_id = shard.start + columns.start
        Picks.of(ids_TJ[rows], first_id=first_id, width=logits_Rw.shape[1]).read_into(picked_TJ[rows], logits_Rw)
        candidates = torch.cat([keys_TK[rows], _best_of_tile(logits_Rw, k, first_id=first_id)], dim=-1)
        keys_TK[rows] = candidates.topk(k, sorted=False).values
        local.merge_(rows, chunk_statistics(logits_Rw, scratch.tile(rows, columns)))
    return keys_TK, local, picked_TJ


def _merge_over_ranks(
    keys_TK: Tensor, local: Statistics, picked_TJ: Tensor, *, group: Group
) -> tuple[Tensor, Statistics, Tensor]:
    """The same three over all ranks' columns. One collective: the floats travel as the bits of integers."""
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
    return keys_TX.topk(k, sorted=False).values, whole, picked_TJ


def _best_of_tile(logits_Rw: Tensor, k: int, *, first_id: int) -> Tensor:
    """Keys of the best k columns (all of them when there are fewer), unsorted.

    ``topk`` alone picks any of the columns that tie for the last place; rows where that happens are redone by key.
    """
    width = logits_Rw.shape[1]
    if k >= width:
        ids_w = torch.arange(first_id, first_id + width, device=logits_Rw.device)
        return _encode(logits_Rw, ids_w)
    best_RK, column_RK = logits_Rw.topk(k + 1)
    keys_RK = _encode(best_RK[:, :k], column_RK[:, :k] + first_id)
    tied = (best_RK[:, k - 1] == best_RK[:, k]).nonzero().squeeze(-1)
    if tied.numel():
        ids_w = torch.arange(first_id, first_id + width, device=logits_Rw.device)
        keys_RK[tied] = _encode(logits_Rw[tied], ids_w).topk(k, sorted=False).values
    return keys_RK


def _encode(value: Tensor, ids: Tensor) -> Tensor:
    """int64 keys that order like (value, -id). ``+ 0.0`` makes -0.0, which equals 0.0 but has other bits, the same."""
    bits = (value + 0.0).view(torch.int32).long()
    monotone = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats order backwards by their bits
    return (monotone << 32) | (_LOW_32 - ids)


def _decode(keys: Tensor) -> tuple[Tensor, Tensor]:
    """(value, ids) of ``_encode``."""
    monotone = keys >> 32
    bits = monotone ^ ((monotone >> 31) & 0x7FFFFFFF)
    return bits.to(torch.int32).view(torch.float32), _LOW_32 - (keys & _LOW_32)
