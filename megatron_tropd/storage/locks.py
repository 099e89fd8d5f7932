"""Locks that a process holds until it lets go or ends, however it ends, and that say whose they are.

The kernel keeps them (``flock``), so death releases them; the file's content is there for messages. On NFS and other
shared file systems the server keeps them, across hosts; where a file system has none, the content alone must do: it
tells whether a process of this host still lives, and of another host it can only be said that it may.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import socket
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_tropd.errors import StorageError

_held: set[int] = set()  # a child that is forked must not keep its parent's locks alive


@dataclass(frozen=True, slots=True)
class Process:
    """A process of some host; its ticks since boot distinguish it from a later one of the same number."""

    host: str
    pid: int
    started: str  # when it took the lock, ISO 8601
    ticks: int = 0

    @staticmethod
    def current() -> Process:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return Process(socket.gethostname(), os.getpid(), now, _ticks(os.getpid()) or 0)

    @property
    def host_digest(self) -> str:
        """Eight letters for the host's name, whatever is in it."""
        return hashlib.sha256(self.host.encode()).hexdigest()[:8]

    @staticmethod
    def lives(pid: int) -> bool:
        """Say whether this host has a process of that number."""
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        except (PermissionError, OverflowError):
            pass
        return True

    def still_runs(self) -> bool | None:
        """Say whether it is still there; None where that cannot be known, as of another host."""
        if self.host != socket.gethostname():
            return None
        return self.lives(self.pid) and _ticks(self.pid) in (None, self.ticks)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.started}"


def _ticks(pid: int) -> int | None:
    """Read when a process began, in ticks since boot; None where the system does not say."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None


class HeldLock:
    """A lock that this process holds."""

    def __init__(self, path: Path, handle: int) -> None:
        self._path, self._handle = path, handle
        _held.add(handle)

    def release(self) -> None:
        """Let go, and take the file away. Twice is fine."""
        if self._handle < 0:
            return
        handle, self._handle = self._handle, -1
        with suppress(OSError):
            # while it is held, so that nobody else's is taken away
            if _is_at(self._path, handle):
                self._path.unlink()
        _held.discard(handle)
        with suppress(OSError):
            os.close(handle)


def take_lock(path: Path, *, name: str, fix: str) -> HeldLock:
    """Take a lock, or say who holds it. It does not wait.

    Args:
        path: of the lock's file, in a directory that is there.
        name: what it is for, as the user calls it: ``run_dir = 'runs/a'``.
        fix: what a user who is refused can do.

    Raises:
        StorageError: another process holds it, or a file of somebody else is in the way.
    """
    while True:
        try:
            handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise StorageError(f"{name}: cannot write {path.absolute()}: {error.strerror or error}. {fix}") from error
        try:
            holder = _holder(handle, path)
            locked = _lock(handle)
            if locked is False or (locked is None and holder is not None and holder.still_runs()):
                raise StorageError(f"{name} is in use by {holder or 'a process that has just started'}. {fix}")
            if locked is None:
                _warn_without_locks(path, name, holder)
            if _is_at(path, handle):
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps({"written_by": "megatron_tropd", **asdict(Process.current())}).encode(), 0)
                return HeldLock(path, handle)
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder took it away between our opening and our locking it: once more


def is_unlocked(path: Path) -> bool:
    """Say whether nobody holds a lock on a file; also where there is no telling."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return _lock(handle) is not False
    finally:
        os.close(handle)


def keep_from_children(handle: int) -> int:
    """Have a file that a lock is on closed in processes that are forked: they would hold the lock as well."""
    _held.add(handle)
    return handle


def _lock(handle: int) -> bool | None:
    """Lock a file: whether that worked; None where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _is_at(path: Path, handle: int) -> bool:
    """Say whether an open file is the one of that name."""
    try:
        found, own = os.stat(path, follow_symlinks=False), os.fstat(handle)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (own.st_dev, own.st_ino)


def _holder(handle: int, path: Path) -> Process | None:
    """Read whose a lock file says it is; None for a new one. StorageError when it is no lock file."""
    text = os.pread(handle, 1 << 16, 0)
    if not text:
        return None
    try:
        facts: dict[str, Any] = json.loads(text)
        if facts.pop("written_by") != "megatron_tropd":
            raise ValueError
        return Process(str(facts["host"]), int(facts["pid"]), str(facts["started"]), int(facts["ticks"]))
    except (ValueError, LookupError, TypeError, AttributeError):
        raise StorageError(
            f"{path.absolute()} is no lock of this program, and in the way of one. It is left as it is: move it."
        ) from None


def _warn_without_locks(path: Path, name: str, holder: Process | None) -> None:
    said = f" {holder} has used it last, and may still." if holder is not None and holder.still_runs() is None else ""
    warnings.warn(
        f"{name}: the file system of {path.parent.absolute()} has no locks: a second run there is noticed on this host "
        f"alone.{said}",
        stacklevel=3,
    )


def _forget_in_child() -> None:
    for handle in _held:
        with suppress(OSError):
            os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_forget_in_child)
