"""Exchange of host arrays between ranks, without pickling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.distributed as dist


def all_gather_arrays(array: np.ndarray, group: dist.ProcessGroup | None) -> list[np.ndarray]:
    """Gather every rank's one-dimensional array (same dtype, any lengths), in rank order, on every rank."""
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


def broadcast_arrays(arrays: Sequence[np.ndarray], dtypes: Sequence[np.dtype]) -> list[np.ndarray]:
    """Send the first rank's one-dimensional arrays, of these dtypes, to every rank; elsewhere ``arrays`` is not
    read.
    """
    lengths = torch.tensor([len(array) for array in arrays] if dist.get_rank() == 0 else [0] * len(dtypes))
    dist.broadcast(lengths, src=0)
    received = []
    for number, (length, dtype) in enumerate(zip(lengths.tolist(), dtypes, strict=True)):
        array = arrays[number] if dist.get_rank() == 0 else np.empty(length, dtype)
        whole = torch.from_numpy(np.ascontiguousarray(array))
        dist.broadcast(whole, src=0)
        received.append(whole.numpy())
    return received


def largest_or_infinite(values: torch.Tensor) -> float:
    """Return the largest value, infinite where one is not a number; 0 of none.

    Comparisons with nan are false, Python's ``max`` and the collectives' drop it: a check must not pass by that.
    """
    return float(torch.nan_to_num(values.float(), nan=math.inf, posinf=math.inf).max()) if values.numel() else 0.0
