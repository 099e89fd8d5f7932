"""Where published weights lie for servers on this host: a directory of this process's own, removed when it ends.

A lock says whose a directory is. The kernel releases it when its holder ends, however that ends, so the next run can
distinguish what a killed one has left behind (whole weights in shared memory) from what another run is using.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
from pathlib import Path

from megatron_tropd.parallel.leaving import forget, on_leave
from megatron_tropd.storage.locks import Process, is_unlocked, keep_from_children

_log = logging.getLogger(__name__)

PREFIX = "tropd-weights"
_LOCK = "owner.lock"


class PublishDirectory:
    """A new directory below ``parent``; nothing else in ``parent`` is touched but what dead runs have left there."""

    def __init__(self, parent: Path) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(parent)
        self.path = parent / f"{PREFIX}-{os.getuid()}-{os.getpid()}-{secrets.token_hex(4)}"
        # under its name only once it is locked, or another run that starts now might take it for abandoned
        unnamed = parent / f".{self.path.name}"
        unnamed.mkdir(mode=0o700)
        self._lock = keep_from_children(os.open(unnamed / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        unnamed.rename(self.path)
        on_leave(self.close)

    def drop_all_but(self, folder: Path) -> None:
        """Remove every folder in it but ``folder``."""
        for other in self.path.iterdir():
            if other.is_dir() and other != folder:
                shutil.rmtree(other)

    def close(self) -> None:
        """Remove it with all that is in it."""
        if self._lock >= 0:
            forget(self.close)
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1


def remove_abandoned(parent: Path) -> list[Path]:
    """Remove this user's publish directories below ``parent`` whose owners have ended; say how many there were."""
    names = (f"{PREFIX}-{os.getuid()}-*", f".{PREFIX}-{os.getuid()}-*")
    found = [path for name in names for path in parent.glob(name) if path.is_dir() and not path.is_symlink()]
    removed = [path for path in found if _is_abandoned(path)]
    for path in removed:
        shutil.rmtree(path, ignore_errors=True)
    if removed:
        _log.warning("removed weights that %d ended run(s) had left in %s", len(removed), parent)
    return removed


def _is_abandoned(path: Path) -> bool:
    """Say whether nobody holds the lock in it. Without a lock file it is not ours.

    One that is not named yet is its maker's, locked or not, for as long as that lives.
    """
    if not (path / _LOCK).is_file() and not _is_unnamed(path):
        return False
    if _is_unnamed(path):
        pid = path.name.split("-")[-2]
        if not pid.isdecimal() or Process.lives(int(pid)) or any(entry.name != _LOCK for entry in path.iterdir()):
            return False
    return not (path / _LOCK).exists() or is_unlocked(path / _LOCK)


def _is_unnamed(path: Path) -> bool:
    return path.name.startswith(".")
