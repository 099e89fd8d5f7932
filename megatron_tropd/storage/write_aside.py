"""Files that appear whole or not at all, and stay after a power cut: written aside, synced, renamed, synced."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from megatron_tropd.errors import StorageError

Content = str | bytes | Callable[[BinaryIO], object]


def write_aside(path: str | Path, content: Content) -> Path:
    """Write a file in one step: a reader sees the old content or the new one, now and after a crash.

    Args:
        content: text (UTF-8, half a character as its escape, which JSON has, too), bytes, or a function that writes to
            the binary file it is given.

    Raises:
        StorageError: the file cannot be written. What stood at ``path`` is as it was, and nothing is left aside.
    """
    path = Path(path)
    # a name of its own: two processes that write the same file do not write into each other's
    partial = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    with storage_errors(path):
        try:
            with partial.open("xb") as file:
                if callable(content):
                    content(file)
                else:
                    file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                partial.unlink()
            raise
        sync_directory(path.parent)
    return path


def sync_directory(directory: str | Path) -> None:
    """Make names in a directory last: without it a crash may undo a rename whose file was synced."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        # some network file systems cannot, and do so by themselves
        with suppress(OSError):
            os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(directory: str | Path) -> None:
    """Make every directory below one last, and the names in them. Files are synced by whoever writes them."""
    for folder, _, _ in os.walk(directory):
        sync_directory(folder)


def rename_directory(source: Path, target: Path) -> None:
    """Rename a directory, and make that last."""
    with storage_errors(target):
        source.rename(target)
        sync_directory(target.parent)


@contextmanager
def storage_errors(path: str | Path) -> Iterator[None]:
    """Turn what the operating system says within the block into a StorageError about ``path``."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"cannot write {Path(path).absolute()}: {error.strerror or error}. {_fix(error)}") from error


def _fix(error: OSError) -> str:
    import errno

    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "Make room there, or name another directory; then start the same command again."
    return "Check the path and its permissions, or name another."
