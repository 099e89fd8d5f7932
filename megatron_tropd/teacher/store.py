"""The teacher's scores on disk as Parquet, by the sequences that they are about.

A directory holds ``recording.json`` (``teacher.recording``: the facts that all scores depend on) and part files, which
pandas opens: one row per prediction, with the columns

    sequence   ``sequence_key`` of the whole sequence's tokens, in hex
    position   index of the predicting token within the sequence
    token_id   the token that was predicted; null where it is not known

and those of ``schema.SCORE_FIELDS``, with lists of a fixed size for several values per prediction. A sequence's rows
lie together in one row group; the footer holds an index of all sequences, so that reading one of them reads the wanted
columns of its row group and nothing else. A part appears whole or not at all and never changes.
"""

from __future__ import annotations

import base64
import hashlib
import json
import struct
import zlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from megatron_tropd.errors import DataError
from megatron_tropd.storage.write_aside import write_aside
from megatron_tropd.teacher import schema
from megatron_tropd.teacher.seal import Seal, read_seal, seal
from megatron_tropd.types import Int64Array

Values = Literal["fp16", "fp32"]
FORMAT = 3  # 1 was a file per pack, 2 files of our own: teacher.old_recordings
SUFFIX = ".parquet"
_METADATA = b"tropd scores"
_GROUP_ROWS = 1024  # of a row group, at least: what reading one sequence costs
_CACHED = 64  # columns of row groups that are kept in memory
_UNREADABLE = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    MemoryError,
    OverflowError,
    struct.error,
    pa.ArrowException,
)
_LOWEST = -65504.0  # a log-prob below that is as good as this one; fp16 has no lower
_INDEX = np.dtype(
    [
        *((name, "<u8") for name in ("low", "high", "pack", "queries")),
        *((name, "<u4") for name in ("group", "row", "rows", "first", "last")),
    ]
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceScores:
    """The scores of some predictions of one sequence."""

    key: bytes  # sequence_key of its tokens
    position: Int64Array  # [rows] ascending
    token_ids: Int64Array | None = None  # [rows] the predicted tokens
    pack: int = 0  # 64-bit hash of what it was scored together with
    queries: int = 0  # 64-bit hash of the query ids
    fields: Mapping[str, Tensor]  # by SCORE_FIELDS' names, [rows] or [rows, width], on the CPU


@dataclass(frozen=True, slots=True)
class Place:
    """Where the scores of one sequence lie."""

    part: int
    group: int
    row: int  # of the row group
    rows: int
    first: int  # positions of the first and last row
    last: int
    pack: int
    queries: int


def sequence_key(token_ids: Int64Array) -> bytes:
    """Name a sequence by 16 bytes: a hash of its tokens, prompt and all."""
    return hashlib.blake2b(np.ascontiguousarray(token_ids, dtype="<i8").tobytes(), digest_size=16).digest()


def hash64(array: np.ndarray) -> int:
    """Hash an array's values; never to 0, which stands for nothing."""
    whole = np.ascontiguousarray(array, dtype="<i8")
    digest = hashlib.blake2b(f"{whole.shape}".encode() + whole.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") or 1


# --------------------------------------------------------------------------- writing


def write_part(directory: Path, scores: Sequence[SequenceScores], *, vocab_size: int, values: Values) -> Path | None:
    """Write scores, all of the same fields, as one part; None when there are none.

    The name follows from what is in it, so that what is scored twice is there once.
    """
    scores = [one for one in scores if len(one.position)]
    if not scores:
        return None
    path = directory / (_digest(scores, values) + SUFFIX)
    if path.exists():
        return path
    largest = max(vocab_size - 1, *(int(one.token_ids.max()) for one in scores if one.token_ids is not None), 0)
    ids = pa.int32() if largest < 2**31 else pa.int64()
    index: list[tuple[int, ...]] = []
    tables: list[pa.Table] = []
    for group, members in enumerate(_row_groups(scores)):
        index += _index_rows(group, members)
        tables.append(_table(members, ids, values))
    footer = _footer(np.array(index, _INDEX), scores[0].fields)
    return write_aside(path, lambda file: _write_tables(file, tables, footer))


def _digest(scores: Sequence[SequenceScores], values: Values) -> str:
    digest = hashlib.blake2b(values.encode(), digest_size=12)
    for one in scores:
        digest.update(one.key + np.array([one.pack, one.queries], "<u8").tobytes() + one.position.tobytes())
        for name, value in one.fields.items():
            # a column of one row is contiguous whatever its stride, and cannot be viewed as bytes
            raw = value.flatten().clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy()
            digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode() + raw.tobytes())
    return digest.hexdigest()


def _row_groups(scores: Sequence[SequenceScores]) -> Iterator[list[SequenceScores]]:
    group: list[SequenceScores] = []
    for one in scores:
        group.append(one)
        if sum(len(member.position) for member in group) >= _GROUP_ROWS:
            yield group
            group = []
    if group:
        yield group


def _index_rows(group: int, members: Sequence[SequenceScores]) -> Iterator[tuple[int, ...]]:
    row = 0
    for one in members:
        low, high = np.frombuffer(one.key, "<u8").tolist()
        rows, first, last = len(one.position), int(one.position[0]), int(one.position[-1])
        yield low, high, one.pack, one.queries, group, row, rows, first, last
        row += rows


def _table(members: Sequence[SequenceScores], ids: pa.DataType, values: Values) -> pa.Table:
    names = [one.key.hex() for one in members]
    counts = [len(one.position) for one in members]
    columns: dict[str, pa.Array] = {
        "sequence": pa.DictionaryArray.from_arrays(np.repeat(np.arange(len(names), dtype=np.int32), counts), names),
        "position": pa.array(np.concatenate([one.position for one in members]), pa.int32()),
        "token_id": pa.concat_arrays([_tokens(one, ids) for one in members]),
    }
    for field in schema.SCORE_FIELDS:
        if field.name in members[0].fields:
            joined = torch.cat([one.fields[field.name] for one in members])
            columns[field.name] = _column(joined, field, ids, values)
    return pa.table(columns)


def _tokens(one: SequenceScores, ids: pa.DataType) -> pa.Array:
    return pa.nulls(len(one.position), ids) if one.token_ids is None else pa.array(one.token_ids).cast(ids)


def _column(value: Tensor, field: schema.Field, ids: pa.DataType, values: Values) -> pa.Array:
    array = value.float().numpy() if value.is_floating_point() else value.numpy()
    if field.kind != "hidden" and not field.is_id and values == "fp16":
        # -inf stays: it is an empty tail
        array = np.maximum(array, np.float32(_LOWEST), where=~np.isneginf(array), out=array.copy()).astype(np.float16)
    flat = pa.array(np.ascontiguousarray(array).reshape(-1))
    flat = flat.cast(ids) if field.is_id else flat
    return flat if array.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, array.shape[1])


