"""Many tensors in one piece of memory, for transfers that should be few and large."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_ALIGNMENT = 64


class Slot(NamedTuple):
    """Where one tensor lies in a bucket. JSON-able."""

    name: str
    dtype: str
    shape: Sequence[int]
    offset: int  # bytes

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype


def in_buckets(tensors: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Group consecutive tensors, together at most ``max_bytes`` where no single one is larger."""
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in tensors:
        if bucket and size + tensor.nbytes > max_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


def packed(bucket: Sequence[tuple[str, Tensor]]) -> tuple[Tensor, list[Slot]]:
    """Pack the tensors in one new ``[bytes]`` of uint8 on their device, and where each lies."""
    slots, size = [], 0
    for name, tensor in bucket:
        slots.append(Slot(name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), size))
        size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    flat = torch.zeros(size, dtype=torch.uint8, device=bucket[0][1].device)
    for slot, (_, tensor) in zip(slots, bucket, strict=True):
        whole = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        flat[slot.offset : slot.offset + slot.nbytes].copy_(whole)
    return flat, slots


def unpacked(flat: Tensor, slots: Iterable[Slot]) -> Iterator[tuple[str, Tensor]]:
    """Return ``(name, tensor)`` as views of ``flat``."""
    for slot in slots:
        part = flat[slot.offset : slot.offset + slot.nbytes]
        yield slot.name, part.view(slot.torch_dtype).view(list(slot.shape))
