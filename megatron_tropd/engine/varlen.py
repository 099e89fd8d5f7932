"""Attention of all pieces of a forest in one call, by a kernel that takes lengths of queries and of keys apart.

For GPUs and half precision. A kernel is tried once, on a few numbers, before it is used: one that fails, or that does
not let the last query see the last key, is left alone, and that is said.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_tropd.engine.rows import gather_rows
from megatron_tropd.types import Int64Array

_log = logging.getLogger(__name__)


def varlen_attn(*args: Any, **options: Any) -> Any:
    """Call torch's kernel. Its module brings torch's compiler along, a second that starting on a CPU need not take."""
    from torch.nn.attention import varlen

    return varlen.varlen_attn(*args, **options)


@dataclass(frozen=True, slots=True)
class VarlenCall:
    """Where every piece's queries and keys begin and end; its last query sees its last key."""

    path: Tensor  # rows that are the pieces' keys, one piece after the other
    cu_queries: Tensor  # int32; queries stand in their order
    cu_keys: Tensor  # int32
    longest: tuple[int, int]  # queries, keys

    @staticmethod
    def build(counts: Int64Array, paths: list[Int64Array], device: torch.device) -> VarlenCall:
        """Build the call from the number of queries of every piece and the rows of its path."""
        lengths = np.array([len(path) for path in paths])
        offsets = [np.concatenate([[0], np.cumsum(x)]).astype(np.int32) for x in (counts, lengths)]
        path, queries, keys = (torch.from_numpy(x).to(device) for x in (np.concatenate(paths), *offsets))
        return VarlenCall(path, queries, keys, (int(counts.max()), int(lengths.max())))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attend: ``[r, heads, d]`` of the queries and ``[R, key heads, d]`` of all rows."""
        k, v = (gather_rows(x, self.path) for x in (key, value))
        out = varlen_attn(
            query,
            k,
            v,
            self.cu_queries,
            self.cu_keys,
            *self.longest,
            scale=scale,
            window_size=(-1, 0),
            enable_gqa=query.size(1) != key.size(1),
        )
        assert isinstance(out, Tensor)  # no statistics were requested
        return out


@lru_cache
def varlen_works(device: torch.device, dtype: torch.dtype, heads: tuple[int, int], dim: int) -> bool:
    """Try the kernel on pieces of 3 queries over 5 keys and 2 over 2. ``heads``: of queries and of keys."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(5, heads[0], dim), (7, heads[1], dim), (7, heads[1], dim)]
    query, key, value = (torch.randn(x, generator=generator).to(device, dtype) for x in shapes)
    call = VarlenCall.build(np.array([3, 2]), [np.arange(5), np.arange(5, 7)], device)
    try:
        found = call.attend(query, key, value, 0.3)
    except (RuntimeError, NotImplementedError) as error:
        problem = f"it fails ({str(error).splitlines()[0]})"
    else:
        q, k, v = (x.float().transpose(0, 1) for x in (query, key, value))
        seen = torch.ones(3, 5, dtype=torch.bool, device=device).tril(2)
        first = F.scaled_dot_product_attention(q[:, :3], k[:, :5], v[:, :5], seen, scale=0.3, enable_gqa=True)
        last = F.scaled_dot_product_attention(q[:, 3:], k[:, 5:], v[:, 5:], is_causal=True, scale=0.3, enable_gqa=True)
        error_ = (found.float().transpose(0, 1) - torch.cat([first, last], dim=1)).abs().max()
        if float(error_) < 0.05:  # a few roundings of half precision; an unseen key changes tenths
            return True
        problem = f"it is off by {float(error_):.2f}"
    _log.warning(
        "torch's attention with lengths of queries and keys apart is not used for %s with heads of %d: %s. Rows that "
        "sequences share are attended in padded calls.",
        dtype,
        dim,
        problem,
    )
    return False