def _footer(index: np.ndarray, fields: Mapping[str, Tensor]) -> dict[bytes, str]:
    # hidden states in bf16 are written as the fp32 that they are
    dtypes = {name: str(value.dtype).removeprefix("torch.") for name, value in fields.items()}
    raw = index.tobytes()
    text = {"format": FORMAT, "dtypes": dtypes, "index": base64.b64encode(raw).decode(), "crc": zlib.crc32(raw)}
    return {_METADATA: json.dumps(text)}


def _write_tables(file: Any, tables: Sequence[pa.Table], footer: Mapping[bytes, str]) -> None:
    # bytes of equal significance together: sign and exponent of neighbors are alike
    split = {
        f"{column.name}.list.element" if pa.types.is_fixed_size_list(column.type) else column.name: "BYTE_STREAM_SPLIT"
        for column in tables[0].schema
        if column.name not in ("sequence", "position")
    }
    encoding = split | {"position": "DELTA_BINARY_PACKED"}
    options: dict[str, Any] = {"compression": "zstd", "use_dictionary": ["sequence"], "column_encoding": encoding}
    options |= {"write_page_checksum": True, "write_statistics": ["sequence", "position"]}
    with pq.ParquetWriter(file, tables[0].schema, **options) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=len(table))
        writer.add_key_value_metadata(footer)
    seal(file)


# --------------------------------------------------------------------------- reading


@dataclass(frozen=True, slots=True)
class _Part:
    path: Path
    seal: Seal
    columns: Mapping[str, int]  # of every field
    dtypes: Mapping[str, str]
    index: np.ndarray


