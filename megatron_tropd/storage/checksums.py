"""SHA-256 of files: whether what is read is what was written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size in bytes and SHA-256 (hex) of a file; no hash where an older version wrote the record."""

    size: int
    sha256: str | None = None

    @staticmethod
    def of(path: Path) -> FileRecord:
        """Read a file once, and sync it."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
            return FileRecord(os.fstat(file.fileno()).st_size, digest)

    @staticmethod
    def parse(entry: Any) -> FileRecord:
        """Read the record that JSON holds; TypeError, ValueError or LookupError for anything else."""
        if isinstance(entry, int) and not isinstance(entry, bool):  # sizes alone, as until version 0.1
            return FileRecord(entry)
        return FileRecord(int(entry["size"]), str(entry["sha256"]))

    def as_json(self) -> dict[str, Any]:
        return {"size": self.size, "sha256": self.sha256}

    def size_fault(self, path: Path) -> str | None:
        """Say what is wrong with a file at first sight; None when nothing is."""
        if path.is_symlink() or not path.is_file():
            return "is missing" if not path.exists() else "is not a plain file"
        found = path.stat().st_size
        return None if found == self.size else f"has {found:,} bytes, {self.size:,} were written"

    def content_fault(self, path: Path) -> str | None:
        """Say what is wrong with its content, which is read whole."""
        fault = self.size_fault(path)
        if fault is not None or self.sha256 is None:
            return fault
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            return f"cannot be read ({error.strerror or error})"
        return None if found == self.sha256 else "has other content than was written (its checksum does not match)"


def files_below(directory: Path) -> dict[str, Path]:
    """Find every file below a directory, by its path relative to it, in order. Links are not followed."""
    found = {}
    for folder, _, names in os.walk(directory):
        for name in names:
            path = Path(folder) / name
            found[path.relative_to(directory).as_posix()] = path
    return dict(sorted(found.items()))


def record_files(directory: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Record some files of a directory."""
    return {name: FileRecord.of(directory / name) for name in names}


def first_fault(directory: Path, records: Mapping[str, FileRecord], *, content: bool) -> str | None:
    """Say ``NAME has ...`` of the first file that is not what was written; None when all are."""
    for name, record in records.items():
        fault = record.content_fault(directory / name) if content else record.size_fault(directory / name)
        if fault is not None:
            return f"{name} {fault}"
    return None
