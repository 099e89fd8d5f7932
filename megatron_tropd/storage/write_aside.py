"""Files that appear whole or not at all, and stay after a power cut: written aside, synced, renamed, synced."""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from megatron_tropd.errors import StorageError
from megatron_tropd.storage.locks import Process, is_unlocked

Content = str | bytes | Callable[[BinaryIO], object]

# NAME.HOST-PID-RANDOM.partial; versions before 0.2 left the host out
_PARTIAL = re.compile(r".+\.(?:(?P<host>[0-9a-f]{8})-)?(?P<pid>\d+)-[0-9a-f]{8}\.partial")
_FOREIGN_S = 3600.0  # a process that cannot be looked up here has its file removed after so long without a lock


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
    writer = Process.current()
    partial = path.with_name(f"{path.name}.{writer.host_digest}-{writer.pid}-{secrets.token_hex(4)}.partial")
    with storage_errors(path):
        try:
            with partial.open("x+b") as file:
                with suppress(OSError):  # some network file systems have no locks
                    fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
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


def abandoned_partials(directory: str | Path) -> list[Path]:
    """List what killed processes have left of ``write_aside`` right in a directory; a living one's is not among it."""
    directory = Path(directory)
    if directory.is_symlink() or not directory.is_dir():
        return []
    return sorted(path for path in directory.iterdir() if _is_abandoned(path))


def remove_partials(*directories: str | Path) -> list[Path]:
    """Remove what killed processes have left of ``write_aside``, and nothing else; say what it was."""
    found = [path for directory in directories for path in abandoned_partials(directory)]
    for path in found:
        with suppress(OSError):  # another process that starts now has been quicker, or may and we may not
            path.unlink()
    return found


def _is_abandoned(path: Path) -> bool:
    named = _PARTIAL.fullmatch(path.name)
    if named is None or path.is_symlink() or not path.is_file() or not is_unlocked(path):
        return False
    if named["host"] == Process.current().host_digest and not Process.lives(int(named["pid"])):
        return True
    # made on another host, or by a number that is in use again; a new one is without its lock for a moment
    with suppress(OSError):
        return time.time() - path.stat().st_mtime > _FOREIGN_S
    return False


def why_not_written(error: OSError) -> str:
    """Return the operating system's reason, in words that fit a directory to be made."""
    if isinstance(error, FileExistsError | NotADirectoryError):
        return "a file is in the way"
    return error.strerror or str(error)


def make_directory(directory: str | Path) -> Path:
    """Make a directory and those above it, and make them last."""
    directory = Path(directory)
    made = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    with storage_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        for folder in made:
            sync_directory(folder.parent)
    return directory


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
