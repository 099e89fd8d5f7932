"""Exchange of host arrays between ranks, without pickling."""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist


def all_gather_arrays(array: np.ndarray, group: dist.ProcessGroup | None) -> list[np.ndarray]:
    """Every rank's one-dimensional array (same dtype, any lengths), in rank order, on every rank."""
    if group is None or dist.get_world_size(group) == 1:
        return [array]
    ranks = dist.get_world_size(group)
    length = torch.tensor([len(array)], dtype=torch.long)
    lengths = [torch.zeros_like(length) for _ in range(ranks)]
    dist.all_gather(lengths, length, group=group)
    longest = max(int(n) for n in lengths)
    padded = torch.zeros(longest, dtype=torch.from_numpy(array).dtype)
    padded[: len(array)] = torch.from_numpy(array)
    gathered = [torch.empty_like(padded) for _ in range(ranks)]
    dist.all_gather(gathered, padded, group=group)
    return [row[: int(n)].numpy() for row, n in zip(gathered, lengths, strict=True)]
