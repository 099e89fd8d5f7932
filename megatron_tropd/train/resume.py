"""Resume from a checkpoint: find it, see whether it is of this run, set aside what an abandoned run left behind."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_tropd.config.sections import CheckpointConfig
from megatron_tropd.engine.checkpoint import (
    ContentCheck,
    find_checkpoint,
    load_checkpoint,
    read_state,
    remove_half_done,
)
from megatron_tropd.errors import CheckpointError, ConfigError
from megatron_tropd.report.records import drop_evaluations_after
from megatron_tropd.report.terminal import say
from megatron_tropd.setup.build import Run
from megatron_tropd.setup.validate import FINGERPRINTS
from megatron_tropd.train.earlier_run import CHECKPOINTS, set_aside, set_aside_later
from megatron_tropd.train.rollout_queue import RolloutQueue

# of what identifies a run (validate.identity), what a resumed run may change at its own risk
_MAY_CHANGE = ("train.", "rollout.", "optimizer.")
_RESPELLED = {"normalise_experts": "normalize_experts"}
# what no insisting helps with: the states of a checkpoint do not fit
_MUST_AGREE = ("student.model", "student.lora", "optimizer.name", "optimizer.distributed")


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run resumes from, and what is still to be read of it before it is trusted; None to start afresh."""

    checkpoint: Path | None
    check: ContentCheck | None = None


def confirmed(start: Start, find_again: Callable[[Sequence[Path]], Start]) -> Path | None:
    """Wait until the large files have been read, too; of a torn checkpoint, return the one found in its place.

    Collective. ``find_again`` is ``find_start`` without the checkpoints that it is given.
    """
    torn: list[Path] = []
    while start.checkpoint is not None and start.check is not None:
        fault = start.check.fault()
        if fault is None:
            break
        torn.append(start.checkpoint)
        _say_torn(start.checkpoint, fault)
        start = find_again(torn)
    return start.checkpoint


def find_start(
    section: CheckpointConfig,
    identity: Mapping[str, Any],
    *,
    run_dir: Path,
    steps: int,
    torn: Sequence[Path] = (),
) -> Start:
    """Find the checkpoint that a run of this ``validate.identity`` resumes from. Collective.

    Args:
        steps: of the whole run.
        torn: checkpoints of which that is known.

    Raises:
        CheckpointError: the requested checkpoint is torn, or the one found is of another run.
        ConfigError: ``checkpoint.accept_changes`` names what there is not, or what cannot be accepted.
    """
    wanted = section.resume
    _check_accepted(section.accept_changes, identity)
    start = Start(None) if wanted == "never" else _agreed_checkpoint(wanted, run_dir / CHECKPOINTS, [*torn])
    checkpoint = start.checkpoint
    if checkpoint is not None:
        changed = _changes(checkpoint, read_state(checkpoint), identity, steps=steps)
        _check_changes(checkpoint, changed, insisted=frozenset(section.accept_changes))
    elif wanted not in ("auto", "never"):
        raise CheckpointError(
            f"{Path(wanted).absolute()} holds no whole checkpoint. Name another, or use auto or never."
        )
    return start


def restore(run: Run, queue: RolloutQueue, checkpoint: Path | None) -> int:
    """Put the run where the checkpoint was written; return the number of steps already done. Collective."""
    if checkpoint is None:
        return 0
    average = None if run.moving is None else run.moving.average
    state = load_checkpoint(checkpoint, run.student, run.trainer.optimization, average)
    steps = int(state["step"])
    if run.moving is not None:
        run.moving.restored()
    queue.restore(checkpoint, steps, state)
    if run.world.is_first:
        remove_half_done(run.run_dir / CHECKPOINTS)
        drop_evaluations_after(run.run_dir, steps)
        say(f"resuming from {checkpoint} ({steps} steps done)")
    return steps


def clear_way(run_dir: Path, checkpoint: Path | None) -> None:
    """Move aside what an earlier run in this directory would otherwise mix into this one. Collective.

    All of it when the run starts afresh, later checkpoints when it goes back to an earlier one. To be called when
    nothing is left that could be refused.
    """
    dist.barrier()  # every rank has read what may be moved now
    if dist.get_rank():
        return
    own = (run_dir / CHECKPOINTS).resolve()
    if checkpoint is None or checkpoint.resolve().parent != own:
        # a run that resumes from another's checkpoint in a used directory is a new run there
        set_aside(run_dir)
    else:
        set_aside_later(run_dir, int(read_state(checkpoint)["step"]))


def _agreed_checkpoint(wanted: str, directory: Path, torn: list[Path]) -> Start:
    """Return the newest checkpoint of the run that looks whole and is not ``torn``, or the one requested by path.

    One rank looks for all, all compare checksums.
    """
    while True:
        found, is_newest = _look(wanted, directory, torn)
        if found is None:
            return Start(None)
        if found in torn:  # requested by its own name
            raise CheckpointError(f"{found.absolute()} is torn. Name another with checkpoint.resume=PATH.")
        check = ContentCheck(found)
        if check.small_fault is None:
            return Start(found, check)
        fault = check.fault()
        if not is_newest:
            raise CheckpointError(f"{found.absolute()} is torn: {fault}. Name another with checkpoint.resume=PATH.")
        torn.append(found)
        _say_torn(found, fault)


