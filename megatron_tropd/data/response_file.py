"""A file of responses that is written as they come, and continued by the next process when this one is killed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_tropd.data.files import find_files, read_rows
from megatron_tropd.errors import ConfigError
from megatron_tropd.storage.write_aside import storage_errors, sync_directory, write_aside

_WHOLE = "whole"  # in the description: which file has all its rows


class ResponseFile:
    """``OUT.partial`` while it is written, ``OUT`` in the end; ``OUT.partial.json`` says what it is written for.

    Args:
        description: what shapes the rows. A partial file of another description is not continued.

    Raises:
        ConfigError: there is a partial file of something else.
    """

    def __init__(self, out: Path, description: Mapping[str, Any]) -> None:
        self.out = out
        self._partial = out.with_name(out.name + ".partial")
        self._about = out.with_name(out.name + ".partial.json")
        self._description = json.loads(json.dumps(dict(description), default=str))
        if not self._partial.exists() and self._is_whole():
            os.replace(self.out, self._partial)  # killed after all its work: it will have nothing left to do
        if self._partial.exists():
            self._check_same()
        else:
            write_aside(self._about, json.dumps(self._description, indent=1))

    def _about_it(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self._about.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return {}

    def _is_whole(self) -> bool:
        """Say whether ``OUT`` is the very file that a process of the same description was just done with."""
        about = self._about_it()
        whole = about.pop(_WHOLE, None)
        return whole is not None and about == self._description and whole == _identity(self.out)

    def _check_same(self) -> None:
        partial = self._about_it()
        other = [key for key, value in self._description.items() if partial.get(key) != value]
        if other:
            changes = "; ".join(f"{key} was {partial.get(key)!r}, is {self._description[key]!r}" for key in other[:4])
            raise ConfigError(
                f"{self._partial.absolute()} was started with other settings ({changes}). Continue with those, "
                "give another file, or move it and its .json away."
            )

    def resume(self, block: int) -> int:
        """Cut the file back to whole blocks of ``block`` lines, and return how many blocks there are."""
        if not self._partial.exists():
            return 0
        ends = []
        with self._partial.open("rb+") as file:
            place = 0
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):  # torn
                    break
                place += len(line)
                if number % block == 0:
                    ends.append(place)
            file.truncate(ends[-1] if ends else 0)
        return len(ends)

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows to the disk. A row that UTF-8 cannot hold (half a character) is written in escapes."""
        with storage_errors(self._partial), self._partial.open("ab") as file:
            for row in rows:
                # a table may hold dates and the like, which JSON writes as text
                try:
                    line = json.dumps(row, ensure_ascii=False, default=str).encode()
                except UnicodeEncodeError:
                    line = json.dumps(row, default=str).encode()
                file.write(line + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> Path | None:
        """Give the file its name, and return where one that had it before is kept."""
        write_aside(self._about, json.dumps({**self._description, _WHOLE: _identity(self._partial)}, indent=1))
        kept = None
        if self.out.exists():
            kept = next(
                path for i in range(1, 1 << 30) if not (path := self.out.with_name(f"{self.out.name}.{i}")).exists()
            )
            os.rename(self.out, kept)
        os.replace(self._partial, self.out)
        sync_directory(self.out.parent)
        self._about.unlink(missing_ok=True)
        return kept


def _identity(path: Path) -> list[int] | None:
    """Return what stays of a file when it gets another name, and of no other file; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return [found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns]


def numbered_rows(paths: Sequence[Path]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the rows of one source, whole, by ``Prompt.index``."""
    before = 0
    for path in find_files(paths):
        number = 0
        for number, content in ((row.number, row.content) for row in read_rows(path, columns=None)):
            if isinstance(content, dict):
                yield before + number - 1, content
        before += number
