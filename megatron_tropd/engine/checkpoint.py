"""Checkpoints that appear whole or not at all.

Weights, optimizer and schedule go through Megatron's ``torch_dist`` format, so a run may resume under another layout.
Of a model with adapters these are all the weights there are: the frozen ones are those of the model that it was made
from, of which the run's state has the fingerprint.
A checkpoint is written aside, synced, renamed into place, and only then named by the ``latest`` file. Its last file,
``complete.json``, lists every other one with its size and SHA-256. The loader trusts what ``latest`` names if it is
whole, and otherwise falls back to the newest whole one, saying so. Nothing is removed but files of the names that a
checkpoint has; a directory with any other file in it is left, or moved aside.
"""

from __future__ import annotations

import errno
import hashlib
import json
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tropd.convert.megatron.locate import adapters_alone
from megatron_tropd.engine.adapters import restore_adapters, sharded_adapters
from megatron_tropd.engine.metadata import check_metadata, only_plain_objects
from megatron_tropd.engine.model import Model
from megatron_tropd.engine.optimizer import Optimization
from megatron_tropd.engine.patches.checkpoint_writer import write_in_process
from megatron_tropd.engine.patches.cuda_calls import cuda_names_mean_cpu
from megatron_tropd.engine.patches.parallel_state import use_parallel_state
from megatron_tropd.errors import CheckpointError
from megatron_tropd.progress.phases import Phase
from megatron_tropd.storage.checksums import FileRecord, files_below, first_fault, record_files
from megatron_tropd.storage.owned import UNFINISHED, beside, free_name, remove_files, start_unfinished
from megatron_tropd.storage.write_aside import (
    make_directory,
    remove_partials,
    rename_directory,
    storage_errors,
    sync_tree,
    write_aside,
)

_LATEST = "latest"
_ADAPTERS = "adapters"  # what a checkpoint has in the place of the model's own weights
_AVERAGE = "moving_average"  # what the weights of a moving average are known by
COMPANIONS = "hf"  # config and tokenizer files of a converted model, inside the directory
_FORMAT, _CHECKSUM = 2, "checksum"  # of complete.json itself
_COMPLETE = "complete.json"  # written last inside the directory, so its presence means that all else was there
_NAME = re.compile(r"step-\d{8,}")
_OUR_FILES = re.compile(
    rf"__\d+_\d+\.distcp|\.metadata(\.tmp)?|common\.pt|metadata\.json|{_COMPLETE}(\..*\.partial)?"
    rf"|ahead/[\w.-]+\.(npz|partial)|{re.escape(UNFINISHED)}(\..*\.partial)?"
)
_LARGE_BYTES = 64 << 20  # files whose checksum is compared in the background
_NO_ROOM = 1 << 16  # bytes left on a disk that is full
# what torch's writer of archives says when the system took less than it was given
_SHORT_WRITES = ("No space left", "unexpected pos", "Disk quota exceeded")
_OTHER_STEP = "Name another with checkpoint.resume=PATH, or start afresh with checkpoint.resume=never."
_UNREADABLE = (
    CheckpointException,
    dist_checkpointing.core.CheckpointingException,
    LookupError,
    RuntimeError,
    ValueError,
    TypeError,
    AssertionError,
    OSError,
    EOFError,
    pickle.UnpicklingError,
)


def _directory(root: Path, step: int) -> Path:
    return root / f"step-{step:08d}"