def _say_torn(checkpoint: Path, fault: str | None) -> None:
    if dist.get_rank() == 0:
        warnings.warn(f"skipping a torn checkpoint: {checkpoint.absolute()} is torn: {fault}", stacklevel=3)


def _look(wanted: str, directory: Path, torn: list[Path]) -> tuple[Path | None, bool]:
    """Find a checkpoint that looks whole, and whether it is the newest of a directory instead of a requested one."""
    chosen: list[Any] = [None, True]
    if dist.get_rank() == 0:
        path = directory if wanted == "auto" else Path(wanted).expanduser()
        if wanted != "auto" and (path / CHECKPOINTS).is_dir():
            path /= CHECKPOINTS  # of a run directory
        # a directory of checkpoints will do where one checkpoint is requested
        many = wanted == "auto" or any(path.glob("step-*"))
        found = find_checkpoint(path, without=torn) if many else path
        chosen = [None if found is None else str(found), many]
    dist.broadcast_object_list(chosen, src=0)
    return None if chosen[0] is None else Path(chosen[0]), bool(chosen[1])


# --------------------------------------------------------------------------- the same run?


def _check_accepted(accepted: Sequence[str], identity: Mapping[str, Any]) -> None:
    for name in accepted:
        if name in _MUST_AGREE:
            raise ConfigError(
                f"checkpoint.accept_changes holds {name!r}, but the states of a checkpoint fit no other. "
                "Start afresh with checkpoint.resume=never."
            )
        if identity and name not in identity:
            raise ConfigError(
                f"checkpoint.accept_changes holds {name!r}, which is nothing a checkpoint remembers. "
                f"It remembers {', '.join(sorted(identity))}."
            )


def _changes(
    checkpoint: Path, state: dict[str, Any], identity: Mapping[str, Any], *, steps: int
) -> dict[str, tuple[Any, Any]]:
    """List by key what was and what is, of all that the run has otherwise than the one that wrote the checkpoint.

    Raises:
        CheckpointError: it is further than ``steps``.
    """
    if state["step"] > steps:
        raise CheckpointError(
            f"{checkpoint.absolute()} has {state['step']} steps behind it, train.steps={steps} asks for fewer. "
            "Raise train.steps, or use another run_dir."
        )
    # as JSON has it: tuples are lists
    here, there = json.loads(json.dumps(dict(identity))), _respelled(dict(state.get("run", {})))
    unknown = sorted(key for key in here if key.endswith(FINGERPRINTS) and key not in there)
    if unknown:
        warnings.warn(
            f"{checkpoint} was written by an earlier version, which does not say {', '.join(unknown)}: whether they "
            "are those of the run that resumes is unknown.",
            stacklevel=2,
        )
    changed = {key: (there.get(key), here.get(key)) for key in here | there if there.get(key) != here.get(key)}
    # weights that are not on this machine leave nothing to compare
    return {key: pair for key, pair in changed.items() if not (key.endswith(FINGERPRINTS) and None in pair)}


def _respelled(run: dict[str, Any]) -> dict[str, Any]:
    """Read names that checkpoints of earlier versions spell otherwise."""
    return {
        key: {_RESPELLED.get(name, name): size for name, size in value.items()} if isinstance(value, dict) else value
        for key, value in run.items()
    }


def _check_changes(checkpoint: Path, changed: dict[str, tuple[Any, Any]], *, insisted: Collection[str]) -> None:
    """Raise CheckpointError when the checkpoint is of another run; warn when this one resumes with other settings."""
    tolerated = {key for key in changed if _is_tolerated(key) or key in insisted}
    refused = sorted(changed.keys() - tolerated)
    if refused:
        insist = "" if set(refused) & set(_MUST_AGREE) else f", or checkpoint.accept_changes=[{', '.join(refused)}]"
        raise CheckpointError(
            f"{checkpoint.absolute()} is of another run: {_differences(changed, refused)}. Use another run_dir, or "
            f"checkpoint.resume=never to start over (the old results are moved aside){insist}"
            f"{' to resume all the same' if insist else ''}."
        )
    if tolerated:
        warnings.warn(
            f"resuming from {checkpoint} with other settings than it was written with: "
            f"{_differences(changed, sorted(tolerated))}. The new ones count from here on; the result is not that of "
            "one run with either.",
            stacklevel=2,
        )


def _is_tolerated(key: str) -> bool:
    return key.startswith(_MAY_CHANGE) and key not in _MUST_AGREE


def _differences(changed: dict[str, tuple[Any, Any]], keys: list[str]) -> str:
    """Write ``key was a, is b`` for every key; of two models, only the sizes that differ."""
    lines = []
    for key in keys:
        was, now = changed[key]
        if isinstance(was, dict) and isinstance(now, dict):
            sizes = [size for size in was | now if was.get(size) != now.get(size)]
            lines += [f"{size} of {key} was {was.get(size)!r}, is {now.get(size)!r}" for size in sizes]
        elif key.endswith(FINGERPRINTS) and isinstance(now, str):
            lines.append(f"{key} are others of the same kind (fingerprint {str(was)[:12]}, now {str(now)[:12]})")
        else:
            lines.append(f"{key} was {was!r}, is {now!r}")
    return "; ".join(lines)
