"""Count the memory of a program and of all its processes: by a control group where one can be made, else by looking.

A control group counts everything, memory in files without a name and in sockets too, and the kernel ends what is over
the limit. Looking counts what processes have mapped, and the files without a name that they hold open.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

_ROOT = Path("/sys/fs/cgroup")
_EMPTY_S = 2.0  # that a group may take to be empty once its last process has ended
_HIDDEN = ("/memfd:", "/dev/shm/", "/SYSV", "/dev/zero")  # how the kernel names memory that is a file


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    """A control group of one program. ``join`` is the file that a process writes 0 to in order to be in it."""

    path: Path
    legacy: bool  # cgroup v1

    @property
    def join(self) -> str:
        return str(self.path / "cgroup.procs")

    def was_full(self) -> bool:
        """Say whether the kernel has ended a process of the group for its memory."""
        file = self.path / ("memory.oom_control" if self.legacy else "memory.events")
        with contextlib.suppress(OSError, ValueError):
            counts = dict(line.split() for line in file.read_text().splitlines() if len(line.split()) == 2)
            return int(counts.get("oom_kill", "0")) > 0
        return False

    def close(self) -> None:
        """Remove the group, which is empty but for what the kernel has yet to clear away."""
        deadline = time.monotonic() + _EMPTY_S
        while self.path.exists() and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                self.path.rmdir()
                return
            time.sleep(0.005)


def open_group(memory_bytes: int) -> MemoryGroup | None:
    """Make a group below this process's own, or beside it; None where that is not allowed, or memory is not counted."""
    for parent, legacy in _parents():
        path = parent / f"tropd-{os.getpid()}-{secrets.token_hex(4)}"
        try:
            path.mkdir()
        except OSError:
            continue
        group = MemoryGroup(path, legacy)
        try:
            (path / ("memory.limit_in_bytes" if legacy else "memory.max")).write_text(str(memory_bytes))
            with contextlib.suppress(OSError):  # where the kernel counts no swap there is none
                (path / ("memory.memsw.limit_in_bytes" if legacy else "memory.swap.max")).write_text(
                    str(memory_bytes if legacy else 0)
                )
            return group
        except OSError:
            group.close()
    return None


def _parents() -> list[tuple[Path, bool]]:
    """List the directories in which a group may be made, and whether they are of the older kind."""
    try:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return []
    found: list[tuple[Path, bool]] = []
    for _, kinds, own in lines:
        if "memory" in kinds.split(","):
            found.append((_ROOT / "memory" / own.lstrip("/"), True))
        elif not kinds and (_ROOT / "cgroup.controllers").exists():
            here = _ROOT / own.lstrip("/")
            # a group with processes of its own cannot count those below it: then one beside it may
            found += [(place, False) for place in (here, here.parent) if _counts_memory(place)]
    return found


def _counts_memory(group: Path) -> bool:
    with contextlib.suppress(OSError):
        return "memory" in (group / "cgroup.subtree_control").read_text().split()
    return False


# --------------------------------------------------------------------------- by looking


def memory_of(pid: int) -> int:
    """Count the bytes in the memory of all descendants of a process, files without a name included."""
    total, hidden = 0, {}
    with contextlib.suppress(psutil.NoSuchProcess):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
                hidden.update(_nameless_files(process.pid))
    return total + sum(hidden.values())


def _nameless_files(pid: int) -> dict[tuple[int, int], int]:
    """Map the files of memory that a process holds open, by device and number, to the bytes in them."""
    found = {}
    try:
        numbers = os.listdir(f"/proc/{pid}/fd")
    except OSError:  # it has ended, or is not ours to look into
        return {}
    for number in numbers:
        with contextlib.suppress(OSError):
            path = f"/proc/{pid}/fd/{number}"
            if os.readlink(path).startswith(_HIDDEN):
                state = os.stat(path)
                found[state.st_dev, state.st_ino] = state.st_blocks * 512
    return found