def save_checkpoint(
    root: str | Path,
    model: Model,
    optimization: Optimization,
    *,
    step: int,
    state: Mapping[str, Any],
    keep: int = 0,
    beside_it: Callable[[Path], None] | None = None,
    average: Model | None = None,
) -> Path:
    """Save after ``step`` finished steps. Collective.

    Args:
        state: small JSON-able facts of the run (seed, method, what else must agree to resume).
        beside_it: called on every rank with a directory, to write more files of the checkpoint into.
        keep: how many checkpoints to leave on disk, this one and those of earlier steps; 0 keeps all.
        average: a moving average of the model's weights, to be kept with them.

    Raises:
        StorageError: it cannot be written. Earlier checkpoints are whole.
    """
    root = Path(root)
    target = _directory(root, step)
    with optimization.states.present(), Phase(f"writing {target}"):
        with use_parallel_state(model.groups), cuda_names_mean_cpu():
            sharded = _sharded_state(model, optimization, loading=False) | _sharded_average(average)
        _write_whole(target, sharded, {"step": step, **state}, model, beside_it=beside_it)
    if dist.get_rank() == 0:
        remove_partials(root)
        write_aside(root / _LATEST, target.name)
        _drop_others(root, target, keep)
    dist.barrier()
    return target


def save_model(
    target: Path, model: Model, *, state: Mapping[str, Any], companions: Mapping[str, Path] | None = None
) -> None:
    """Save a model that is not being trained as the checkpoint ``target``, of step 0. Collective.

    Args:
        companions: config and tokenizer files by their names in its directory ``hf``.
    """
    with Phase(f"writing {target}"):
        with use_parallel_state(model.groups), cuda_names_mean_cpu():
            sharded = _sharded_model(model)
        _write_whole(target, sharded, {"step": 0, **state}, model, companions or {})


def _write_whole(
    target: Path,
    sharded: dict[str, Any],
    facts: dict[str, Any],
    model: Model,
    companions: Mapping[str, Path] | None = None,
    beside_it: Callable[[Path], None] | None = None,
) -> None:
    """Write aside, then the list of what was written, then put it in place. Collective."""
    aside = beside(target, "partial")
    if dist.get_rank() == 0:
        _make_way(aside, companions or {})
        make_directory(aside)
        if companions is not None:  # a target of the user's choice: the note says whose a killed conversion's is
            start_unfinished(aside, "a checkpoint")
    dist.barrier()
    with _saying_why(target):
        with use_parallel_state(model.groups), cuda_names_mean_cpu():
            write_in_process()
            dist_checkpointing.save(sharded, str(aside))
        if beside_it is not None:
            beside_it(aside)
        if dist.get_rank() == 0:
            for name, path in (companions or {}).items():
                (aside / COMPANIONS / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, aside / COMPANIONS / name)
    dist.barrier()
    records = _record_all(aside)
    if dist.get_rank() == 0:
        files = {name: record.as_json() for name, record in records.items()}
        write_aside(aside / _COMPLETE, json.dumps(_signed({**facts, "files": files}), indent=2, sort_keys=True))
        sync_tree(aside)
        _make_way(target, companions or {})
        rename_directory(aside, target)
        if companions is not None:
            (target / UNFINISHED).unlink()
    dist.barrier()


@contextmanager
def _saying_why(target: Path) -> Iterator[None]:
    """Raise StorageError for a full disk, whatever a library within the block has made of it."""
    with storage_errors(target):
        try:
            yield
        except (Exception, CheckpointException) as error:  # the latter is a BaseException
            found: BaseException | None = error
            while found is not None and not isinstance(found, OSError):
                found = found.__cause__ or found.__context__
            if isinstance(found, OSError):
                raise found from error
            short = any(text in str(error) for text in _SHORT_WRITES)
            if short or shutil.disk_usage(_existing(target)).free < _NO_ROOM:
                raise OSError(errno.ENOSPC, "No space left on device") from error
            raise


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def _record_all(directory: Path) -> dict[str, FileRecord]:
    """Record sizes and checksums of all files of a directory, each read by one of the ranks. Collective."""
    names: list[list[str]] = [[name for name in files_below(directory) if name != UNFINISHED]]
    dist.broadcast_object_list(names, src=0)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    with storage_errors(directory):
        mine = record_files(directory, names[0][rank::ranks])
    parts: list[dict[str, FileRecord]] = [{} for _ in range(ranks)]
    dist.all_gather_object(parts, mine)
    return {name: record for part in parts for name, record in part.items()}


