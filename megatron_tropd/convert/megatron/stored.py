"""Tensors of a ``torch_dist`` checkpoint: the table of what lies where, and rows of it read without the rest.

PyTorch's own reader loads every chunk whole, once for each range of rows that is wanted of it: a rank would hold an
embedding to read its slice of it. A chunk is what ``torch.save`` writes of one tensor, whose bytes lie as they are in
its archive, so here they are found once and read in place.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tropd.convert.lazy import KINDS, LazyTensor, RawFile
from megatron_tropd.convert.megatron.pickles import Inert, named, pickle_of, read_plain
from megatron_tropd.errors import CheckpointError
from megatron_tropd.models.rules import Shape

_LOCAL_HEADER = 30  # bytes of a zip entry's own header, without name and extra field


@dataclass(slots=True)
class StoredBox:
    """A box of a stored tensor, and the bytes of a file in which ``torch.save`` has put it."""

    offsets: Shape
    sizes: Shape
    file: str
    start: int
    length: int


@dataclass(slots=True)
class StoredTensor:
    """A tensor of the table: its global shape, which may begin with axes of layers and experts, and its chunks."""

    key: str
    dtype: torch.dtype
    shape: Shape
    chunks: list[StoredBox] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class Table:
    """The table in ``.metadata``: tensors and other entries by key, and the names in it that were left out."""

    directory: Path
    tensors: Mapping[str, StoredTensor]
    others: Mapping[str, Inert]  # by key, where each lies
    left_out: Counter[str]


def read_table(directory: Path) -> Table:
    """Read ``.metadata`` of a checkpoint directory.

    Raises:
        CheckpointError: it is missing, torn, no table of tensors, or names files that are not there or too short.
    """
    path = directory / ".metadata"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"{path.absolute()} cannot be read ({error.strerror}): copy the whole directory."
        ) from error
    found, left_out = read_plain(path, data)
    try:
        table = _table_of(directory, found, left_out)
    except (AttributeError, TypeError, LookupError, ValueError) as error:
        raise CheckpointError(
            f"{path.absolute()} is not the table of a checkpoint: {error}{named(left_out)}. It was not loaded. "
            "Copy it again from where it was written."
        ) from error
    _check_files(table)
    return table


def _table_of(directory: Path, found: Any, left_out: Counter[str]) -> Table:
    entries, places = found.field("state_dict_metadata"), found.field("storage_data")
    tensors: dict[str, StoredTensor] = {}
    others: list[str] = []
    for key, entry in entries.items():
        if not isinstance(key, str) or not isinstance(entry, Inert):
            raise TypeError(f"entry {key!r}")
        if entry.origin.endswith(".TensorStorageMetadata"):
            dtype = entry.field("properties").state[0]
            if not isinstance(dtype, torch.dtype):
                raise TypeError(f"the type of {key}")
            tensors[key] = StoredTensor(key, dtype, _sizes(entry.field("size")))
        elif entry.origin.endswith(".BytesStorageMetadata"):
            others.append(key)
        else:
            raise TypeError(f"entry {key}")
    located = {(index.field("fqn"), index.field("offset")): info for index, info in places.items()}
    for key, tensor in tensors.items():
        for box in entries[key].field("chunks"):
            offsets, sizes = _sizes(box.field("offsets")), _sizes(box.field("sizes"))
            tensor.chunks.append(_chunk(offsets, sizes, located[key, offsets]))
    found_others = {key: located[key, None] for key in others if (key, None) in located}
    return Table(directory=directory, tensors=tensors, others=found_others, left_out=left_out)


def read_object(table: Table, key: str) -> tuple[Any, Counter[str]]:
    """Read the pickle of an entry that is no tensor into plain values and stand-ins, and the names left out.

    Raises:
        CheckpointError: it is torn, or none that ``torch.save`` writes.
    """
    chunk = _chunk((), (), table.others[key])
    path = table.directory / chunk.file
    try:
        with zipfile.ZipFile(_Region(RawFile(path), chunk.start, chunk.length)) as archive:
            data = archive.read(pickle_of(archive))
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise CheckpointError(
            f"{path.absolute()}: {key} is torn, or nothing that torch.save writes: {error}."
        ) from error
    return read_plain(path, data)


def _sizes(values: Any) -> Shape:
    if not isinstance(values, tuple) or not all(type(value) is int and value >= 0 for value in values):
        raise TypeError(f"a shape is {values!r}")
    return values


def _chunk(offsets: Shape, sizes: Shape, info: Inert) -> StoredBox:
    file, start, length = (info.field(name) for name in ("relative_path", "offset", "length"))
    if not isinstance(file, str) or Path(file).name != file or type(start) is not int or type(length) is not int:
        raise ValueError(f"it places a tensor at {file!r}, which is no file beside it")
    if info.field("transform_descriptors"):
        raise ValueError(f"its files are transformed ({info.field('transform_descriptors')}), which is not supported")
    return StoredBox(offsets, sizes, file, start, length)


def _check_files(table: Table) -> None:
    """Raise CheckpointError when a file that holds a tensor is missing, or ends before it does."""
    ends: dict[str, int] = {}
    for tensor in table.tensors.values():
        for chunk in tensor.chunks:
            ends[chunk.file] = max(ends.get(chunk.file, 0), chunk.start + chunk.length)
    missing = [file for file in sorted(ends) if not (table.directory / file).is_file()]
    if missing:
        raise CheckpointError(
            f"{table.directory.absolute()} lacks {missing[0]} ({len(missing)} of {len(ends)} files with tensors are "
            "missing), which its .metadata names. Copy the whole directory."
        )
    for file, end in ends.items():
        size = (table.directory / file).stat().st_size
        if size < end:
            raise CheckpointError(
                f"{(table.directory / file).absolute()} is cut short: it has {size:,} bytes of at least {end:,}. "
                "Copy it again."
            )


class StoredReader:
    """Reader of rows of stored tensors."""

    def __init__(self, table: Table) -> None:
        self.table = table
        self._files: dict[str, RawFile] = {}
        self._boxes: dict[str, dict[Shape, list[StoredBox]]] = {}  # by what stands at a place on the leading axes
        self._blobs: dict[tuple[str, int], _Blob] = {}

    def read(self, key: str, place: Shape, rows: slice, columns: slice | None) -> Tensor:
        """Read rows, and columns, of what stands at ``place`` on the leading axes of a stored tensor.

        Returns:
            ``[rows, columns]``, or ``[rows]`` of a vector.

        Raises:
            CheckpointError: no chunk, or more than one, holds some of it.
        """
        stored = self.table.tensors[key]
        inner = stored.shape[len(place) :]
        columns = slice(0, inner[1]) if len(inner) > 1 and columns is None else columns
        wanted = [rows] if columns is None else [rows, columns]
        out = torch.empty([one.stop - one.start for one in wanted], dtype=stored.dtype)
        filled = 0
        for chunk in self._at(stored, place):
            origin = chunk.offsets[len(place) :]
            boxes = [
                _overlap(one, first, size)
                for one, first, size in zip(wanted, origin, chunk.sizes[len(place) :], strict=True)
            ]
            if any(box.start >= box.stop for box in boxes):
                continue
            inside = tuple(_shifted(box, first) for box, first in zip(boxes, origin, strict=True))
            target = out[tuple(_shifted(box, one.start) for box, one in zip(boxes, wanted, strict=True))]
            target.copy_(self._tensor(stored, chunk, place)[inside if len(inside) > 1 else inside[0]].view_as(target))
            filled += target.numel()
        if filled != out.numel():
            raise CheckpointError(
                f"{self.table.directory.absolute()}: of {key}{list(place) or ''} rows {rows.start} to "
                f"{rows.stop}, {filled:,} of {out.numel():,} numbers stand in its chunks. The checkpoint is not "
                "whole: copy it again."
            )
        return out

    def _at(self, stored: StoredTensor, place: Shape) -> list[StoredBox]:
        boxes = self._boxes.setdefault(stored.key, {})
        if not boxes:
            for chunk in stored.chunks:
                for at in _places(chunk, len(place)):
                    boxes.setdefault(at, []).append(chunk)
        return boxes.get(place, [])

    def _tensor(self, stored: StoredTensor, chunk: StoredBox, place: Shape) -> LazyTensor | Tensor:
        """Return what a chunk has at ``place``, lazily."""
        blob = self._blob(stored, chunk)
        at, inner = 0, chunk.sizes[len(place) :]
        for number, first, size in zip(place, chunk.offsets, chunk.sizes, strict=False):
            at = at * size + number - first
        if blob.whole is not None:
            return blob.whole.reshape(-1, *inner)[at]
        start = blob.start + at * math.prod(inner) * stored.dtype.itemsize
        return LazyTensor(self._file(chunk.file), stored.key, KINDS.get(stored.dtype, str(stored.dtype)), inner, start)

    def _blob(self, stored: StoredTensor, chunk: StoredBox) -> _Blob:
        where = (chunk.file, chunk.start)
        if where not in self._blobs:
            self._blobs[where] = _find_blob(self._file(chunk.file), stored, chunk)
        return self._blobs[where]

    def _file(self, name: str) -> RawFile:
        if name not in self._files:
            self._files[name] = RawFile(self.table.directory / name)
        return self._files[name]


def _places(chunk: StoredBox, axes: int) -> Iterator[Shape]:
    """Yield every place on the leading axes of which a chunk holds something."""
    ranges = [range(first, first + size) for first, size in zip(chunk.offsets[:axes], chunk.sizes[:axes], strict=True)]
    found: list[Shape] = [()]
    for one in ranges:
        found = [(*place, number) for place in found for number in one]
    yield from found


def _overlap(wanted: slice, first: int, size: int) -> slice:
    return slice(max(wanted.start, first), min(wanted.stop, first + size))


def _shifted(one: slice, origin: int) -> slice:
    return slice(one.start - origin, one.stop - origin)


# --------------------------------------------------------------------------- what torch.save wrote of one tensor


@dataclass(slots=True)
class _Blob:
    """Where the numbers of a chunk begin in its file; or all of them, where they do not lie in order."""

    start: int
    whole: Tensor | None = None


class _Region(io.RawIOBase):
    """Part of a file, as a file."""

    def __init__(self, file: RawFile, start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(max(min(len(buffer), self._length - self._at), 0), self._start + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _find_blob(file: RawFile, stored: StoredTensor, chunk: StoredBox) -> _Blob:
    """Find the numbers of a chunk.

    Raises:
        CheckpointError: it is torn, or something else than one tensor of the shape and type that the table says.
    """
    region = _Region(file, chunk.start, chunk.length)
    where = f"{file.path.absolute()}, {stored.key} at {list(chunk.offsets)}"
    try:
        with zipfile.ZipFile(region) as archive:
            info = pickle_of(archive)
            tensor, left_out = read_plain(file.path, archive.read(info))
            folder = info.filename.removesuffix("data.pkl")
            order = f"{folder}byteorder"
            if order in archive.namelist() and archive.read(order) != b"little":
                raise ValueError("its numbers are not little-endian")
            storage, first, shape, strides = tensor.args[:4]
            data = archive.getinfo(f"{folder}data/{storage.args[2]}")
            kind = storage.args[1].origin
            if data.compress_type != zipfile.ZIP_STORED or left_out:
                raise ValueError(f"it is compressed, or more than numbers{named(left_out)}")
    except (OSError, zipfile.BadZipFile, ValueError, AttributeError, TypeError, LookupError) as error:
        raise CheckpointError(
            f"{where}: no tensor that torch.save writes ({error}). It was not loaded. Copy it again."
        ) from error
    if tuple(shape) != chunk.sizes or kind != _STORAGES.get(stored.dtype):
        raise CheckpointError(
            f"{where}: the table says {list(chunk.sizes)} of {stored.dtype}, the file has {list(shape)} of {kind}. "
            "The two are not of one checkpoint: copy both again."
        )
    if any(a != b for a, b, size in zip(strides, _contiguous(chunk.sizes), chunk.sizes, strict=True) if size > 1):
        # a view of something larger, which Megatron does not write
        raw = io.BytesIO(file.read(chunk.length, chunk.start))
        return _Blob(0, torch.load(raw, map_location="cpu", weights_only=True).detach().contiguous())
    header = file.read(_LOCAL_HEADER, chunk.start + data.header_offset)
    name, extra = (int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
    start = data.header_offset + _LOCAL_HEADER + name + extra + first * stored.dtype.itemsize
    if start + math.prod(chunk.sizes) * stored.dtype.itemsize > chunk.length:
        raise CheckpointError(f"{where}: its numbers end after it does. Copy it again.")
    return _Blob(chunk.start + start)


_STORAGES = {
    torch.float64: "torch.DoubleStorage",
    torch.float32: "torch.FloatStorage",
    torch.float16: "torch.HalfStorage",
    torch.bfloat16: "torch.BFloat16Storage",
}


def _contiguous(shape: Shape) -> Shape:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
