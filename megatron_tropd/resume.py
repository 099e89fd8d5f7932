"""Going on from a checkpoint: which one, whether it is of this run, and what an abandoned run must not leave behind."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console

from megatron_tropd.build import Run
from megatron_tropd.engine.checkpoint import discard_checkpoints, find_checkpoint, load_checkpoint, read_state
from megatron_tropd.errors import CheckpointError
from megatron_tropd.report.records import EVALUATION_FILE, SAMPLES_FILE

# of what identifies a run (inputs.identity), what a resumed run may change at its own risk; all else is refused
_MAY_CHANGE = ("train.", "rollout.", "data.", "optimizer.")
_MUST_AGREE = ("optimizer.name", "optimizer.distributed")


def resume(run: Run) -> int:
    """Restores the run from a checkpoint; the number of steps already done. Collective."""
    asked, run_dir = run.config.checkpoint.resume, run.config.run_dir
    if asked == "never":
        if run.world.is_first:
            _forget(run_dir)
        return 0
    checkpoint = _agreed_checkpoint(run, run_dir / "checkpoints" if asked == "auto" else Path(asked).expanduser())
    if checkpoint is None:
        return 0
    state = read_state(checkpoint)
    _check_same_run(checkpoint, state, run)
    load_checkpoint(checkpoint, run.student, run.trainer.optimization)
    if run.world.is_first:
        Console().print(f"going on from {checkpoint} ({state['step']} steps done)", highlight=False, soft_wrap=True)
    return int(state["step"])


def _forget(run_dir: Path) -> None:
    """Removes what an earlier run in this directory would otherwise mix into this one."""
    discard_checkpoints(run_dir / "checkpoints")
    for name in (EVALUATION_FILE, SAMPLES_FILE):
        (run_dir / name).unlink(missing_ok=True)


def _agreed_checkpoint(run: Run, path: Path) -> Path | None:
    """The checkpoint at ``path``, or the newest of the directory of checkpoints it is; one rank looks for all."""
    chosen: list[str | None] = [None]
    if run.world.is_first:
        holds_several = run.config.checkpoint.resume == "auto" or any(path.glob("step-*"))
        found = find_checkpoint(path) if holds_several else path
        chosen = [None if found is None else str(found)]
    dist.broadcast_object_list(chosen, src=0)
    if chosen[0] is None and run.config.checkpoint.resume != "auto":
        raise CheckpointError(f"{path.absolute()} holds no whole checkpoint. Name another, or use auto or never.")
    return None if chosen[0] is None else Path(chosen[0])


def _check_same_run(checkpoint: Path, state: dict[str, Any], run: Run) -> None:
    """CheckpointError when the checkpoint is of another run; a warning when this one goes on with other settings."""
    steps = run.config.train.steps
    if state["step"] > steps:
        raise CheckpointError(
            f"{checkpoint.absolute()} has {state['step']} steps behind it, train.steps={steps} asks for fewer. "
            "Raise train.steps, or use another run_dir."
        )
    # as JSON has it: tuples are lists
    here, there = json.loads(json.dumps(run.identity)), dict(state.get("run", {}))
    changed = {key: (there.get(key), here.get(key)) for key in here | there if there.get(key) != here.get(key)}
    tolerated = {key for key in changed if key.startswith(_MAY_CHANGE) and key not in _MUST_AGREE}
    refused = sorted(changed.keys() - tolerated)
    if refused:
        raise CheckpointError(
            f"{checkpoint.absolute()} is of another run: {_differences(changed, refused)}. "
            "Use another run_dir, or checkpoint.resume=never to start over and remove the old one."
        )
    if tolerated and run.world.is_first:
        warnings.warn(
            f"going on from {checkpoint} with other settings than it was written with: "
            f"{_differences(changed, sorted(tolerated))}. The result is not that of one run with either.",
            stacklevel=2,
        )


def _differences(changed: dict[str, tuple[Any, Any]], keys: list[str]) -> str:
    """``key was a, is b`` for every key; of two models, only the sizes that differ."""
    lines = []
    for key in keys:
        was, now = changed[key]
        if isinstance(was, dict) and isinstance(now, dict):
            sizes = [size for size in was | now if was.get(size) != now.get(size)]
            lines += [f"{size} of {key} was {was.get(size)!r}, is {now.get(size)!r}" for size in sizes]
        else:
            lines.append(f"{key} was {was!r}, is {now!r}")
    return "; ".join(lines)
