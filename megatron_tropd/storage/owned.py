"""Directories that this program may replace: those it wrote itself and nobody has touched since.

A marker inside lists every file with size and checksum. What is not in the list is somebody else's: it is never
removed. Files are removed one by one, by the list, and a directory only once it is empty.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from megatron_tropd.errors import ConfigError, StorageError
from megatron_tropd.storage.checksums import FileRecord, files_below, first_fault, record_files
from megatron_tropd.storage.write_aside import (
    abandoned_partials,
    make_directory,
    remove_partials,
    rename_directory,
    sync_tree,
    write_aside,
)

MARKER = ".megatron_tropd.json"
UNFINISHED = ".megatron_tropd-unfinished"
_MOVE = "It is left as it is. Move it, or name another directory."


def mark_directory(directory: Path, *, kind: str, without: Iterable[str] = ()) -> None:
    """Write the marker, the last thing that is written to a directory; ``without`` lists what will not stay there."""
    skipped = {MARKER, *without}
    records = record_files(directory, [name for name in files_below(directory) if name not in skipped])
    files = {name: record.as_json() for name, record in records.items()}
    write_aside(
        directory / MARKER, json.dumps({"written_by": "megatron_tropd", "kind": kind, "files": files}, indent=1)
    )
    sync_tree(directory)


def read_marker(directory: Path) -> dict[str, FileRecord] | None:
    """Read the files that this program wrote to a directory; None where no marker, or a broken one, says so."""
    try:
        marker = json.loads((directory / MARKER).read_text(encoding="utf-8"))
        if marker["written_by"] != "megatron_tropd":
            return None
        return {str(name): FileRecord.parse(entry) for name, entry in marker["files"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def why_not_ours(directory: Path) -> str | None:
    """Say why a path may not be replaced; None when it is free, empty, or holds what this program wrote and no more."""
    if directory.is_symlink():
        return "is a symbolic link"
    if not directory.exists():
        return None
    if not directory.is_dir():
        return "is a file"
    left = {path.name for path in abandoned_partials(directory)}  # of a killed process of ours, and in nobody's way
    there = [name for name in files_below(directory) if name not in left]
    if not there and all(entry.name in left for entry in directory.iterdir()):
        return None
    records = read_marker(directory)
    if records is None:
        names = sorted(entry.name for entry in directory.iterdir())
        return f"holds what this program did not write ({_listed(names)})"
    strange = sorted(set(there) - set(records) - {MARKER})
    if strange:
        return f"holds more than this program wrote there ({_listed(strange)})"
    fault = first_fault(directory, {name: records[name] for name in records if name in there}, content=True)
    return None if fault is None else f"has changed since this program wrote it: {fault}"


def remove_files(directory: Path, names: Iterable[str]) -> list[str]:
    """Remove the files named and the directories that are then empty; what is left, relative to ``directory``.

    Links are left alone, and what they point to. What says that the directory is ours goes last: killed in between,
    the next process still knows.
    """
    if directory.is_symlink() or not directory.is_dir():
        return [] if not directory.exists() else [directory.name]
    notes = (MARKER, UNFINISHED)
    listed = [*names]
    _unlink(directory / name for name in listed if name not in notes)
    for folder in sorted((path for path in directory.rglob("*") if _is_plain_folder(path)), reverse=True):
        with suppress(OSError):  # not empty
            folder.rmdir()
    _unlink(directory / name for name in listed if name in notes)
    with suppress(OSError):
        directory.rmdir()
    return list(files_below(directory)) if directory.exists() else []


def _unlink(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_file() and not path.is_symlink():
            path.unlink()


def remove_owned(directory: Path) -> None:
    """Remove a directory that this program wrote.

    Raises:
        StorageError: something else is in it; that is left.
    """
    reason = why_not_ours(directory)
    if reason is not None:
        raise StorageError(f"{directory.absolute()} {reason}. {_MOVE}")
    remove_partials(directory)
    remove_files(directory, [*(read_marker(directory) or {}), MARKER])


def free_name(path: Path) -> Path:
    """Return ``path``, or the first of ``path-1``, ``path-2``, ... that nothing stands at."""
    number, found = 0, path
    while found.exists() or found.is_symlink():
        number += 1
        found = path.with_name(f"{path.name}-{number}")
    return found


def settled(path: str | Path) -> Path:
    """Return the absolute path with ``..`` and links above its last part resolved; a link at its end stays one."""
    path = Path(path).expanduser()
    return path.parent.resolve() / path.name if path.name not in ("", "..") else path.resolve()


def overlaps(target: Path, others: Mapping[str, Path]) -> str | None:
    """Return the name of the first of ``others`` that ``target`` is, or that lies in it; None when there is none.

    Paths are compared as they resolve: ``..``, links and case of the current directory do not hide anything.
    """
    resolved = target.expanduser().resolve()
    for name, other in others.items():
        place = other.expanduser().resolve()
        if place == resolved or resolved in place.parents:
            return name
    return None


def check_target(target: Path, *, name: str, protected: Mapping[str, Path]) -> None:
    """Make sure, before any work, that a directory may be written in one piece, and replaced where it is there.

    Args:
        name: what the user calls the target, such as ``export.hf``.
        protected: by name, what is read or written elsewhere: neither it nor a directory above it may be the target.

    Raises:
        ConfigError: the target is, or holds, something protected, or holds what this program did not write.
    """
    other = overlaps(target, protected)
    if other is not None:
        raise ConfigError(
            f"{name} = '{target}' is {other} ({protected[other]}), or holds it, and would be replaced. "
            "Name another directory."
        )
    whole = settled(target)
    for place in (whole, beside(whole, "partial"), beside(whole, "replaced")):
        reason = None if place != whole and _is_unfinished(place) else why_not_ours(place)
        if reason is not None:
            raise ConfigError(
                f"{name} = '{target}': {place.absolute()} {reason}, and would be replaced. It is left as it is: name a "
                "directory that is not there yet, or an export of this program."
            )


def beside(target: Path, suffix: str) -> Path:
    """Return ``target.partial``, in which it is written, or ``target.replaced``, where the one before it waits."""
    return target.with_name(f"{target.name}.{suffix}")


def replace_directory(aside: Path, target: Path) -> None:
    """Make ``aside`` the target directory; one of ours that stood there goes once the new one is in its place.

    Raises:
        StorageError: what stands there is not ours; ``aside`` is kept.
    """
    replaced = beside(target, "replaced")
    for place in (target, replaced):
        reason = why_not_ours(place)
        if reason is not None:
            raise StorageError(
                f"{place.absolute()} {reason}: it is left as it is. What was written is whole, in {aside.absolute()}."
            )
    remove_owned(replaced)
    if target.exists():
        rename_directory(target, replaced)
    rename_directory(aside, target)
    remove_owned(replaced)


# --------------------------------------------------------------------------- in the making


def start_unfinished(directory: Path, note: str) -> None:
    """Make a directory in which something will be written that may be resumed: the note says of what."""
    make_directory(directory)
    write_aside(directory / UNFINISHED, note)


def unfinished_note(directory: Path) -> str | None:
    """Read the note of a directory in the making; None where there is none."""
    try:
        return (directory / UNFINISHED).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def discard_unfinished(directory: Path, is_ours: Callable[[str], bool]) -> None:
    """Remove what an earlier process left half-done.

    Args:
        is_ours: whether a file of that name (relative to the directory) is one that would be written there.

    Raises:
        StorageError: the directory is not this program's, or something else is in it; that is left.
    """
    remove_partials(directory)
    if not directory.exists() or not any(directory.iterdir()):
        return
    if unfinished_note(directory) is None:
        remove_owned(directory)  # whole, but for the last rename; or somebody's
        return
    strange = [name for name in files_below(directory) if name != UNFINISHED and not is_ours(name)]
    if strange:
        raise StorageError(f"{directory.absolute()} holds more than this program wrote ({_listed(strange)}). {_MOVE}")
    remove_files(directory, files_below(directory))


def _is_unfinished(directory: Path) -> bool:
    return not directory.is_symlink() and unfinished_note(directory) is not None


def _is_plain_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _listed(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
