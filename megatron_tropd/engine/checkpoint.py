"""Checkpoints that appear whole or not at all.

Weights, optimizer and schedule go through Megatron's ``torch_dist`` format, so a run may go on under another layout.
A checkpoint is written aside, renamed into place, and only then named by the ``latest`` file. Its last file,
``complete.json``, lists every other one with its size. The loader trusts what ``latest`` names if it is whole, and
otherwise falls back to the newest whole one, saying so.
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tropd.engine.metadata import check_metadata, only_plain_objects
from megatron_tropd.engine.model import Model
from megatron_tropd.engine.optimizer import Optimization
from megatron_tropd.engine.patches.checkpoint_writer import collect_writes_in_process
from megatron_tropd.engine.patches.parallel_state import use_parallel_state
from megatron_tropd.errors import CheckpointError

_LATEST = "latest"
COMPANIONS = "hf"  # config and tokenizer files of a converted model, inside the directory
_COMPLETE = "complete.json"  # written last inside the directory, so its presence means the rest was there


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
    beside: Callable[[Path], None] | None = None,
) -> Path:
    """Saves after ``step`` finished steps. Collective.

    Args:
        state: small JSON-able facts of the run (seed, method, what else must agree to go on).
        beside: called on every rank with a directory, to write more files of the checkpoint into.
        keep: how many checkpoints to leave on disk; 0 keeps all. Those of later steps go too: they were left by a run
            that went back.
    """
    root = Path(root)
    target = _directory(root, step)
    with optimization.states.present():
        with use_parallel_state(model.groups):
            sharded = _sharded_state(model, optimization, loading=False)
        _write_whole(target, sharded, {"step": step, **state}, model, beside=beside)
    if dist.get_rank() == 0:
        _write_synced(root / (_LATEST + ".partial"), target.name)
        os.replace(root / (_LATEST + ".partial"), root / _LATEST)
        _drop_others(root, target, keep)
    dist.barrier()
    return target


def save_model(target: Path, model: Model, *, state: Mapping[str, Any], companions: Iterable[Path] = ()) -> None:
    """Saves a model that is not being trained as the checkpoint ``target``, of step 0. Collective.

    Args:
        companions: config and tokenizer files, which go into its directory ``hf``.
    """
    with use_parallel_state(model.groups):
        sharded = _sharded_model(model)
    _write_whole(target, sharded, {"step": 0, **state}, model, companions)


def _write_whole(
    target: Path,
    sharded: dict[str, Any],
    facts: dict[str, Any],
    model: Model,
    companions: Iterable[Path] = (),
    beside: Callable[[Path], None] | None = None,
) -> None:
    """Writes aside, then the list of what was written, then puts it in place. Collective."""
    aside = target.with_name(target.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    dist.barrier()
    with use_parallel_state(model.groups):
        collect_writes_in_process()
        dist_checkpointing.save(sharded, str(aside))
    if beside is not None:
        beside(aside)
    dist.barrier()
    if dist.get_rank() == 0:
        for path in companions:
            (aside / COMPANIONS).mkdir(exist_ok=True)
            shutil.copyfile(path, aside / COMPANIONS / path.name)
        sizes = {path.relative_to(aside).as_posix(): path.stat().st_size for path in aside.rglob("*") if path.is_file()}
        _write_synced(aside / _COMPLETE, json.dumps({**facts, "files": sizes}, indent=2, sort_keys=True))
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
    dist.barrier()


def find_checkpoint(root: str | Path) -> Path | None:
    """The newest whole checkpoint under ``root``, or None. Warns about every torn one it passes over."""
    root = Path(root)
    candidates = sorted(_finished(root), reverse=True)
    named = root / _LATEST
    if named.exists() and (latest := root / named.read_text().strip()) in candidates:
        candidates.remove(latest)
        candidates.insert(0, latest)
    for candidate in candidates:
        try:
            read_state(candidate)
        except CheckpointError as error:
            warnings.warn(f"skipping a torn checkpoint: {error}", stacklevel=2)
            continue
        return candidate
    return None


def read_state(checkpoint: str | Path) -> dict[str, Any]:
    """The run state saved with a checkpoint.

    Raises:
        CheckpointError: it is not a checkpoint, or a file of it is missing or of another size than was written.
    """
    path = Path(checkpoint) / _COMPLETE
    try:
        state = json.loads(path.read_text())
        files = {str(name): int(size) for name, size in state["files"].items()}
        int(state["step"])
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{Path(checkpoint).absolute()} is not a whole checkpoint ({_COMPLETE} is missing or broken). "
            "Delete it, or name another with checkpoint.resume=PATH."
        ) from error
    for name, size in files.items():
        file = path.parent / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found:,} bytes"
            raise CheckpointError(
                f"{Path(checkpoint).absolute()} is torn: {name} {what}, {size:,} were written. "
                "Delete it, or name another with checkpoint.resume=PATH."
            )
    return dict(state)


def discard_checkpoints(root: str | Path) -> None:
    """Removes every checkpoint under ``root``, for a run that starts over. On one rank only."""
    root = Path(root)
    (root / _LATEST).unlink(missing_ok=True)
    for directory in root.glob("step-*"):
        shutil.rmtree(directory)


def load_checkpoint(checkpoint: str | Path, model: Model, optimization: Optimization) -> dict[str, Any]:
    """Restores weights, optimizer and schedule; returns the run state. Collective.

    Raises:
        CheckpointError: torn, or of another model or optimizer.
    """
    state = read_state(checkpoint)
    check_metadata(Path(checkpoint))
    with optimization.states.present(), use_parallel_state(model.groups), only_plain_objects(Path(checkpoint)):
        try:
            loaded = dist_checkpointing.load(
                _sharded_state(model, optimization, loading=True), str(Path(checkpoint).absolute())
            )
        except (CheckpointException, dist_checkpointing.core.CheckpointingException, KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"{Path(checkpoint).absolute()} does not fit this model and optimizer: {error}. "
                "It was written by a run with another student or optimizer; start afresh with checkpoint.resume=never."
            ) from error
        for number, chunk in enumerate(model.chunks):
            chunk.load_state_dict(loaded[_model_key(number, len(model.chunks))], strict=True)
        optimization.load(loaded["optimizer"])
        optimization.scheduler.load_state_dict(loaded["scheduler"])
    torch.set_rng_state(loaded["torch_rng"])
    return state


def load_model_weights(checkpoint: str | Path, model: Model) -> None:
    """Fills the model from a checkpoint of training or of ``save_model``, written under any layout. Collective.

    Raises:
        CheckpointError: torn, or of another model.
    """
    read_state(checkpoint)
    check_metadata(Path(checkpoint))
    with use_parallel_state(model.groups), only_plain_objects(Path(checkpoint)):
        # weights alone: what else a module saves comes as pickles, and is nothing here
        sharded = {
            key: {name: part for name, part in chunk.items() if not name.endswith("_extra_state")}
            for key, chunk in _sharded_model(model).items()
        }
        try:
            loaded = dist_checkpointing.load(sharded, str(Path(checkpoint).absolute()))
        except (CheckpointException, dist_checkpointing.core.CheckpointingException, KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"{Path(checkpoint).absolute()} does not hold the model of config.json: {str(error)[:400]}. "
                "Give the config.json of the model it was trained from."
            ) from error
        for number, chunk in enumerate(model.chunks):
            found = chunk.load_state_dict(loaded[_model_key(number, len(model.chunks))], strict=False)
            missing = [name for name in found.missing_keys if not name.endswith("_extra_state")]
            if missing:
                raise CheckpointError(f"{Path(checkpoint).absolute()} has no {missing[0]}.")


def _sharded_model(model: Model) -> dict[str, Any]:
    model.ready()
    metadata = {"dp_cp_group": model.groups.pg.dp_cp}
    return {
        _model_key(number, len(model.chunks)): chunk.sharded_state_dict(metadata=metadata)
        for number, chunk in enumerate(model.chunks)
    }


def _model_key(number: int, chunks: int) -> str:
    return "model" if chunks == 1 else f"model{number}"


def _sharded_state(model: Model, optimization: Optimization, *, loading: bool) -> dict[str, Any]:
    state = _sharded_model(model)
    if loading:
        optimization.init_optimizer_state()
    # the chunks' own names collide (each counts its layers from 0): they stay apart, under the chunk's key
    state["optimizer"] = optimization.optimizer.sharded_state_dict(
        # of the distributed optimizer: its default is refused by the same version's checkpoints
        dict(state),
        is_loading=loading,
        metadata={"distrib_optim_sharding_type": "fully_reshardable"},
    )
    state["scheduler"] = optimization.scheduler.state_dict()
    state["torch_rng"] = torch.get_rng_state()
    return state


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _finished(root: Path) -> list[Path]:
    return [path for path in root.glob("step-*") if path.suffix != ".partial"]


def _drop_others(root: Path, newest: Path, keep: int) -> None:
    if not keep:
        return
    older = sorted(path for path in _finished(root) if path.name < newest.name)
    kept = {newest, *older[max(0, len(older) - (keep - 1)) :]}
    for path in root.glob("step-*"):  # what a killed writer left half-done, too
        if path not in kept:
            shutil.rmtree(path)
