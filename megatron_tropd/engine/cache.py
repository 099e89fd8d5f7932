"""Keys and values of a batch that is being continued, and what their attention takes from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_tropd.engine.attention import causal_attention
from megatron_tropd.types import Int64Array


@dataclass(frozen=True, slots=True)
class DistinctContexts:
    """The contexts of a batch that no other one begins with, and the one that each row's is read from."""

    contexts: list[Int64Array]
    source_B: Int64Array

    @staticmethod
    def of(contexts: Sequence[Int64Array]) -> DistinctContexts:
        """Find them. In lexical order whatever begins with a context follows it at once."""
        keys = [context.astype(">i8").tobytes() for context in contexts]
        order = sorted(range(len(keys)), key=keys.__getitem__)
        kept: list[int] = []
        source_B = np.empty(len(keys), np.int64)
        for row in reversed(order):
            if not kept or not keys[kept[-1]].startswith(keys[row]):
                kept.append(row)
            source_B[row] = len(kept) - 1
        return DistinctContexts([contexts[row] for row in kept], source_B)

    def padded(self) -> Int64Array:
        """Return ``[distinct, longest]`` token ids with zeros on the right."""
        found = np.zeros((len(self.contexts), max(map(len, self.contexts))), dtype=np.int64)
        for row, context in enumerate(self.contexts):
            found[row, : len(context)] = context
        return found


class KeyValueCache:
    """Rotated keys and values of every layer and row. All contexts end in the same column.

    So a step's new column is one for all rows and layers, and what a row does not see, the columns before its context,
    is hidden by one mask. Keys are kept transposed, as their product with the queries wants them.
    """

    def __init__(self, distinct: DistinctContexts, length_B: Tensor, *, room: int) -> None:
        """Prepare for rows with contexts of ``length_B`` tokens; ``room``: columns, of these and of what follows."""
        device, longest = length_B.device, int(length_B.max())
        self.keys: list[Tensor] = []  # of each layer [B, key heads, d, room]
        self.values: list[Tensor] = []  # of each layer [B, key heads, room, d]
        self.column = longest  # where the next token goes
        self.room = room
        before_B = longest - length_B
        self._source_B = torch.from_numpy(distinct.source_B).to(device)
        self._position_BK = (torch.arange(longest, device=device) - before_B[:, None]).clamp_(min=0)
        hidden_BK = torch.arange(room, device=device) < before_B[:, None]
        self._mask = torch.zeros(hidden_BK.shape, device=device).masked_fill_(hidden_BK, -torch.inf)[:, None, None]

    def fill(self, key: Tensor, value: Tensor) -> None:
        """Spread the next layer's keys and values of the distinct contexts, ``[P, L, key heads, d]``, over the rows."""
        rows, heads, dim = len(self._source_B), key.size(2), key.size(3)
        keys, values = key.new_zeros(rows, heads, dim, self.room), value.new_zeros(rows, heads, self.room, dim)
        keys[..., : self.column] = key[self._source_B[:, None], self._position_BK].permute(0, 2, 3, 1)
        values[:, :, : self.column] = value[self._source_B[:, None], self._position_BK].transpose(1, 2)
        self.keys.append(keys)
        self.values.append(values)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Cache one new token per row at ``column`` and attend to what its row has."""
        end, keys, values = self.column + 1, self.keys[layer], self.values[layer]
        keys[..., self.column], values[:, :, self.column] = key, value
        # plain products: for one query SDPA's setup costs more than its work
        scores = (query @ keys[..., :end]).float().mul_(scale).add_(self._mask[..., :end])
        return (scores.softmax(-1).to(value.dtype) @ values[:, :, :end]).flatten(1)

    def keep(self, rows: Tensor) -> None:
        """Drop every row but ``rows`` (finished sequences leave the batch)."""
        self._mask = self._mask[rows]
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]


@dataclass(frozen=True, slots=True)
class PrefillAttention:
    """Causal attention within each of ``count`` right-padded contexts, whose keys and values fill a cache."""

    cache: KeyValueCache
    count: int

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attend within every context; ``query`` may have more heads than ``key`` and ``value``."""
        q, k, v = (x.unflatten(0, (self.count, -1)) for x in (query.flatten(1, 2), key, value))
        self.cache.fill(k, v)
        out = causal_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scale)
        return out.transpose(1, 2).flatten(0, 1).flatten(1)
