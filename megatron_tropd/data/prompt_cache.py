"""Tokenized prompts are made once per host: whoever comes first writes a table, the others map it into memory."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_tropd.data.table_file import StoredTable, open_table, write_table
from megatron_tropd.data.tokenizer import Tokenizer
from megatron_tropd.errors import DataError, StorageError
from megatron_tropd.progress.phases import Phase

logger = logging.getLogger(__name__)

VARIABLE = "MEGATRON_TROPD_CACHE"
_LIBRARIES = ("jinja2", "pyarrow", "sentencepiece", "tokenizers", "transformers")


def default_directory() -> Path:
    """Return where tables are kept unless a directory is named: ``$MEGATRON_TROPD_CACHE``, or the user's cache."""
    given, users = os.environ.get(VARIABLE), os.environ.get("XDG_CACHE_HOME")
    return Path(given) if given else (Path(users) if users else Path("~/.cache").expanduser()) / "megatron_tropd"


def table_key(files: Sequence[Path], tokenizer: Tokenizer, *, rules: Sequence[str]) -> str:
    """Name a table by all that shapes it (SHA-256, hex): content of files, tokenizer, rules, and the code itself.

    Args:
        rules: whatever else the reader was told, as text.

    Raises:
        DataError: a file cannot be read.
    """
    template = "" if tokenizer.chat is None else tokenizer.chat.source
    parts = {
        "files": [[str(file), _content(file)] for file in files],
        "tokenizer": tokenizer.identity(),
        "rules": list(rules),
        "code": _code(),
        # such a template writes the day of the reading
        "day": date.today().isoformat() if "strftime_now" in template else "",
    }
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def kept_table(directory: Path, key: str, make: Callable[[], StoredTable]) -> StoredTable:
    """Return the table of that key, made by this process where no other has made it. One process makes it at a time.

    A directory that cannot be written is no error: the table is then this process's own, and that is said.

    Raises:
        TropdError: what ``make`` raises.
    """
    from filelock import FileLock

    path = directory / f"prompts-{key[:32]}.arrow"
    if (found := _opened(path)) is not None:
        return found
    lock = FileLock(path.with_suffix(".lock"))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with Phase(f"waiting for another process that writes {path}"):
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        logger.warning(
            "%s cannot be written (%s): every process tokenizes the prompts for itself. Name another directory with "
            "data.cache_dir, or in the variable %s.", directory, error, VARIABLE,
        )  # fmt: skip
        return make()
    try:
        return _opened(path) or _made(path, make)
    finally:
        lock.release()


def _made(path: Path, make: Callable[[], StoredTable]) -> StoredTable:
    made = make()
    try:
        write_table(path, made)
        return replace(open_table(path), is_new=True)
    except (StorageError, DataError) as error:
        logger.warning("%s Every process tokenizes the prompts for itself.", error)
        return made


def _opened(path: Path) -> StoredTable | None:
    if not path.exists():
        return None
    try:
        return open_table(path)
    except DataError as error:
        logger.warning("%s It is made again.", error)
        return None


def _content(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{file} cannot be read ({error.strerror or error}).") from None


@cache
def _code() -> list[str]:
    """Name the code that makes tables: this room's, and the versions of the libraries it calls."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    return [digest, sys.version, *(f"{name} {_version(name)}" for name in _LIBRARIES)]


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return "none"
