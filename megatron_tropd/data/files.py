"""Rows of local data files, one at a time: JSON lines, Parquet, Arrow, and directories that ``datasets`` has saved.

Nothing here reaches the network, and no file is held whole as Python objects but a JSON array: JSON lines (plain, or
compressed with gzip) are read line by line, Parquet and Arrow in batches of a few hundred rows of the columns that are
requested.
"""

from __future__ import annotations

import glob
import gzip
import json
import re
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from megatron_tropd.data.cells import is_missing, shortest_double
from megatron_tropd.errors import DataError
from megatron_tropd.storage.kinds import GZIP, foreign_rows, head_of

JSON_LINES = (".jsonl", ".ndjson", ".json")
TABLES = (".parquet", ".arrow")
_BATCH_ROWS = 512
_SPLITS = re.compile(r"(train|test|validation|valid|val|dev|eval)\b|(train|test|validation|valid|val|dev|eval)[-_.]")


class BadRow(Exception):
    """The reason why one row cannot be used; whoever reads adds file and line."""


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row of a file. ``number`` counts from 1: the line of a text file, the row of a table."""

    number: int
    content: dict[str, Any] | BadRow


# --------------------------------------------------------------------------- which files


def find_files(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    """List the data files that paths, globs and directories stand for: those of one path or directory in sorted order.

    Raises:
        DataError: nothing is there, a directory has no data or several splits, or a file is named twice.
    """
    given = [paths] if isinstance(paths, str | Path) else list(paths)
    files = [file for path in given for file in _expand(Path(path))]
    twice = sorted({str(file) for file in files if files.count(file) > 1}) if len(set(files)) < len(files) else []
    if twice:
        raise DataError(f"{', '.join(twice)} would be read twice. Name each file once, or weigh its source instead.")
    if not files:
        raise DataError("no data file is named: give a path, a glob or a directory.")
    return files


def _expand(path: Path) -> list[Path]:
    if path.is_dir():
        return _directory(path)
    if path.exists():
        return [path]
    if not glob.has_magic(str(path)):
        raise DataError(f"data file {path} does not exist ({path.absolute()}). Give a file, a glob or a directory.")
    found = sorted(glob.glob(str(path), recursive=True))
    if not found:
        raise DataError(f"no file matches {path} ({path.absolute()}). Check the pattern.")
    return [file for name in found for file in _expand(Path(name))]


def _directory(path: Path) -> list[Path]:
    """List the files of a directory; for one saved by ``datasets``, those it lists, in its order."""
    if (path / "dataset_dict.json").is_file():
        splits = ", ".join(str(path / split) for split in _read_json(path / "dataset_dict.json").get("splits", []))
        raise DataError(f"{path} holds several splits. Give the directory of one of them: {splits}.")
    if (path / "state.json").is_file():
        listed = _read_json(path / "state.json").get("_data_files", [])
        files = [path / Path(entry["filename"]).name for entry in listed]
        missing = [str(file) for file in files if not file.is_file()]
        if missing:
            raise DataError(
                f"{', '.join(missing)} is listed in {path}/state.json but missing. Copy the directory anew."
            )
        return files
    readable = (*JSON_LINES[:2], *TABLES, *(f"{suffix}.gz" for suffix in JSON_LINES[:2]))
    files = sorted(file for file in path.iterdir() if file.name.endswith(readable) and file.is_file())
    if not files:
        there = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
        raise DataError(f"directory {path} has no .jsonl, .parquet or .arrow file in it, but {there}. Name the files.")
    found = sorted({match.group().rstrip("-_.") for file in files if (match := _SPLITS.match(file.name))})
    if len(found) > 1:
        raise DataError(
            f"directory {path} holds files of several splits ({', '.join(found)}), which would be mixed. "
            f"Give a glob, such as {path}/{found[-1]}*{files[-1].suffix}."
        )
    return files


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON: {error}. Save the dataset again.") from None
    if not isinstance(tree, dict):
        raise DataError(f"{path} holds {type(tree).__name__}, expected an object. Save the dataset again.")
    return tree


# --------------------------------------------------------------------------- their rows


def read_rows(file: Path, *, columns: Collection[str] | None, one_of: Collection[str] = ()) -> Iterator[RawRow]:
    """Read the rows of one file.

    Args:
        columns: all that will be looked at, others are not read from tables (``a.b`` is the field ``b`` of ``a``);
            None: every column.
        one_of: a table without any of these is refused as a whole; JSON rows are judged one by one by the caller.

    Raises:
        DataError: the file cannot be read, or is a table without the columns it needs.
    """
    if kind := foreign_rows(file):
        raise DataError(f"{file} is {kind}")
    if file.suffix in TABLES:
        return _table_rows(file, columns=columns, one_of=one_of)
    return _json_rows(file)


def _json_rows(file: Path) -> Iterator[RawRow]:
    packed = head_of(file).startswith(GZIP)
    try:
        with cast(IO[bytes], gzip.open(file) if packed else file.open("rb")) as stream:
            listed = _array_in(stream)
            yield from _lines_in(stream) if listed is None else _listed(listed)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file} is torn, or no gzip file: {error}. Copy it anew.") from None


def _array_in(stream: IO[bytes]) -> list[Any] | None:
    """Read the rows of a file that is one JSON array, which has to be read whole; None where it is none."""
    start = stream.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    stream.seek(0)
    if not start.startswith(b"["):
        return None
    try:
        rows = json.loads(stream.read().decode("utf-8-sig"), parse_constant=_constant)
    except (ValueError, RecursionError):  # lines that are arrays each, which are reported one by one
        rows = None
    stream.seek(0)
    return rows if isinstance(rows, list) and any(isinstance(row, dict) for row in rows) else None


def _listed(rows: Sequence[Any]) -> Iterator[RawRow]:
    for number, row in enumerate(rows, start=1):
        yield RawRow(number, row if isinstance(row, dict) else _no_object(row))


def _lines_in(stream: IO[bytes]) -> Iterator[RawRow]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            yield RawRow(number, _parse(line))


def _parse(line: bytes) -> dict[str, Any] | BadRow:
    try:
        row = json.loads(line.decode("utf-8-sig"), parse_constant=_constant, object_pairs_hook=_object)
    except BadRow as reason:
        return reason
    except (ValueError, RecursionError) as error:  # of the JSON or of the UTF-8
        return BadRow(f"not valid JSON: {error}.")
    return row if isinstance(row, dict) else _no_object(row)


def _no_object(row: Any) -> BadRow:
    return BadRow(f"holds {type(row).__name__}, expected a JSON object with a prompt.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object; BadRow where it has a key twice, of which JSON does not say which one counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise BadRow(f"has the key {twice!r} twice.")
    return found


def _constant(name: str) -> float | None:
    """Read NaN as none: it is what libraries write for a missing value."""
    return None if name == "NaN" else float(name)


def _table_rows(file: Path, *, columns: Collection[str] | None, one_of: Collection[str]) -> Iterator[RawRow]:
    import pyarrow

    number = 0
    try:
        for batch in _batches(file, columns=columns, one_of=one_of):
            narrow = [field.name for field in batch.schema if str(field.type) in ("float", "halffloat")]
            for row in batch.to_pylist():
                number += 1
                row |= {name: shortest_double(row[name]) for name in narrow if row[name] is not None}
                yield RawRow(number, _without_nulls(row))
    except (pyarrow.ArrowException, OSError) as error:
        kind = file.suffix.removeprefix(".").capitalize()
        after = f" after row {number}" if number else ""
        raise DataError(f"{file} is torn or no {kind} file{after}: {_one_line(error)}. Copy it anew.") from None


def _batches(file: Path, *, columns: Collection[str] | None, one_of: Collection[str]) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    if file.suffix == ".parquet":
        with pyarrow.parquet.ParquetFile(file) as table:
            wanted = _wanted(file, table.schema_arrow.names, columns=columns, one_of=one_of)
            yield from table.iter_batches(batch_size=_BATCH_ROWS, columns=wanted)
        return
    with pyarrow.memory_map(str(file)) as source:
        try:
            reader = pyarrow.ipc.open_stream(source)
        except pyarrow.ArrowInvalid:  # the other of Arrow's two formats
            source.seek(0)
            opened = pyarrow.ipc.open_file(source)
            reader = (opened.get_batch(i) for i in range(opened.num_record_batches))
            names = opened.schema.names
        else:
            names = reader.schema.names
        wanted = _wanted(file, names, columns=columns, one_of=one_of)
        for batch in reader:
            for start in range(0, batch.num_rows, _BATCH_ROWS):
                yield batch.slice(start, _BATCH_ROWS).select(wanted)


def _wanted(file: Path, names: Sequence[str], *, columns: Collection[str] | None, one_of: Collection[str]) -> list[str]:
    if one_of and not any(_top(column, names) for column in one_of):
        choices = " or ".join(repr(column) for column in one_of)
        raise DataError(
            f"{file} has no column {choices}, only {sorted(names)}. Name the right ones with the columns settings."
        )
    if columns is None:
        return list(names)
    wanted = {_top(column, names) for column in {*columns, *one_of}}
    return [name for name in names if name in wanted]


def _top(column: str, names: Sequence[str]) -> str | None:
    """Name the column of a table that holds ``column``, which may be a field of one."""
    return next((name for name in (column, column.split(".")[0]) if name in names), None)


def _without_nulls(value: Any) -> Any:
    """Take out null and NaN: a table has every field in every row, a JSON row those that it has a value for."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if not is_missing(item)}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _one_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def column_of(row: dict[str, Any], name: str) -> Any:
    """Return the column ``name``, or for ``a.b`` the field ``b`` of the column ``a``; None where there is none."""
    if name in row or "." not in name:
        return row.get(name)
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value
