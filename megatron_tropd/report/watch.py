"""Write a page again whenever the files that it is made from change, until the program is stopped."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_tropd.progress.phases import heard
from megatron_tropd.report.records import EVALUATION_FILE, SAMPLES_FILE

FILES = ("metrics.jsonl", EVALUATION_FILE, SAMPLES_FILE, "config.yaml")
Signature = tuple[tuple[int, int], ...]


def signature(run_dirs: Sequence[Path]) -> Signature:
    """Return time and size of every file that a page is made from; zeros of those that are not there yet."""
    return tuple(_of_file(run_dir / name) for run_dir in run_dirs for name in FILES)


def _of_file(path: Path) -> tuple[int, int]:
    try:
        stat = path.stat()
    except FileNotFoundError:
        return 0, 0
    return stat.st_mtime_ns, stat.st_size


def watch(
    run_dirs: Sequence[Path],
    write: Callable[[int | None], Path],
    *,
    every_s: int,
    told: Callable[[Path], None],
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Write the page at once and after every change, at most every so many seconds, until an exception ends it.

    Args:
        write: writes the page, which loads itself again after so many seconds; with None it does not.
        told: is called with the path, once.
    """
    seen = signature(run_dirs)
    told(write(every_s))
    try:
        while True:
            wait(every_s)
            heard()  # nothing to say is no silence that a heartbeat should break
            now = signature(run_dirs)
            if now != seen:
                seen = now
                write(every_s)
    finally:
        write(None)
