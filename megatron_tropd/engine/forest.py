"""Attention over the rows of a pack: each row is a query once, and sees the rows along its path.

A sequence brings the rows that no sequence before it has brought, one after the other; its path is what it shares with
earlier ones, then those. Under context parallelism a rank has the queries of its blocks of rows and gathers the keys
of all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tropd.engine.attention import causal_attention
from megatron_tropd.engine.context import held_tokens
from megatron_tropd.engine.rows import gather_rows, row_of
from megatron_tropd.engine.varlen import VarlenCall, varlen_works
from megatron_tropd.parallel.collectives import Group, gather_sequence, group_rank, group_size
from megatron_tropd.types import Int64Array, Pack

# Pieces of at least this part of the longest are attended in one padded call.
_GROUP_FILL = 0.6
# Queries times keys of one call, whose mask and scores are in memory together.
_MOST_SCORES = 2**24


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of one sequence that follow one another in what a rank holds."""

    query: int  # the first of them, in what the rank holds
    count: int
    before: int  # rows of the path before the first of them
    path: Int64Array  # rows of the pack, the last query's included


@dataclass(frozen=True, slots=True)
class _Group:
    """Pieces that are attended in one call; what pads queries and keys is not seen, or not read."""

    query: Tensor  # [n * Q] rows that the rank holds
    key: Tensor  # [n * K] rows of the pack
    seen: Tensor | None  # [n, 1, Q, K] bool, True where a query sees a key; None: plainly causal, keys are queries
    shape: tuple[int, int, int]  # n, Q, K


@dataclass(frozen=True, slots=True)
class ForestPlan:
    """Implements ``attention.Plan`` over the rows of a forest. Collective under context parallelism."""

    groups: tuple[_Group, ...]
    restore_r: Tensor  # where each row's query stands in the groups' outputs
    tokens_r: Tensor  # [r] predictions that carry loss and read the row: what it counts for in a balance of tokens
    varlen: VarlenCall | None  # all pieces in one call, on a GPU
    order_R: Tensor | None  # row of the gathered keys at which each row of the pack lies; None: all are held
    group: Group
    qkv_format: str = "forest"

    @staticmethod
    def build(pack: Pack, tokens_r: Int64Array, group: Group, device: torch.device) -> ForestPlan:
        """Build the plan. ``tokens_r``: predictions with loss that read each row this rank holds."""
        ranks = group_size(group)
        held = [held_tokens(pack.num_rows, rank=rank, ranks=ranks) for rank in range(ranks)]
        pieces = _pieces(pack, held[group_rank(group)])
        grouped = _grouped(pieces)
        restore = np.empty(len(held[0]), np.int64)
        start = 0
        for members, shape in grouped:
            for number, piece in enumerate(members):
                at = start + number * shape[1]
                restore[piece.query : piece.query + piece.count] = np.arange(at, at + piece.count)
            start += len(members) * shape[1]
        order = np.argsort(np.concatenate(held), kind="stable")
        return ForestPlan(
            groups=tuple(_group(members, shape, device) for members, shape in grouped),
            restore_r=torch.from_numpy(restore).to(device),
            tokens_r=torch.from_numpy(tokens_r).to(device),
            varlen=_varlen(pieces, device) if device.type == "cuda" else None,
            order_R=None if ranks == 1 else torch.from_numpy(order).to(device),
            group=group,
        )

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attend: ``[r, 1, heads, d]`` of the rows held; keys and values of all ranks' are gathered within."""
        if self.order_R is not None:
            both = gather_sequence(torch.cat([key, value], dim=-1), self.group)[self.order_R]
            key, value = both[..., : key.size(-1)], both[..., key.size(-1) :]
        if self.varlen is not None and query.dtype in (torch.bfloat16, torch.float16):
            heads = query.size(2), key.size(2)
            if varlen_works(query.device, query.dtype, heads, query.size(3)):
                return self.varlen.attend(query[:, 0], key[:, 0], value[:, 0], scale)[:, None]
        outputs = [_attend(group, query[:, 0], key[:, 0], value[:, 0], scale) for group in self.groups]
        # one copy of each row's output is read, so its gradient counts once
        return torch.cat(outputs).index_select(0, self.restore_r)[:, None]


