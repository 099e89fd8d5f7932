"""Grades on disk, by the tokens they are about: many small parts, any piece of which is read without the rest.

A directory holds ``recording.json`` (the facts that all grades depend on) and part files. A part appears whole or not
at all and never changes::

    magic | length and text of a JSON header | index, one row per sequence | blobs

The index has, for every sequence, the hash of its tokens, which of its predictions are graded, and where each field's
blob lies. A blob is one field of one sequence: bytes of equal significance together, deflated. Log-probs and entropies
are 16-bit or 32-bit floats, ids the smallest unsigned integers that hold the vocabulary. Nothing is ever pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_tropd.errors import DataError
from megatron_tropd.storage.write_aside import write_aside
from megatron_tropd.types import Int64Array

Values = Literal["fp16", "fp32"]
FORMAT = 2  # 1 was a file per pack
_MAGIC = b"TROPDGR2"
_SUFFIX = ".grades"
_LOWEST = -65504.0  # a log-prob below that is as good as this one; fp16 has no lower
_BF16 = "bfloat16"  # numpy has none: arrays of its bits travel as int16 under this name


@dataclass(frozen=True, slots=True, kw_only=True)
class Grades:
    """What is known of some predictions of one sequence."""

    key: bytes  # sequence_key of its tokens
    first: int  # the prediction that row 0 is about
    pack: int = 0  # 64-bit hash of what it was graded together with
    asked: int = 0  # 64-bit hash of the ids that were asked about
    fields: Mapping[str, np.ndarray]  # [rows] or [rows, width]; bfloat16 as int16 under a name ending in .bf16


@dataclass(frozen=True, slots=True)
class Place:
    """Where the grades of one sequence lie."""

    part: int
    row: int
    first: int
    rows: int
    pack: int
    asked: int


def sequence_key(token_ids: Int64Array) -> bytes:
    """16 bytes that name a sequence: a hash of its tokens, prompt and all."""
    return hashlib.blake2b(np.ascontiguousarray(token_ids, dtype="<i8").tobytes(), digest_size=16).digest()


def hash64(array: np.ndarray) -> int:
    """Hash of an array's values, never 0, which stands for nothing."""
    whole = np.ascontiguousarray(array, dtype="<i8")
    digest = hashlib.blake2b(f"{whole.shape}".encode() + whole.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


def id_type(vocab_size: int) -> np.dtype:
    """The smallest unsigned integers that hold every id."""
    return np.min_scalar_type(max(vocab_size - 1, 0))


def _index_type(names: Sequence[str]) -> np.dtype:
    blobs = [
        (f"{name}:{what}", kind) for name in names for what, kind in (("at", "<u8"), ("size", "<u4"), ("crc", "<u4"))
    ]
    return np.dtype(
        [("low", "<u8"), ("high", "<u8"), ("pack", "<u8"), ("asked", "<u8"), ("first", "<u4"), ("rows", "<u4"), *blobs]
    )


# --------------------------------------------------------------------------- writing


def write_part(directory: Path, grades: Sequence[Grades], *, vocab_size: int, values: Values) -> Path | None:
    """Writes grades, all of the same fields, as one part; None when there are none.

    The name follows from what is in it, so that what is graded twice is there once.
    """
    if not grades:
        return None
    stored = [{n: _stored(n, a, vocab_size, values) for n, a in item.fields.items()} for item in grades]
    names = list(stored[0])
    index, blobs, at = np.zeros(len(grades), _index_type(names)), [], 0
    for row, (item, arrays) in enumerate(zip(grades, stored, strict=True)):
        low, high = np.frombuffer(item.key, "<u8")
        rows = len(next(iter(arrays.values())))
        for column, value in (("low", low), ("high", high), ("pack", item.pack), ("asked", item.asked)):
            index[column][row] = value
        index["first"][row], index["rows"][row] = item.first, rows
        for name in names:
            blob = _deflated(arrays[name])
            index[f"{name}:at"][row], index[f"{name}:size"][row] = at, len(blob)
            index[f"{name}:crc"][row] = zlib.crc32(blob)
            blobs.append(blob)
            at += len(blob)
    fields = {
        name.removesuffix(".bf16"): {
            "dtype": _BF16 if name.endswith(".bf16") else array.dtype.str,
            "shape": list(array.shape[1:]),
        }
        for name, array in stored[0].items()
    }
    text = json.dumps({"fields": fields, "sequences": len(grades), "bytes": at, "index": zlib.crc32(index.tobytes())})
    head = _MAGIC + len(text.encode()).to_bytes(8, "little") + text.encode() + index.tobytes()
    path = directory / (hashlib.blake2b(head, digest_size=12).hexdigest() + _SUFFIX)
    return write_aside(path, lambda file: file.writelines([head, *blobs]))


def _stored(name: str, array: np.ndarray, vocab_size: int, values: Values) -> np.ndarray:
    if name.removesuffix(".bf16").endswith("_ids"):
        return array.astype(id_type(vocab_size))
    if array.dtype == np.float32 and values == "fp16" and "hidden" not in name:
        finite = np.maximum(array, np.float32(_LOWEST), where=~np.isneginf(array), out=array.copy())
        return finite.astype(np.float16)
    return array


def _deflated(array: np.ndarray) -> bytes:
    # sign and exponent of neighbours are alike: together they deflate to a fraction
    planes = np.ascontiguousarray(array).view(np.uint8).reshape(-1, array.dtype.itemsize).T
    return zlib.compress(planes.tobytes(), 1)


# --------------------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True)
class _Part:
    path: Path
    fields: Mapping[str, Mapping[str, Any]]
    index: np.ndarray
    start: int  # where the blobs begin


class Store:
    """The grades in a directory: their indexes in memory, all else read when asked for."""

    def __init__(self, directory: Path) -> None:
        """Raises DataError for a torn part."""
        self.directory = directory
        self._parts = [_read_part(path) for path in sorted(directory.glob(f"*{_SUFFIX}"))]
        lows = [part.index["low"] for part in self._parts]
        low_S = np.concatenate([np.empty(0, "<u8"), *lows])
        self._order_S = np.argsort(low_S, kind="stable")
        self._low_S = low_S[self._order_S]
        counts = [len(low) for low in lows]
        self._part_S = np.repeat(np.arange(len(counts)), counts)
        self._row_S = np.concatenate([np.empty(0, np.int64), *(np.arange(count) for count in counts)])

    def __len__(self) -> int:
        return len(self._low_S)

    def __contains__(self, key: bytes) -> bool:
        return bool(self.find(key))

    @property
    def first(self) -> Place:
        """Some place; there must be one."""
        entry = self._parts[int(self._part_S[0])].index[0]
        return self.find(np.array([entry["low"], entry["high"]], "<u8").tobytes())[0]

    def keys(self) -> list[bytes]:
        """Every sequence that has grades."""
        both = (np.stack([part.index["low"], part.index["high"]], axis=1).astype("<u8") for part in self._parts)
        return sorted({row.tobytes() for pairs in both for row in pairs})

    def find(self, key: bytes) -> list[Place]:
        """Everything that is known of a sequence."""
        low, high = np.frombuffer(key, "<u8")
        begin, end = np.searchsorted(self._low_S, low, "left"), np.searchsorted(self._low_S, low, "right")
        found = []
        for number in self._order_S[begin:end].tolist():
            part, row = int(self._part_S[number]), int(self._row_S[number])
            entry = self._parts[part].index[row]
            if entry["high"] == high:
                numbers = (int(entry[name]) for name in ("first", "rows", "pack", "asked"))
                found.append(Place(part, row, *numbers))
        return found

    def width(self, place: Place, name: str) -> int | None:
        """Columns of a field; None where the part has no such field."""
        field = self._parts[place.part].fields.get(name)
        return None if field is None else (field["shape"] or [1])[0]

    def path(self, place: Place) -> Path:
        """The part that a place is in."""
        return self._parts[place.part].path

    def read(self, place: Place, name: str) -> tuple[np.ndarray, bool]:
        """One field of one sequence, ``[rows]`` or ``[rows, width]``, and whether its int16 are bits of bfloat16.

        Raises:
            DataError: the part is torn or has changed.
        """
        part = self._parts[place.part]
        entry, field = part.index[place.row], part.fields[name]
        stored = f"{name}.bf16" if field["dtype"] == _BF16 else name
        size = int(entry[f"{stored}:size"])
        try:
            with part.path.open("rb") as file:
                file.seek(part.start + int(entry[f"{stored}:at"]))
                blob = file.read(size)
            if len(blob) != size or zlib.crc32(blob) != int(entry[f"{stored}:crc"]):
                raise ValueError("a checksum does not match")
            kind = np.dtype(np.int16 if field["dtype"] == _BF16 else field["dtype"])
            planes = np.frombuffer(zlib.decompress(blob), np.uint8).reshape(kind.itemsize, -1)
            array = np.ascontiguousarray(planes.T).reshape(-1).view(kind)
            return array.reshape(place.rows, *field["shape"]), field["dtype"] == _BF16
        except (OSError, ValueError, zlib.error) as error:
            raise _torn(part.path, error) from error


def _read_part(path: Path) -> _Part:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if file.read(len(_MAGIC)) != _MAGIC:
                raise ValueError("it does not begin as one")
            length = int.from_bytes(file.read(8), "little")
            if length > size:
                raise ValueError("it ends too early")
            header = json.loads(file.read(length))
            fields = dict(header["fields"])
            names = [f"{name}.bf16" if field["dtype"] == _BF16 else name for name, field in fields.items()]
            kind = _index_type(names)
            content = file.read(kind.itemsize * int(header["sequences"]))
            start = file.tell()
            if zlib.crc32(content) != header["index"] or size != start + int(header["bytes"]):
                raise ValueError("a checksum does not match, or it ends too early")
            return _Part(path, fields, np.frombuffer(content, kind), start)
    except (OSError, ValueError, KeyError, TypeError, MemoryError, OverflowError) as error:
        raise _torn(path, error) from error


def _torn(path: Path, error: Exception) -> DataError:
    return DataError(f"{path.absolute()} is torn or not a recording: {error}. Record it again.")
