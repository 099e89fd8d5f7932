"""How tensors are cut for, and joined from, tensor-parallel ranks. Pure tensor algebra.

A rule's ``cut`` takes anything that can be indexed like a tensor (``tensor[a:b]``, ``tensor[:, a:b]``), so a lazily
opened safetensors slice is read only where this rank needs it. ``join`` is its exact inverse over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_tropd.types import Architecture


class Sliceable(Protocol):
    """A tensor, or a lazily read one."""

    def __getitem__(self, index: Any) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Cut:
    """Which part of the model: tensor-parallel ``rank`` of ``size``, and the padded vocabulary."""

    architecture: Architecture
    rank: int
    size: int
    padded_vocab: int

    def span(self, total: int) -> slice:
        """This rank's even share of ``total`` rows."""
        share = total // self.size
        return slice(self.rank * share, (self.rank + 1) * share)


Shape = tuple[int, ...]
CutRule = Callable[[Sequence[Sliceable], Cut], Tensor]
JoinRule = Callable[[Sequence[Tensor], Cut], list[Tensor]]
ShapeRule = Callable[[Shape, Cut], list[Shape]]


@dataclass(frozen=True, slots=True)
class Rule:
    """A pair of inverse functions: HF tensors -> one rank's parameter, and all ranks' parameters -> HF tensors.

    ``shapes`` says, from the shape of one rank's parameter, which shapes the HF tensors must have: a cut alone would
    take what it needs of a larger tensor, and pad a vocabulary that is too small.
    """

    cut: CutRule
    join: JoinRule
    shapes: ShapeRule


def shape_of(tensor: Sliceable) -> Shape:
    """The shape of a tensor, or of one that has not been read yet."""
    lazy = hasattr(tensor, "get_shape")
    return tuple(tensor.get_shape() if lazy else tensor.shape)  # type: ignore[attr-defined]


def _cut_whole(parts: Sequence[Sliceable], cut: Cut) -> Tensor:
    return parts[0][:]


def _join_whole(shards: Sequence[Tensor], cut: Cut) -> list[Tensor]:
    return [shards[0]]


def _shapes_whole(shard: Shape, cut: Cut) -> list[Shape]:
    return [shard]


def _cut_columns(parts: Sequence[Sliceable], cut: Cut) -> Tensor:
    return parts[0][:, cut.span(shape_of(parts[0])[1])]


def _join_columns(shards: Sequence[Tensor], cut: Cut) -> list[Tensor]:
    return [torch.cat(list(shards), dim=1)]


def _shapes_columns(shard: Shape, cut: Cut) -> list[Shape]:
    return [(shard[0], shard[1] * cut.size)]


def _cut_stacked_rows(parts: Sequence[Sliceable], cut: Cut) -> Tensor:
    return torch.cat([part[cut.span(cut.architecture.ffn_size)] for part in parts])


def _join_stacked_rows(shards: Sequence[Tensor], cut: Cut) -> list[Tensor]:
    halves = [shard.chunk(2) for shard in shards]
    return [torch.cat([half[i] for half in halves]) for i in range(2)]


def _shapes_stacked_rows(shard: Shape, cut: Cut) -> list[Shape]:
    return [(cut.architecture.ffn_size, *shard[1:])] * 2


def _cut_vocabulary(parts: Sequence[Sliceable], cut: Cut) -> Tensor:
    span = cut.span(cut.padded_vocab)
    vocab = cut.architecture.vocab_size
    real = parts[0][min(span.start, vocab) : min(span.stop, vocab)]
    missing = (span.stop - span.start) - real.shape[0]
    return torch.cat([real, real.new_zeros(missing, *real.shape[1:])]) if missing else real


def _join_vocabulary(shards: Sequence[Tensor], cut: Cut) -> list[Tensor]:
    return [torch.cat(list(shards))[: cut.architecture.vocab_size]]


def _shapes_vocabulary(shard: Shape, cut: Cut) -> list[Shape]:
    return [(cut.architecture.vocab_size, *shard[1:])]


def _cut_qkv(parts: Sequence[Sliceable], cut: Cut) -> Tensor:
    """Megatron interleaves per key/value group: its query heads, its key head, its value head."""
    a = cut.architecture
    groups = a.num_kv_heads // cut.size
    q = parts[0][cut.span(a.num_heads * a.head_dim)]
    k, v = (part[cut.span(a.num_kv_heads * a.head_dim)] for part in parts[1:])
    return torch.cat([x.reshape(groups, -1, *x.shape[1:]) for x in (q, k, v)], dim=1).reshape(-1, *q.shape[1:])


def _join_qkv(shards: Sequence[Tensor], cut: Cut) -> list[Tensor]:
    a = cut.architecture
    per_group = a.num_heads // a.num_kv_heads * a.head_dim
    whole = torch.cat(list(shards))
    grouped = whole.reshape(a.num_kv_heads, per_group + 2 * a.head_dim, *whole.shape[1:])
    parts = grouped.split([per_group, a.head_dim, a.head_dim], dim=1)
    return [part.reshape(-1, *whole.shape[1:]) for part in parts]


def _shapes_qkv(shard: Shape, cut: Cut) -> list[Shape]:
    a = cut.architecture
    return [(heads * a.head_dim, *shard[1:]) for heads in (a.num_heads, a.num_kv_heads, a.num_kv_heads)]


RULES: dict[str, Rule] = {
    "whole": Rule(_cut_whole, _join_whole, _shapes_whole),
    "columns": Rule(_cut_columns, _join_columns, _shapes_columns),
    "stacked_rows": Rule(_cut_stacked_rows, _join_stacked_rows, _shapes_stacked_rows),
    "vocabulary": Rule(_cut_vocabulary, _join_vocabulary, _shapes_vocabulary),
    "qkv": Rule(_cut_qkv, _join_qkv, _shapes_qkv),
}