class Store:
    """The scores in a directory: an index of the sequences in memory, all else read when looked at."""

    def __init__(self, directory: Path) -> None:
        """Raise DataError for a torn part."""
        self.directory = directory
        self._parts = [_read_part(path) for path in sorted(directory.glob(f"*{SUFFIX}"))]
        self._cache: OrderedDict[tuple[int, int, str], Tensor] = OrderedDict()
        lows = [part.index["low"] for part in self._parts]
        low_S = np.concatenate([np.empty(0, "<u8"), *lows])
        self._order_S = np.argsort(low_S, kind="stable")
        self._low_S = low_S[self._order_S]
        counts = [len(low) for low in lows]
        self._part_S = np.repeat(np.arange(len(counts)), counts)
        self._row_S = np.concatenate([np.empty(0, np.int64), *(np.arange(count) for count in counts)])

    def __len__(self) -> int:
        return len(self._low_S)

    def keys(self) -> list[bytes]:
        """List every sequence that has scores."""
        both = (np.stack([part.index["low"], part.index["high"]], axis=1).astype("<u8") for part in self._parts)
        return sorted({row.tobytes() for pairs in both for row in pairs})

    def find(self, key: bytes) -> list[Place]:
        """List every place that has scores of a sequence."""
        low, high = np.frombuffer(key, "<u8")
        begin, end = np.searchsorted(self._low_S, low, "left"), np.searchsorted(self._low_S, low, "right")
        found = []
        for number in self._order_S[begin:end].tolist():
            part = int(self._part_S[number])
            entry = self._parts[part].index[int(self._row_S[number])]
            if entry["high"] == high:
                found.append(_place(part, entry))
        return found

    def places(self) -> Iterator[Place]:
        """Iterate over all of them."""
        for number, part in enumerate(self._parts):
            yield from (_place(number, entry) for entry in part.index)

    def part_columns(self) -> list[Mapping[str, int]]:
        """Count the columns of every field, by part."""
        return [part.columns for part in self._parts]

    def columns(self, place: Place) -> Mapping[str, int]:
        """Count the columns of every field that a place has."""
        return self._parts[place.part].columns

    def path(self, place: Place) -> Path:
        """Name the part that a place is in."""
        return self._parts[place.part].path

    def positions(self, place: Place) -> Int64Array:
        """Return the ``[rows]`` positions of the predictions a place is about, ascending."""
        if place.last - place.first + 1 == place.rows:
            return np.arange(place.first, place.last + 1)
        return self.read(place, "position").numpy()

    def covers(self, place: Place, position: Int64Array) -> bool:
        """Say whether all of these predictions are scored at a place."""
        if place.first > position[0] or place.last < position[-1]:
            return False
        return bool(np.isin(position, self.positions(place)).all())

    def read(self, place: Place, name: str) -> Tensor:
        """Read one field of one sequence, ``[rows]`` or ``[rows, width]``: ids as int64, values as fp32.

        Raises:
            DataError: the part is torn or has changed.
        """
        key = (place.part, place.group, name)
        if key in self._cache:
            self._cache.move_to_end(key)
        else:
            self._cache[key] = _read_column(self._parts[place.part], place.group, name)
            while len(self._cache) > _CACHED:
                self._cache.popitem(last=False)
        return self._cache[key][place.row : place.row + place.rows]


def _place(part: int, entry: np.ndarray) -> Place:
    numbers = (int(entry[name]) for name in ("group", "row", "rows", "first", "last", "pack", "queries"))
    return Place(part, *numbers)


def _read_column(part: _Part, group: int, name: str) -> Tensor:
    try:
        metadata = part.seal.metadata
        leaf = next(i for i in range(metadata.num_columns) if _column_name(metadata, i) == name)
        with part.path.open("rb") as file:
            part.seal.check(file, group, leaf)
            opened = pq.ParquetFile(file, metadata=metadata, page_checksum_verification=True)
            column = opened.read_row_group(group, columns=[name]).column(name).combine_chunks()
        width = part.columns.get(name, 1)
        listed = pa.types.is_fixed_size_list(column.type)
        array = (column.flatten() if listed else column).to_numpy(zero_copy_only=False)
        value = torch.from_numpy(array.astype(np.float32 if array.dtype.kind == "f" else np.int64))
        value = value.view(-1, width) if listed else value
        if len(value) != metadata.row_group(group).num_rows:
            raise ValueError("a column has another length than its row group")
        return value.to(getattr(torch, part.dtypes[name])) if part.dtypes.get(name) == "bfloat16" else value
    except (*_UNREADABLE, StopIteration, RuntimeError) as error:
        raise _torn(part.path, error) from error


def _column_name(metadata: pq.FileMetaData, column: int) -> str:
    return str(metadata.schema.column(column).path).split(".")[0]


def _read_part(path: Path) -> _Part:
    try:
        with path.open("rb") as file:
            found = read_seal(file)
        metadata = found.metadata
        footer = json.loads((metadata.metadata or {})[_METADATA])
        raw = base64.b64decode(footer["index"], validate=True)
        if zlib.crc32(raw) != footer["crc"]:
            raise ValueError("a checksum does not match")
        index = np.frombuffer(raw, _INDEX)
        sizes = np.array([metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)], np.int64)
        if len(index) and (index["row"] + index["rows"] > sizes[index["group"]]).any():
            raise ValueError("its index does not fit its rows")
        return _Part(path, found, _columns_of(metadata.schema.to_arrow_schema()), dict(footer["dtypes"]), index)
    except _UNREADABLE as error:
        raise _torn(path, error) from error


def _columns_of(found: pa.Schema) -> dict[str, int]:
    names = {field.name for field in schema.SCORE_FIELDS}
    return {
        column.name: column.type.list_size if pa.types.is_fixed_size_list(column.type) else 1
        for column in found
        if column.name in names
    }


def _torn(path: Path, error: Exception) -> DataError:
    return DataError(
        f"{path.absolute()} is torn or not a recording: {error}. Move it away and score its sequences again "
        "(`tropd score`)."
    )