def _attend(group: _Group, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Return ``[n * Q, heads, d]``."""
    n, queries, keys = group.shape
    q = gather_rows(query, group.query).view(n, queries, *query.shape[1:]).transpose(1, 2)
    k, v = (gather_rows(x, group.key).view(n, keys, *x.shape[1:]).transpose(1, 2) for x in (key, value))
    out = causal_attention(q, k, v, scale) if group.seen is None else _seen_attention(q, k, v, group.seen, scale)
    return out.transpose(1, 2).reshape(n * queries, *query.shape[1:])


def _seen_attention(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        return _products(query, key, value, seen, scale)
    grouped = query.size(1) != key.size(1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scale, enable_gqa=grouped)


def _products(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Compute the same by plain products, for the reason that ``attention`` gives."""
    n, kv_heads, keys, dim = key.shape
    q = query.reshape(n, kv_heads, -1, dim)
    scores = (q @ key.transpose(-1, -2)).view(n, kv_heads, -1, query.size(2), keys) * scale
    weights = scores.masked_fill(~seen[:, None], -math.inf).softmax(-1).view(n, kv_heads, -1, keys)
    return (weights @ value).view_as(query)


# --------------------------------------------------------------------------- which rows, in which call


def _pieces(pack: Pack, held_r: Int64Array) -> list[_Piece]:
    """Cut the rows that a rank holds where a sequence ends that brought them, or a block does."""
    bounds, row_T = pack.cu_seqlens[: len(pack.sequence_ids) + 1].astype(np.int64), row_of(pack)
    paths = [row_T[start:end] for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]
    fresh = 0
    brought = []  # (path, its first new row)
    for path in paths:
        if path[-1] >= fresh:
            brought.append((path, fresh))
            fresh = int(path[-1]) + 1
    if fresh < pack.num_rows:
        brought.append((np.arange(fresh, pack.num_rows), fresh))
    firsts = np.array([first for _, first in brought])
    cuts = np.flatnonzero(np.diff(held_r, prepend=held_r[0]) > 1)
    starts = np.unique(np.concatenate([[0], cuts, np.searchsorted(held_r, firsts)]))
    pieces = []
    for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(held_r)], strict=True):
        if start == end:
            continue
        path, first = brought[int(np.searchsorted(firsts, held_r[start], side="right")) - 1]
        before = len(path) - (int(path[-1]) + 1 - first) + int(held_r[start]) - first
        pieces.append(_Piece(start, end - start, before, path[: before + end - start]))
    return pieces


def _varlen(pieces: list[_Piece], device: torch.device) -> VarlenCall:
    return VarlenCall.build(np.array([x.count for x in pieces]), [x.path for x in pieces], device)


def _grouped(pieces: list[_Piece]) -> list[tuple[list[_Piece], tuple[int, int, int]]]:
    """Put pieces of similar length together, with the shape ``n, Q, K`` of their call. Roots need no mask."""
    found = []
    for roots in (True, False):
        left = sorted((x for x in pieces if (x.before == 0) is roots), key=lambda x: (-x.count, -len(x.path), x.query))
        while left:
            longest, keys, number = left[0].count, len(left[0].path), 1
            while number < len(left) and left[number].count >= _GROUP_FILL * longest:
                wider = max(keys, len(left[number].path))
                if (number + 1) * longest * wider > _MOST_SCORES:
                    break
                keys, number = wider, number + 1
            found.append((left[:number], (number, longest, keys)))
            left = left[number:]
    return found


def _group(pieces: list[_Piece], shape: tuple[int, int, int], device: torch.device) -> _Group:
    _, queries, keys = shape
    count, before, last, first = (
        np.array(values)[:, None]
        for values in zip(*((x.count, x.before, len(x.path) - 1, x.query) for x in pieces), strict=True)
    )
    query = first + np.minimum(np.arange(queries), count - 1)
    step = np.minimum(np.arange(keys), last)
    path = np.stack([piece.path[at] for piece, at in zip(pieces, step, strict=True)])
    # the last query is repeated where there is none: it sees what it sees, and is not read
    seen = np.arange(keys) <= (before + np.minimum(np.arange(queries), count - 1))[:, :, None]
    roots = not before.any()
    query_of, key_of = (torch.from_numpy(x.reshape(-1)).to(device) for x in (query, path))
    return _Group(query_of, key_of, None if roots else torch.from_numpy(seen[:, None]).to(device), shape)
