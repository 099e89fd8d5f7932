"""Names on the hub: what a name says, which commit it means, and data sets as local files.

A name is ``owner/name``, or ``owner/name@revision``; of a data set a configuration and a split may follow:
``openai/gsm8k:main:train``. It counts only where nothing of this path lies on this machine. Which commit a branch or
tag means is asked once by all ranks of a host, under a lock; from then on the commit is what is fetched, and cached.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from megatron_tropd.errors import ConfigError, StorageError
from megatron_tropd.progress.phases import Phase
from megatron_tropd.storage.write_aside import write_aside

logger = logging.getLogger(__name__)

Kind = Literal["model", "dataset"]
_PART = r"[A-Za-z0-9][\w.-]{0,95}"
_NAME = re.compile(rf"(?P<repo>{_PART}/{_PART})(@(?P<revision>[\w./-]+))?(:(?P<config>[^:/]+))?(:(?P<split>\w+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_KINDS = {"model": "model", "dataset": "data set"}
# of rows and nothing else: other builders of `datasets` open archives and pickles of arrays
_BUILDERS = ("parquet", "json", "csv", "arrow", "text")
_STALE_S = 86_400.0


@dataclass(frozen=True, slots=True)
class HubName:
    """A name on the hub, by its parts."""

    kind: Kind
    repo: str
    revision: str | None = None  # branch, tag or commit; None is the default branch
    config: str | None = None  # of a data set; None is its only one
    split: str | None = None  # of a data set
    given: str = field(default="", compare=False)  # as it was written

    @property
    def commit(self) -> str | None:
        """Return the revision where it is a commit, which is the same for ever."""
        return self.revision if self.revision and _COMMIT.fullmatch(self.revision) else None

    def at(self, commit: str) -> HubName:
        """Return the name with a commit as its revision."""
        return replace(self, revision=commit, given=self.written)

    @property
    def written(self) -> str:
        """Return the name as its user wrote it."""
        return self.given or str(self)

    def __str__(self) -> str:
        parts = [self.repo + (f"@{self.revision}" if self.revision else "")]
        if self.config or self.split:
            parts.append(self.config or "default")
        return ":".join([*parts, self.split] if self.split else parts)


def hub_name(path: Path | str, kind: Kind) -> HubName | None:
    """Read a path as a name on the hub; None where it is none, or stands for something on this machine."""
    text = str(path)
    found = _NAME.fullmatch(text)
    if found is None or Path(text).exists() or (kind == "model" and ":" in text):
        return None
    return HubName(kind, found["repo"], found["revision"], found["config"], found["split"])


# --------------------------------------------------------------------------- commits


def commit_of(name: HubName, *, key: str) -> str:
    """Return the commit that a name means, which the hub says; without it, the one that is cached.

    Args:
        key: where the name was written, for messages.

    Raises:
        ConfigError: there is no such repository or revision, it is gated, or the hub cannot be reached.
    """
    if name.commit is not None:
        return name.commit
    asked = _digest(name, _launch())
    with host_lock(f"commit-{asked}", f"asking for the commit of {name}"):
        note = _notes() / f"commit-{asked}.json"
        if _launch() is not None and (told := _read(note)) is not None:
            return str(told)
        commit = _ask(name, key)
        if _launch() is not None:
            _write(note, commit)
        _write(_notes() / f"newest-{_digest(name, None)}.json", commit)
    return commit


def _ask(name: HubName, key: str) -> str:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled

    if not constants.is_offline_mode():
        try:
            found = HfApi().repo_info(name.repo, repo_type=name.kind, revision=name.revision).sha
            if not found:
                raise ConfigError(
                    f"{key} = '{name.written}': {constants.ENDPOINT} names no commit of it. Name one, after @."
                )
            return str(found)
        except GatedRepoError as error:
            raise explained(error, name, key) from None
        except HfHubHTTPError as error:
            if error.response.status_code < 500:
                raise explained(error, name, key) from None
            reason: Exception = error
        except (OSError, OfflineModeIsEnabled, *unreachable()) as error:
            reason = error
    else:
        reason = OfflineModeIsEnabled("HF_HUB_OFFLINE is set")
    cached = _cached_commit(name)
    if cached is None:
        raise explained(reason, name, key)
    if os.environ.get("RANK", "0") == "0":
        logger.warning("%s = '%s': %s The newest commit here is taken, %s.", key, name.written, _why(reason), cached)
    return cached


def _cached_commit(name: HubName) -> str | None:
    if name.kind == "model":
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

        with suppress(LocalEntryNotFoundError, IncompleteSnapshotError):
            folder = snapshot_download(
                name.repo, revision=name.revision, local_files_only=True, allow_patterns=["config.json"]
            )
            return Path(folder).name
    found = _read(_notes() / f"newest-{_digest(name, None)}.json")
    return None if found is None else str(found)


# --------------------------------------------------------------------------- data sets


def dataset_files(name: HubName, *, key: str) -> tuple[Path, ...]:
    """Return the Arrow files of a split at a commit, fetched and converted by ``datasets`` where they are not here.

    Raises:
        ConfigError: no such configuration or split, files that are not rows, or no way to the hub.
    """
    assert name.commit is not None
    note = _notes() / f"files-{_digest(name, None)}.json"
    with host_lock(f"files-{_digest(name, None)}", f"fetching {name}"):
        listed = _read(note)
        if isinstance(listed, list) and listed and all(Path(str(file)).is_file() for file in listed):
            return tuple(Path(str(file)) for file in listed)
        with Phase(f"fetching {name} from the hub"):
            files = _build(name, key)
        _write(note, [str(file) for file in files])
        return files


def _build(name: HubName, key: str) -> tuple[Path, ...]:
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"{key} = '{name.written}' is a data set on the hub, for which the package datasets is needed. Run "
            "`pip install datasets`, or give a local file."
        ) from None
    from huggingface_hub.errors import HfHubHTTPError

    unreadable: tuple[type[Exception], ...] = (datasets.exceptions.DatasetsError, ValueError, FileNotFoundError)
    datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(name.repo, name.config, revision=name.commit)
        kind = type(builder).__module__.rpartition(".")[2]
        if kind not in _BUILDERS:
            raise ConfigError(
                f"{key} = '{name.written}': its files are read by {kind!r} of `datasets`, and here only by "
                f"{', '.join(_BUILDERS)}. Save its rows as Parquet, and give those files."
            )
        builder.download_and_prepare()
        splits = list(builder.info.splits or ())
        split = name.split or (splits[0] if len(splits) == 1 else None)
        if split not in splits:
            given = "names no split" if name.split is None else f"has no split {name.split!r}"
            example = HubName("dataset", name.repo, None, builder.config.name, (splits or ["train"])[0])
            raise ConfigError(f"{key} = '{name.written}' {given}: there are {', '.join(splits)}. Write {example}.")
        files = tuple(Path(entry["filename"]) for entry in builder.as_dataset(split=split).cache_files)
    except ConfigError:
        raise
    except HfHubHTTPError as error:
        raise explained(error, name, key) from None
    except unreachable() as error:
        raise explained(error, name, key) from None
    except unreadable as error:
        reason = innermost(error)  # names file and row
        raise ConfigError(f"{key} = '{name.written}' cannot be read by `datasets`: {one_line(reason)}.") from None
    if not files:
        raise ConfigError(f"{key} = '{name.written}' holds no row. Name another split.")
    return files


# --------------------------------------------------------------------------- what all of it shares


@contextmanager
def host_lock(name: str, what: str) -> Iterator[None]:
    """Have one process of this host at a time within the block; where no lock can be had, all at once."""
    from filelock import FileLock

    lock: FileLock | None = FileLock(_notes() / f"{name}.lock")
    try:
        _notes().mkdir(parents=True, exist_ok=True)
        with Phase(f"waiting for another process that is {what}"):
            lock.acquire()  # type: ignore[union-attr]
    except (OSError, NotImplementedError) as error:
        logger.warning("%s cannot be locked (%s): every process fetches by itself.", _notes(), error)
        lock = None
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def explained(error: Exception, name: HubName, key: str) -> ConfigError:
    """Return the error that says what became of a name: not there, gated, or not to be reached."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    what, hub = _KINDS[name.kind], constants.ENDPOINT
    place = f"{key} = '{name.written}'"
    if isinstance(error, GatedRepoError):
        path = name.repo if name.kind == "model" else f"datasets/{name.repo}"
        return ConfigError(
            f"{place}: the {what} is gated, and {_token()}. Ask for access at {hub}/{path}, then log in with "
            "`hf auth login`, or set HF_TOKEN to a token that may read it."
        )
    if isinstance(error, RevisionNotFoundError):
        return ConfigError(f"{place}: the {what} {name.repo} has no revision {name.revision!r}. Name another after @.")
    if isinstance(error, RepositoryNotFoundError):
        return ConfigError(
            f"{place}: there is nothing at {Path(name.written).absolute()} (relative paths are relative to the current "
            f"directory), and {hub} has no {what} {name.repo}, or a private one ({_token()}). Correct the path or the "
            "name."
        )
    return ConfigError(
        f"{place}: there is nothing at {Path(name.written).absolute()}, and as a name on the hub it is not cached "
        f"here: {_why(error)} Correct the path, or fetch it where {hub} can be reached."
    )


