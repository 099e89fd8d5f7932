"""Which columns of a tile may be among a token's best k, without looking at all of them twice.

Candidates are keys, one int64 each: the logit's bits, made monotone, above the complement of the token id. Comparing
these numbers compares (logit, then smaller id), so merging tiles and ranks by ``topk`` is exact and resolves ties alike
everywhere.

Once k columns are known, a later one must exceed the worst of them (columns come by ascending id, so a tie is lost).
The maxima of groups of columns, which cost little more than one maximum of the row, say where to look: a selection
over every tile was measured to need twice the time of its matrix product on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_tropd.losses.vocab_parallel.statistics import (
    MASKED_LOGIT,
    Statistics,
    chunk_statistics,
    drop_fully_masked,
)

LOW_32 = 0xFFFFFFFF
NO_CANDIDATE = torch.iinfo(torch.int64).min  # below the key of every finite logit
_GROUP = 32  # columns whose maximum is looked at first


def entrants(logits_Rw: Tensor, best_RK: Tensor, *, first_id: int) -> Tensor:
    """Find keys ``[R, X]`` of all columns that belong to the best k of ``best_RK`` and the tile, and perhaps others.

    Unsorted, filled up with NO_CANDIDATE. ``best_RK``: of columns with smaller ids.
    """
    k, width = best_RK.shape[1], logits_Rw.shape[1]
    if k >= width or logits_Rw.device.type != "cpu":  # there, waiting for a count would stall the stream
        return _best_of_tile(logits_Rw, k, first_id=first_id)
    if bool((best_RK == NO_CANDIDATE).any()):
        return _first_entrants(logits_Rw, k, first_id=first_id)
    bound_R1 = decode(best_RK.amin(dim=-1, keepdim=True))[0]
    whole = width - width % _GROUP
    groups_RGg = logits_Rw[:, :whole].unflatten(1, (-1, _GROUP))
    row_H, group_H = (groups_RGg.amax(dim=-1) > bound_R1).nonzero(as_tuple=True)
    if 4 * len(row_H) > groups_RGg.shape[0] * groups_RGg.shape[1]:
        return _best_of_tile(logits_Rw, k, first_id=first_id)
    value_Hg = groups_RGg[row_H, group_H]
    hit_M, place_M = (value_Hg > bound_R1[row_H]).nonzero(as_tuple=True)
    keys_M = encode(value_Hg[hit_M, place_M], first_id + _GROUP * group_H[hit_M] + place_M)
    keys_RX = _by_row(keys_M, row_H[hit_M], rows=len(logits_Rw))
    rest_w = torch.arange(first_id + whole, first_id + width)
    return torch.cat([keys_RX, encode(logits_Rw[:, whole:], rest_w)], dim=1)


def _first_entrants(logits_Rw: Tensor, k: int, *, first_id: int) -> Tensor:
    """Find ``[R, k]``, the best of the tile alone, searching a head of the row that doubles."""
    width, known = logits_Rw.shape[1], min(4 * k, logits_Rw.shape[1])
    best_RK = _best_of_tile(logits_Rw[:, :known], k, first_id=first_id)
    while known < width:
        further = logits_Rw[:, known : 2 * known]
        both_RX = torch.cat([best_RK, entrants(further, best_RK, first_id=first_id + known)], dim=1)
        best_RK, known = both_RX.topk(k, sorted=False).values, 2 * known
    return best_RK


def _by_row(keys_M: Tensor, row_M: Tensor, *, rows: int) -> Tensor:
    """Sort keys into ``[R, X]`` by row, X as many as the fullest has; ``row_M`` ascends."""
    count_R = torch.bincount(row_M, minlength=rows)
    start_R = count_R.cumsum(0) - count_R
    keys_RX = keys_M.new_full((rows, int(count_R.max()) if rows else 0), NO_CANDIDATE)
    keys_RX[row_M, torch.arange(len(row_M)) - start_R[row_M]] = keys_M
    return keys_RX


def _best_of_tile(logits_Rw: Tensor, k: int, *, first_id: int) -> Tensor:
    """Find keys of the best k columns (all of them when there are fewer), unsorted.

    ``topk`` alone picks any of the columns that tie for the last place; rows where that happens are redone by key.
    """
    width = logits_Rw.shape[1]
    if k >= width:
        ids_w = torch.arange(first_id, first_id + width, device=logits_Rw.device)
        return encode(logits_Rw, ids_w)
    best_RK, column_RK = logits_Rw.topk(k + 1)
    keys_RK = encode(best_RK[:, :k], column_RK[:, :k] + first_id)
    tied = (best_RK[:, k - 1] == best_RK[:, k]).nonzero().squeeze(-1)
    if tied.numel():
        ids_w = torch.arange(first_id, first_id + width, device=logits_Rw.device)
        keys_RK[tied] = encode(logits_Rw[tied], ids_w).topk(k, sorted=False).values
    return keys_RK


def encode(value: Tensor, ids: Tensor) -> Tensor:
    """Make int64 keys that order like (value, -id). ``+ 0.0`` makes -0.0, equal to 0.0 but of other bits, the same."""
    bits = (value + 0.0).view(torch.int32).long()
    monotone = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # negative floats order backwards by their bits
    return (monotone << 32) | (LOW_32 - ids)


def decode(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return (value, ids) of ``encode``."""
    monotone = keys >> 32
    bits = monotone ^ ((monotone >> 31) & 0x7FFFFFFF)
    return bits.to(torch.int32).view(torch.float32), LOW_32 - (keys & LOW_32)


def mask_candidates_(logits_Rw: Tensor, keys_RX: Tensor, *, first_id: int) -> Tensor:
    """Mask the tile's candidates; return their keys, without those of columns that were masked before."""
    value_RX, ids_RX = decode(keys_RX)
    real_RX = keys_RX != NO_CANDIDATE
    # added, since what fills a row up has to leave some column as it is
    column_RX = torch.where(real_RX, ids_RX - first_id, 0)
    logits_Rw.scatter_add_(1, column_RX, torch.where(real_RX, MASKED_LOGIT, 0.0).to(logits_Rw.dtype))
    return keys_RX.masked_fill(~real_RX | (value_RX <= 0.5 * MASKED_LOGIT), NO_CANDIDATE)


def keyed_statistics(keys_RX: Tensor) -> Statistics:
    """Take the statistics of the logits that keys hold."""
    value_RX = decode(keys_RX)[0].masked_fill_(keys_RX == NO_CANDIDATE, MASKED_LOGIT)
    return drop_fully_masked(chunk_statistics(value_RX, torch.empty_like(value_RX)))
