"""Locks on what a command writes to: one run, one directory, and one export at a time to a target."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from megatron_tropd.config.sections import ExportConfig
from megatron_tropd.errors import ConfigError, StorageError
from megatron_tropd.parallel.leaving import forget, on_leave
from megatron_tropd.storage.locks import take_lock
from megatron_tropd.storage.owned import settled
from megatron_tropd.storage.write_aside import make_directory, remove_partials, why_not_written

LOCK = ".tropd.lock"


@dataclass(frozen=True, slots=True)
class Claim:
    """Name what is written, as the user calls it, and the directory in which its lock lies."""

    name: str
    directory: Path
    lock: str = LOCK


def run_directory(path: Path) -> Claim:
    """Claim a directory of a run: the lock lies in it."""
    return Claim(f"run_dir = '{path}'", path)


def target(path: Path, name: str) -> Claim:
    """Claim a file or directory that is written in one piece: the lock lies beside it."""
    place = settled(path)
    return Claim(f"{name} = '{path}'", place.parent, f".{place.name}{LOCK}")


@contextmanager
def claimed(*claims: Claim) -> Iterator[None]:
    """Hold the locks of these claims within the block; the first rank does. Collective.

    Raises:
        StorageError: on every rank, when another process holds one of them.
        ConfigError: on every rank, when its directory cannot be made.
    """
    with ExitStack() as held:
        refused: list[tuple[bool, str] | None] = [None]  # (by the configuration, message)
        if dist.get_rank() == 0:
            try:
                for claim in claims:
                    held.enter_context(held_here(claim))
            except (ConfigError, StorageError) as error:
                refused = [(isinstance(error, ConfigError), str(error))]
        dist.broadcast_object_list(refused, src=0)
        if refused[0] is not None:
            configured, message = refused[0]
            raise ConfigError(message) if configured else StorageError(message)
        yield


@contextmanager
def held_here(claim: Claim) -> Iterator[None]:
    """Hold the lock of a claim within the block, on this rank alone.

    Raises:
        StorageError: another process holds it.
        ConfigError: its directory cannot be made.
    """
    made = [folder for folder in (claim.directory, *claim.directory.parents) if not folder.exists()]
    _make(claim)
    lock = take_lock(
        claim.directory / claim.lock,
        name=claim.name,
        fix=f"Wait for it to end, or stop it, or give another {claim.name.split(' ')[0]}.",
    )
    on_leave(lock.release)
    remove_partials(claim.directory)
    try:
        yield
    finally:
        forget(lock.release)
        lock.release()
        for folder in made:  # a command that is refused leaves nothing behind
            with suppress(OSError):  # not empty
                folder.rmdir()


def _make(claim: Claim) -> None:
    try:
        make_directory(claim.directory)
    except StorageError as error:
        if not isinstance(error.__cause__, OSError) or error.__cause__.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        key, why = claim.name.split(" ")[0], why_not_written(error.__cause__)
        where = claim.directory.absolute()
        raise ConfigError(f"{key}: cannot write to {where} ({why}). Name another directory.") from error


def exports_of(section: ExportConfig) -> dict[str, Path]:
    """Return the directories that a run exports to, by the keys that name them."""
    named = {"export.hf": section.hf, "export.adapter": section.adapter, "export.megatron": section.megatron}
    return {key: path for key, path in named.items() if path is not None}


def exports(section: ExportConfig) -> Sequence[Claim]:
    """Claim the directories that a run exports to."""
    return [target(path, key) for key, path in exports_of(section).items()]