def _why(error: Exception) -> str:
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set."
    return f"{constants.ENDPOINT} cannot be reached ({one_line(error)})."


def _token() -> str:
    from huggingface_hub import get_token

    return "the token in use may not read it" if get_token() else "no token is set"


def unreachable() -> tuple[type[Exception], ...]:
    """List what the client of the hub raises where there is no way to it."""
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    found: list[type[Exception]] = [ConnectionError, IncompleteSnapshotError, LocalEntryNotFoundError]
    for client in ("httpx2", "httpx"):  # whichever of the two its version speaks through
        with suppress(ImportError):
            module = __import__(client)
            found.append(module.TransportError)
    return tuple(found)


def innermost(error: BaseException) -> BaseException:
    """Return the error that others were raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__).rstrip(".")


def _notes() -> Path:
    from megatron_tropd.data.prompt_cache import default_directory

    return default_directory() / "hub"


def _digest(name: HubName, launch: str | None) -> str:
    parts = [name.kind, str(name), launch]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]


def _launch() -> str | None:
    """Name what started this rank and its siblings on this host; None for a process of its own."""
    if "RANK" not in os.environ:
        return None
    parent = os.getppid()
    with suppress(OSError):
        return f"{parent} {Path(f'/proc/{parent}/stat').read_text(errors='replace').rpartition(')')[2].split()[19]}"
    return None


def _read(note: Path) -> Any:
    try:
        return json.loads(note.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write(note: Path, content: Any) -> None:
    """Keep a note, and drop those of earlier launches."""
    _quietly(lambda: write_aside(note, json.dumps(content)))
    for old in _notes().glob("commit-*.json"):
        with suppress(OSError):
            if time.time() - old.stat().st_mtime > _STALE_S:
                old.unlink()


def _quietly(write: Callable[[], object]) -> None:
    try:
        write()
    except StorageError as error:
        logger.warning("%s What the hub has said is asked again next time.", error)