def _strange_files(directory: Path, companions: Collection[str] = ()) -> list[str]:
    """List files that no checkpoint, or none with these companions, has."""
    own = {f"{COMPANIONS}/{name}" for name in companions}
    return [name for name in files_below(directory) if name not in own and _OUR_FILES.fullmatch(name) is None]


def _make_way(directory: Path, companions: Collection[str]) -> None:
    """Free a name that this program writes to: remove what an earlier run left half-done, move all else aside."""
    if not directory.exists() and not directory.is_symlink():
        return
    if not directory.is_symlink() and directory.is_dir() and not _strange_files(directory, companions):
        remove_files(directory, files_below(directory))
    if directory.exists() or directory.is_symlink():
        kept = free_name(directory.with_name(directory.name + ".kept"))
        warnings.warn(f"{directory.absolute()} holds other files than a checkpoint: moved to {kept.name}", stacklevel=2)
        rename_directory(directory, kept)


def find_checkpoint(root: str | Path, *, without: Collection[Path] = ()) -> Path | None:
    """Return the newest whole checkpoint under ``root``, or None. Warn about every torn one it passes over.

    Args:
        without: those that were found to be torn by their content.
    """
    root = Path(root)
    candidates = sorted(_finished(root), reverse=True)
    latest = _latest(root, candidates)
    if latest is not None:
        candidates.remove(latest)
        candidates.insert(0, latest)
    for candidate in candidates:
        if candidate in without:
            continue
        try:
            read_state(candidate)
        except CheckpointError as error:
            warnings.warn(f"skipping a torn checkpoint: {error}", stacklevel=2)
            continue
        return candidate
    return None


def _latest(root: Path, candidates: Collection[Path]) -> Path | None:
    """Return the checkpoint that ``latest`` names; None, with a warning where it should name one, when it does not."""
    named = root / _LATEST
    if not named.exists():
        return None
    try:
        text = named.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        text = ""
    if root / text in candidates:
        return root / text
    if candidates:
        warnings.warn(f"{named.absolute()} names no checkpoint that is there: looking at all of them", stacklevel=2)
    return None


def read_state(checkpoint: str | Path) -> dict[str, Any]:
    """Read the run state saved with a checkpoint.

    Raises:
        CheckpointError: it is not a checkpoint, or a file of it is missing or of another size than was written.
    """
    state, records = _read_record(Path(checkpoint))
    fault = first_fault(Path(checkpoint), records, content=False)
    if fault is not None:
        raise _torn(checkpoint, fault)
    return state


def _read_record(checkpoint: Path) -> tuple[dict[str, Any], dict[str, FileRecord]]:
    try:
        state = json.loads((checkpoint / _COMPLETE).read_text(encoding="utf-8"))
        _check_signature(state)
        records = {str(name): FileRecord.parse(entry) for name, entry in state["files"].items()}
        int(state["step"])
        return dict(state), records
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{checkpoint.absolute()} is not a whole checkpoint ({_COMPLETE} is missing or broken). {_OTHER_STEP}"
        ) from error


class ContentCheck:
    """Compare a checkpoint's checksums: small files at once, large ones beside other work.

    Each file is read by one rank. Making one and its ``fault`` are collective.
    """

    def __init__(self, checkpoint: Path) -> None:
        """Start. ``small_fault`` is the first fault of a small file, the same on every rank.

        Raises:
            CheckpointError: it is not a checkpoint.
        """
        _, records = _read_record(checkpoint)
        rank, ranks = dist.get_rank(), dist.get_world_size()
        mine = {name: records[name] for name in sorted(records)[rank::ranks]}
        large = {name: record for name, record in mine.items() if record.size >= _LARGE_BYTES}
        small = {name: record for name, record in mine.items() if name not in large}
        self._pool = ThreadPoolExecutor(1, "checksums")  # hashing lets other threads run
        self._large = self._pool.submit(first_fault, checkpoint, large, content=True)
        self._checkpoint = checkpoint
        self.small_fault = _first_of_all(first_fault(checkpoint, small, content=True))

    def fault(self) -> str | None:
        """Wait for the rest; return the first file whose checksum is not the recorded one, None when all are."""
        with Phase(f"comparing checksums of {self._checkpoint}"):
            fault = _first_of_all(self._large.result())
        self._pool.shutdown(wait=False)
        return self.small_fault or fault


