"""Recordings of format 2, read to be converted: files of our own, which held one deflated blob per field and sequence.

A part was::

    magic | length and text of a JSON header | index, one row per sequence | blobs
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_tropd.errors import DataError
from megatron_tropd.storage.write_aside import make_directory
from megatron_tropd.teacher.recording import UNKNOWN, read_facts, write_facts
from megatron_tropd.teacher.schema import SCORE_FIELDS
from megatron_tropd.teacher.store import SequenceScores, write_part

FORMAT = 2
SUFFIX = ".grades"
_MAGIC = b"TROPDGR2"
_BF16 = "bfloat16"
_DTYPES = {_BF16, "|u1", "<f2", "<f4", "<f8", "<i4", "<i8", "<u2", "<u4"}
# names of attributes that have changed since; the others are those of SCORE_FIELDS
_RENAMED = {"topk_logtail_N": "logtail", "asked_ids_NJ": "query_ids", "asked_logprob_NJ": "query_logprob"}
_NAMES = {field.attribute: field.name for field in SCORE_FIELDS} | {f.name: f.name for f in SCORE_FIELDS} | _RENAMED
_NOT_WRITTEN = ["dtype", "chat template", "end tokens", "ends counted as one"]


@dataclass(frozen=True, slots=True)
class _Part:
    path: Path
    fields: Mapping[str, Mapping[str, Any]]
    index: np.ndarray
    start: int  # where the blobs begin


def convert_recording(old: Path, new: Path) -> int:
    """Write a recording of format 2 as one of Parquet files; the old one stays as it is.

    Returns:
        How many sequences it holds; one that was scored several times counts as often.

    Raises:
        DataError: ``old`` is no recording of format 2 or is torn, or there is something at ``new``.
    """
    facts = read_facts(old)
    if facts.pop("format", None) != FORMAT:
        raise DataError(f"{old.absolute()} is not a recording of format {FORMAT}: there is nothing to convert.")
    if new.exists() and any(new.iterdir()):
        raise DataError(f"{new.absolute()} is not empty. Name a directory that does not exist yet.")
    parts = [_read_part(path) for path in sorted(old.glob(f"*{SUFFIX}"))]
    make_directory(new)
    for part in parts:
        has_fp16 = any(field["dtype"] == "<f2" for field in part.fields.values())
        scores = list(_scores(part))
        write_part(new, scores, vocab_size=int(facts["vocab_size"]), values="fp16" if has_fp16 else "fp32")
    unknown = [name for name in _NOT_WRITTEN if name not in facts]
    write_facts(new, facts | {UNKNOWN: unknown})  # at last: without it, the directory is no recording
    return sum(len(part.index) for part in parts)


def _scores(part: _Part) -> Iterator[SequenceScores]:
    for row in part.index:
        first, rows = int(row["first"]), int(row["rows"])
        yield SequenceScores(
            key=np.array([row["low"], row["high"]], "<u8").tobytes(),
            position=np.arange(first, first + rows),
            pack=int(row["pack"]),
            queries=int(row["asked"]),
            fields={_NAMES[name]: _read(part, row, name) for name in part.fields},
        )


def _read(part: _Part, row: np.ndarray, name: str) -> torch.Tensor:
    field = part.fields[name]
    stored = f"{name}.bf16" if field["dtype"] == _BF16 else name
    size = int(row[f"{stored}:size"])
    try:
        with part.path.open("rb") as file:
            file.seek(part.start + int(row[f"{stored}:at"]))
            blob = file.read(size)
        if len(blob) != size or zlib.crc32(blob) != int(row[f"{stored}:crc"]):
            raise ValueError("a checksum does not match")
        kind = np.dtype(np.int16 if field["dtype"] == _BF16 else field["dtype"])
        planes = np.frombuffer(zlib.decompress(blob), np.uint8).reshape(kind.itemsize, -1)
        array = np.ascontiguousarray(planes.T).reshape(-1).view(kind).reshape(int(row["rows"]), *field["shape"])
    except (OSError, ValueError, LookupError, TypeError, zlib.error) as error:
        raise _torn(part.path, error) from error
    if field["dtype"] == _BF16:
        return torch.from_numpy(array).view(torch.bfloat16)
    return torch.from_numpy(array.astype(np.float32 if array.dtype.kind == "f" else np.int64))


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
            kind = _index_type([f"{n}.bf16" if field["dtype"] == _BF16 else n for n, field in fields.items()])
            content = file.read(kind.itemsize * int(header["sequences"]))
            start = file.tell()
            if zlib.crc32(content) != header["index"] or size != start + int(header["bytes"]):
                raise ValueError("a checksum does not match, or it ends too early")
            kinds = {field["dtype"] for field in fields.values()} - _DTYPES
            if kinds:  # the header has no checksum: a bit that flips must not turn the bytes of numbers round
                raise ValueError(f"it has numbers of kinds that no version wrote: {', '.join(map(repr, kinds))}")
            unknown = sorted(set(fields) - set(_NAMES))
            if unknown:
                raise ValueError(f"it has fields that no version wrote: {', '.join(unknown)}")
            return _Part(path, fields, np.frombuffer(content, kind), start)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, MemoryError, OverflowError) as error:
        raise _torn(path, error) from error


def _index_type(names: Sequence[str]) -> np.dtype:
    blobs = [
        (f"{name}:{what}", kind) for name in names for what, kind in (("at", "<u8"), ("size", "<u4"), ("crc", "<u4"))
    ]
    heads = [("low", "<u8"), ("high", "<u8"), ("pack", "<u8"), ("asked", "<u8"), ("first", "<u4"), ("rows", "<u4")]
    return np.dtype([*heads, *blobs])


def _torn(path: Path, error: Exception) -> DataError:
    return DataError(f"{path.absolute()} is torn, or not a part of a recording: {error}. Move it away.")
