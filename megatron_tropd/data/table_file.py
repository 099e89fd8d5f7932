"""A table of prompts in one Arrow file, which every process of a host maps into memory instead of making its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from megatron_tropd.data.table import Origin, PromptTable, Ragged
from megatron_tropd.errors import DataError
from megatron_tropd.storage.write_aside import write_aside

FORMAT = 2
_ABOUT = b"megatron_tropd"  # key of the schema's metadata
_RAGGED = {
    "token_ids": np.int32,
    "response_ids": np.int32,
    "teacher_ids": np.int32,
    "text": np.uint8,
    "answer": np.uint8,
}
_FLAT = {
    "has_answer": np.uint8,
    "finished": np.uint8,
    "index": np.int64,
    "line": np.int64,
    "file": np.int32,
    "origin": np.int32,
}
Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTable:
    """A table, and what was found out while it was made: plain JSON values."""

    table: PromptTable
    facts: dict[str, Any]
    path: Path | None = None  # of the file that it is mapped from
    is_new: bool = True  # made by this process, just now


def write_table(path: Path, stored: StoredTable) -> None:
    """Write a table aside and rename it, with a checksum of its columns.

    Raises:
        StorageError: the file cannot be written.
    """
    import pyarrow

    columns = stored.table.columns()
    about = {
        "format": FORMAT,
        "sha256": _checksum(columns),
        "left_out": stored.table.left_out,
        "files": stored.table.files,
        "origins": [[origin.source, origin.teacher] for origin in stored.table.origins],
        "facts": stored.facts,
    }
    arrays = {name: _to_arrow(name, column) for name, column in columns.items()}
    fields = [pyarrow.field(name, array.type, nullable=False) for name, array in arrays.items()]
    schema = pyarrow.schema(fields, metadata={_ABOUT: json.dumps(about).encode()})
    batch = pyarrow.record_batch(list(arrays.values()), schema=schema)

    def content(file: BinaryIO) -> None:
        with pyarrow.ipc.new_file(file, schema) as writer:
            writer.write_batch(batch)

    write_aside(path, content)


def open_table(path: Path) -> StoredTable:
    """Map a table into memory; its columns are read once, for their checksum.

    Raises:
        DataError: the file is torn, or is not what was written.
    """
    import pyarrow

    try:
        reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))
        about = json.loads(reader.schema.metadata[_ABOUT])
        batch = reader.get_batch(0)
        columns = {name: _from_arrow(name, batch.column(name)) for name in (*_RAGGED, *_FLAT)}
        if about["format"] != FORMAT or reader.num_record_batches != 1:
            raise ValueError(f"it has format {about['format']!r}, expected {FORMAT}")
        if about["sha256"] != _checksum(columns):
            raise ValueError("its checksum does not match")
        origins = [Origin(source=source, teacher=teacher) for source, teacher in about["origins"]]
        table = PromptTable.of_columns(columns, files=about["files"], origins=origins, left_out=about["left_out"])
        return StoredTable(table=table, facts=dict(about["facts"]), path=path, is_new=False)
    except (pyarrow.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path} is torn, or no table of prompts: {error}.") from None


def _to_arrow(name: str, column: Ragged | Array) -> Any:
    import pyarrow

    if not isinstance(column, Ragged):
        return pyarrow.array(column)
    values, ends = (pyarrow.py_buffer(part) for part in column.parts())
    if _RAGGED[name] is np.uint8:
        return pyarrow.Array.from_buffers(pyarrow.large_binary(), len(column), [None, ends, values])
    numbers = pyarrow.Array.from_buffers(pyarrow.int32(), len(column.parts()[0]), [None, values])
    offsets = pyarrow.Array.from_buffers(pyarrow.int64(), len(column) + 1, [None, ends])
    return pyarrow.LargeListArray.from_arrays(offsets, numbers)


def _from_arrow(name: str, array: Any) -> Ragged | Array:
    if name in _FLAT:
        return _numbers(array.buffers()[1], _FLAT[name], len(array))
    buffers = array.buffers()
    ends = _numbers(buffers[1], np.int64, len(array) + 1)
    return Ragged.of(_numbers(buffers[-1], _RAGGED[name], int(ends[-1])), ends)


def _numbers(buffer: Any, dtype: Any, count: int) -> Array:
    """View the first numbers of a buffer, without a copy; ValueError where it has fewer."""
    return np.zeros(count, dtype) if buffer is None or not count else np.frombuffer(buffer, dtype=dtype, count=count)


def _checksum(columns: dict[str, Ragged | Array]) -> str:
    digest = hashlib.sha256()
    for name, column in columns.items():
        parts: Iterable[Array] = column.parts() if isinstance(column, Ragged) else (column,)
        for part in parts:
            digest.update(f"{name} {part.dtype.str} {len(part)}\n".encode())
            digest.update(part.data)
    return digest.hexdigest()