def _first_of_all(fault: str | None) -> str | None:
    """Return the first rank's fault that has one, on every rank. Collective."""
    faults: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    return next((fault for fault in faults if fault is not None), None)


def check_contents(checkpoint: str | Path) -> None:
    """Raise CheckpointError when a file of the checkpoint has other content than was written. Collective."""
    fault = ContentCheck(Path(checkpoint)).fault()
    if fault is not None:
        raise _torn(checkpoint, fault)


def _signed(state: Mapping[str, Any]) -> dict[str, Any]:
    """Add the checksum of all else, which the list of checksums needs as well."""
    state = {**json.loads(json.dumps(state)), "format": _FORMAT}
    return {**state, _CHECKSUM: _checksum(state)}


def _check_signature(state: dict[str, Any]) -> None:
    """Raise ValueError where the checksum does not match; versions before 0.2 wrote neither it nor a format."""
    if {"format", _CHECKSUM} & state.keys():
        if state.pop(_CHECKSUM, None) != _checksum(state):
            raise ValueError("it has other content than was written")
        del state["format"]


def _checksum(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _torn(checkpoint: str | Path, fault: str) -> CheckpointError:
    return CheckpointError(f"{Path(checkpoint).absolute()} is torn: {fault}. {_OTHER_STEP}")


def load_checkpoint(
    checkpoint: str | Path, model: Model, optimization: Optimization, average: Model | None = None
) -> dict[str, Any]:
    """Restore weights, the optimizer's states and the weights' ``average``; return the run state. Collective.

    Learning rate, schedule, weight decay and Adam's constants are those that the optimizer was made with, whatever they
    were in the run that saved.

    Raises:
        CheckpointError: torn (see ``check_contents``, too), or of another model or optimizer.
    """
    state = read_state(checkpoint)
    check_metadata(Path(checkpoint))
    reading = Phase(f"reading {checkpoint}")
    with (
        optimization.states.present(),
        use_parallel_state(model.groups),
        cuda_names_mean_cpu(),
        only_plain_objects(Path(checkpoint)),
        reading,
    ):
        try:
            sharded = _sharded_state(model, optimization, loading=True) | _sharded_average(average)
            loaded = dist_checkpointing.load(sharded, str(Path(checkpoint).absolute()))
        except _UNREADABLE as error:
            raise CheckpointError(
                f"{Path(checkpoint).absolute()} does not fit this model and optimizer: {error}. "
                "It was written by a run with another student or optimizer; start afresh with checkpoint.resume=never."
            ) from error
        if model.adapters is not None:
            restore_adapters(model, loaded[_ADAPTERS])
        for number, chunk in enumerate(model.chunks if model.adapters is None else ()):
            chunk.load_state_dict(loaded[_model_key(number, len(model.chunks))], strict=True)
        for number, chunk in enumerate(() if average is None else average.chunks):
            chunk.load_state_dict(loaded[_AVERAGE][_model_key(number, len(model.chunks))], strict=True)
        optimization.load(loaded["optimizer"])
    torch.set_rng_state(loaded["torch_rng"])
    return state


def load_model_weights(checkpoint: str | Path, model: Model) -> None:
    """Fill the model from a checkpoint of training or of ``save_model``, written under any layout. Collective.

    Raises:
        CheckpointError: torn, or of another model.
    """
    if "student.lora" in dict(read_state(checkpoint).get("run") or {}):
        raise CheckpointError(adapters_alone(Path(checkpoint)))
    check_contents(checkpoint)
    check_metadata(Path(checkpoint))
    reading = Phase(f"reading {checkpoint}")
    with use_parallel_state(model.groups), cuda_names_mean_cpu(), only_plain_objects(Path(checkpoint)), reading:
        # weights alone: what else a module saves comes as pickles, and is nothing here
        sharded = {
            key: {name: part for name, part in chunk.items() if not name.endswith("_extra_state")}
            for key, chunk in _sharded_model(model).items()
        }
        try:
            loaded = dist_checkpointing.load(sharded, str(Path(checkpoint).absolute()))
        except _UNREADABLE as error:
            raise CheckpointError(
                f"{Path(checkpoint).absolute()} does not hold the model of config.json: {str(error)[:400]}. "
                "Give the config.json of the model it was trained from."
            ) from error
        for number, chunk in enumerate(model.chunks):
            found = chunk.load_state_dict(loaded[_model_key(number, len(model.chunks))], strict=False)
            missing = [name for name in found.missing_keys if not name.endswith("_extra_state")]
            if missing:
                raise CheckpointError(f"{Path(checkpoint).absolute()} has no {missing[0]}.")


def _sharded_model(model: Model, prefix: str = "") -> dict[str, Any]:
    """Describe the weights; with a prefix their names, by which the checkpoint tells two models apart, begin so."""
    model.finish_pending_gathers()
    if model.adapters is not None:
        return {_ADAPTERS: sharded_adapters(model)}
    metadata = {"dp_cp_group": model.groups.pg.dp_cp}
    sharded = {
        _model_key(number, len(model.chunks)): chunk.sharded_state_dict(metadata=metadata)
        for number, chunk in enumerate(model.chunks)
    }
    if prefix:
        add_prefix_for_sharding(sharded, prefix)
    return sharded


def _sharded_average(average: Model | None) -> dict[str, Any]:
    return {} if average is None else {_AVERAGE: _sharded_model(average, f"{_AVERAGE}.")}


def _model_key(number: int, chunks: int) -> str:
    return "model" if chunks == 1 else f"model{number}"


def _sharded_state(model: Model, optimization: Optimization, *, loading: bool) -> dict[str, Any]:
    state = _sharded_model(model)
    if loading:
        optimization.init_optimizer_state()
    # the chunks' own names collide (each counts its layers from 0): they stay separate, under the chunk's key
    state["optimizer"] = optimization.optimizer.sharded_state_dict(
        # of the distributed optimizer: its default is refused by the same version's checkpoints
        dict(state),
        is_loading=loading,
        # Gathered through gloo onto the first data rank: NCCL would have whole states on every rank, and on its GPU.
        metadata={
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": True,
        },
    )
    state["scheduler"] = optimization.scheduler.state_dict()
    state["torch_rng"] = torch.get_rng_state()
    return state


def _finished(root: Path) -> list[Path]:
    return [path for path in root.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]


def _drop_others(root: Path, newest: Path, keep: int) -> None:
    if keep:
        older = sorted(path for path in _finished(root) if path.name < newest.name)
        for path in older[: max(0, len(older) - (keep - 1))]:
            if not _is_kept(path, f", though checkpoint.keep={keep}"):
                aside = beside(path, "partial")  # no checkpoint any more, should this be cut short
                _make_way(aside, {})
                rename_directory(path, aside)
    remove_half_done(root)


def remove_half_done(root: Path) -> None:
    """Remove what a killed run has left of checkpoints that it was writing, or removing."""
    for path in root.glob("step-*.partial"):
        if _NAME.fullmatch(path.stem) and not _is_kept(path, ""):
            remove_files(path, files_below(path))


def _is_kept(path: Path, though: str) -> bool:
    """Say whether a directory holds what is not ours to remove, with a warning."""
    if not path.is_symlink() and not (strange := _strange_files(path)):
        return False
    what = "is a link" if path.is_symlink() else f"holds {', '.join(strange[:3])}, which no checkpoint has"
    warnings.warn(f"{path.absolute()} {what}: it is not removed{though}", stacklevel=3)
    return True
