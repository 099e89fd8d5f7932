"""Safetensors files read slice by slice with plain reads, so that a rank touches the bytes of its own slices alone.

The library maps files into memory. There, pages of whole tensors count as this process's memory even when it needs
some columns only, and a file that is cut short under a running process kills it with a signal instead of an error.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_tropd.errors import CheckpointError
from megatron_tropd.storage.kinds import foreign_kind

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
KINDS = {dtype: kind for kind, dtype in _DTYPES.items()}


class LazyWeight(Protocol):
    """A tensor on disk under its Hugging Face name, whatever file and layout it is in."""

    name: str
    shape: tuple[int, ...]

    @property
    def kind(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def __getitem__(self, index: Any) -> Tensor: ...


class WeightsSource(Protocol):
    """The tensors of a model by their Hugging Face names, and the directory they are in."""

    directory: Path

    def __getitem__(self, name: str) -> LazyWeight: ...

    def __contains__(self, name: object) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...

    def __len__(self) -> int: ...


class RawFile:
    """A file of which ranges of bytes are read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = -1
        self._file = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self._file >= 0:
            os.close(self._file)

    def read(self, count: int, offset: int) -> bytes:
        """Read so many bytes from ``offset``; fewer where the file ends."""
        return os.pread(self._file, count, offset)

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill ``buffer`` with the file's bytes from ``offset``."""
        done = 0
        while done < len(buffer):
            count = os.preadv(self._file, [buffer[done:]], offset + done)
            if count == 0:
                raise CheckpointError(f"{self.path.absolute()} became shorter while it was read. Copy it again.")
            done += count


class SafetensorsFile:
    """One file: the names, shapes and places of its tensors. Nothing of a tensor is read before it is sliced.

    Raises:
        CheckpointError: the file is torn, or not safetensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt"):
                pass  # the library's own checks of header and length
            file = RawFile(path)
            length = int.from_bytes(file.read(8, 0), "little")
            header = json.loads(file.read(length, 8))
        except (SafetensorError, OSError, ValueError) as error:
            if kind := foreign_kind(path):
                raise CheckpointError(f"{path.absolute()} is {kind}") from error
            raise CheckpointError(f"{path.absolute()} is torn or not safetensors: {error}. Copy it again.") from error
        header.pop("__metadata__", None)
        self.tensors = {
            name: LazyTensor(file, name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in header.items()
        }


class LazyTensor:
    """A tensor on disk. Indexing with one slice, or of a matrix two, reads those rows and columns."""

    def __init__(self, file: RawFile, name: str, kind: str, shape: tuple[int, ...], offset: int) -> None:
        self.name = name
        self.kind = kind  # safetensors' own name of the dtype
        self.shape = shape
        self._file = file
        self._offset = offset

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype; CheckpointError for anything but a floating-point tensor of 16 bits or more."""
        if self.kind not in _DTYPES:
            raise CheckpointError(
                f"{self._file.path.absolute()}: {self.name} is of type {self.kind}: quantized weights are not "
                "supported. Save the model as float32 or bfloat16."
            )
        return _DTYPES[self.kind]

    def __getitem__(self, index: Any) -> Tensor:
        first, second = index if isinstance(index, tuple) else (index, slice(None))
        width = math.prod(self.shape[1:])
        start, stop, _ = first.indices(self.shape[0])
        left, right, _ = second.indices(width)
        out = torch.empty(max(stop - start, 0), max(right - left, 0), dtype=self.dtype)
        if out.numel():
            size = self.dtype.itemsize
            self._read(out, self._offset + (start * width + left) * size, stride=width * size)
        return out if out.size(1) < width else out.view(len(out), *self.shape[1:])

    def _read(self, out: Tensor, start: int, *, stride: int) -> None:
        """Fill the rows of ``out``, which start every ``stride`` bytes from ``start``."""
        buffer, row_bytes = out.view(-1).view(torch.uint8).numpy().data, out.nbytes // len(out)
        if row_bytes == stride:
            self._file.read_into(buffer, start)
            return
        for number in range(len(out)):
            self._file.read_into(buffer[number * row_bytes :][:row_bytes], start + number * stride)
