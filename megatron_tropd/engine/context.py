"""Context parallelism: which tokens of a pack a rank holds, and attention over keys that lie on other ranks.

A stream of T tokens is cut into twice as many equal blocks as there are ranks; rank r holds blocks r and 2n-1-r, so
that under causal attention every rank has equal work even when the stream is one long sequence. Blocks cut through
sequences. What of a sequence begins inside a block finds all its keys there; only the first piece of a block may
continue a sequence started elsewhere, and only such pieces look at the keys that the ranks gather from each other.

Additional dimension names: ``t`` tokens of this rank (T / ranks), in stream order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tropd.engine.attention import PackedPlan, attend_groups, groups_of
from megatron_tropd.engine.rows import computed_rows, row_of
from megatron_tropd.errors import EngineError
from megatron_tropd.parallel.collectives import Group, gather_sequence, group_rank, group_size
from megatron_tropd.parallel.groups import Groups
from megatron_tropd.types import Pack, Region

Int64Array = npt.NDArray[np.int64]


def held_tokens(num_tokens: int, *, rank: int, ranks: int) -> Int64Array:
    """Return ``[t]`` stream positions of the tokens that context rank ``rank`` holds, ascending.

    Raises:
        EngineError: the tokens do not divide into ``2 * ranks`` blocks.
    """
    if ranks == 1:
        return np.arange(num_tokens)
    if num_tokens % (2 * ranks):
        raise EngineError(
            f"a pack of {num_tokens} tokens does not divide into {2 * ranks} blocks for {ranks} context-parallel "
            "ranks: pad packs to a multiple of that."
        )
    blocks = np.arange(num_tokens).reshape(2 * ranks, -1)
    return np.concatenate([blocks[rank], blocks[2 * ranks - 1 - rank]])


@dataclass(frozen=True, slots=True)
class Predictions:
    """The predictions of a pack that carry loss, ``[N]``: the hidden state that each reads, and the id that it is of.

    Two arrays: the id need not be the token that follows the position, nor a position be read once.
    """

    read_N: Int64Array  # stream positions
    target_N: Int64Array


def carries_loss(pack: Pack) -> npt.NDArray[np.bool_]:
    """Return ``[T]``, True where a prediction is of a token that a model wrote. Such tokens may lie in many
    stretches.
    """
    return (pack.region_T == Region.PREFIX) | (pack.region_T == Region.CONTINUATION)


def valid_positions(pack: Pack, *, rank: int = 0, ranks: int = 1) -> Int64Array:
    """Return ``[N]`` stream positions whose prediction carries loss and that context rank ``rank`` holds, ascending.

    A rank holds blocks of rows, and the predictions that read them.
    """
    valid_N = np.flatnonzero(carries_loss(pack))
    if ranks == 1:
        return valid_N
    held_r = held_tokens(computed_rows(pack), rank=rank, ranks=ranks)
    return valid_N[np.isin(row_of(pack)[valid_N], held_r, assume_unique=False)]


def own_valid_positions(pack: Pack, groups: Groups) -> Int64Array:
    """Return ``valid_positions`` of this process under ``groups``: the rows that its last stage computes, in order."""
    return valid_positions(pack, rank=groups.context_rank, ranks=groups.layout.context)


def own_predictions(pack: Pack, groups: Groups) -> Predictions:
    """List the predictions that this process's last stage computes, in the order of its rows."""
    read_N = own_valid_positions(pack, groups)
    return Predictions(read_N, pack.target_T[read_N])


@dataclass(frozen=True, slots=True)
class _Continued:
    """A piece of a sequence whose beginning lies in an earlier block."""

    queries: slice  # rows of this rank's stream
    keys: slice  # stream positions from the sequence's first token to the piece's last


@dataclass(frozen=True, slots=True)
class ContextPlan:
    """Attention of one context rank's share of a packed stream. Implements ``attention.Plan``. Collective."""

    started: PackedPlan  # pieces that start a sequence, over the rank's own stream
    continued: tuple[_Continued, ...]  # at most one per block
    stream_order_T: Tensor  # row of the gathered keys at which each stream position lies
    group: Group
    qkv_format: str = "context"

    @staticmethod
    def build(cu_seqlens: npt.NDArray[np.int32], group: Group, device: torch.device) -> ContextPlan:
        """Build the plan. ``cu_seqlens``: boundaries of the whole stream, padding included."""
        rank, ranks = group_rank(group), group_size(group)
        total = int(cu_seqlens[-1])
        held = [held_tokens(total, rank=r, ranks=ranks) for r in range(ranks)]
        starts, lengths, continued = _pieces(cu_seqlens.astype(np.int64), held[rank])
        return ContextPlan(
            started=PackedPlan(groups_of(starts, lengths, device)),
            continued=tuple(continued),
            stream_order_T=torch.from_numpy(np.argsort(np.concatenate(held), kind="stable")).to(device),
            group=group,
        )

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attend: ``[t, 1, heads, d]`` of this rank's tokens; keys and values of all ranks are gathered within."""
        outputs = attend_groups(self.started.groups, query, key, value, scale)
        rows = [group.restore for group in self.started.groups]
        key_T, value_T = self._whole_stream(key, value)
        if not self.continued:
            # no row needs the gathered keys, yet their backward is a collective this rank must take part in
            outputs.append(value_T[:0].repeat_interleave(query.shape[2] // value.shape[2], dim=2))
        for piece in self.continued:
            outputs.append(_attend_continued(query[piece.queries], key_T[piece.keys], value_T[piece.keys], scale))
            rows.append(torch.arange(piece.queries.start, piece.queries.stop, device=query.device))
        return torch.empty_like(query).index_copy(0, torch.cat(rows), torch.cat(outputs))

    def _whole_stream(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        both = gather_sequence(torch.cat([key, value], dim=-1), self.group)[self.stream_order_T]
        return both[..., : key.shape[-1]], both[..., key.shape[-1] :]


def _pieces(cu_seqlens: Int64Array, held_t: Int64Array) -> tuple[Int64Array, Int64Array, list[_Continued]]:
    """Return (rows, lengths) of the pieces that start a sequence, and of the others."""
    sequence_t = np.searchsorted(cu_seqlens, held_t, side="right") - 1
    first_t = np.flatnonzero(np.diff(sequence_t, prepend=-1) | (np.diff(held_t, prepend=held_t[0] - 1) != 1))
    starts, lengths, continued = [], [], []
    for start, end in zip(first_t.tolist(), [*first_t[1:].tolist(), len(held_t)], strict=True):
        begin = int(cu_seqlens[sequence_t[start]])
        if held_t[start] == begin:
            starts.append(start)
            lengths.append(end - start)
        else:
            continued.append(_Continued(slice(start, end), slice(begin, int(held_t[end - 1]) + 1)))
    return np.array(starts, np.int64), np.array(lengths, np.int64), continued


def causal_lower_right(rows: int, columns: int) -> Any:
    """Return torch's own mask. Its module brings torch's compiler along, a second that starting need not take."""
    from torch.nn.attention import bias

    return bias.causal_lower_right(rows, columns)


def _attend_continued(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Compute the last rows of a causal square: ``[n, 1, heads, d]`` over ``[m, 1, key heads, d]``, m > n."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    mask = causal_lower_right(q.shape[2], k.shape[2])
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out.permute(2, 0, 1, 3)
