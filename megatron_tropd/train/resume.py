"""Going on from a checkpoint: which one, whether it is of this run, and what an abandoned run must not leave behind."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console

from megatron_tropd.config.sections import CheckpointConfig
from megatron_tropd.engine.checkpoint import discard_checkpoints, find_checkpoint, load_checkpoint, read_state
from megatron_tropd.errors import CheckpointError
from megatron_tropd.report.records import EVALUATION_FILE, SAMPLES_FILE
from megatron_tropd.setup.build import Run
from megatron_tropd.train.rollout_queue import Batches

# of what identifies a run (inputs.identity), what a resumed run may change at its own risk; all else is refused
_MAY_CHANGE = ("train.", "rollout.", "data.", "optimizer.")
_MUST_AGREE = ("optimizer.name", "optimizer.distributed")


def find_start(section: CheckpointConfig, identity: Mapping[str, Any], *, run_dir: Path, steps: int) -> Path | None:
    """The checkpoint that a run of this identity (``inputs.identity``) goes on from; None to start afresh. Collective.

    With ``checkpoint.resume=never`` what an earlier run left in ``run_dir`` is removed. ``steps``: of the whole run.

    Raises:
        CheckpointError: the checkpoint asked for is torn, or the one found is of another run.
    """
    first, asked = dist.get_rank() == 0, section.resume
    if asked == "never":
        if first:
            _forget(run_dir)
        return None
    checkpoint = _agreed_checkpoint(asked, run_dir / "checkpoints")
    if checkpoint is not None:
        _check_same_run(checkpoint, read_state(checkpoint), identity, steps=steps)
    elif asked != "auto":
        raise CheckpointError(
            f"{Path(asked).absolute()} holds no whole checkpoint. Name another, or use auto or never."
        )
    return checkpoint


def restore(run: Run, batches: Batches, checkpoint: Path | None) -> int:
    """Puts the run where the checkpoint was written; the number of steps already done. Collective."""
    if checkpoint is None:
        return 0
    steps = int(load_checkpoint(checkpoint, run.student, run.trainer.optimization)["step"])
    batches.restore(checkpoint, steps)
    if run.world.is_first:
        Console().print(f"going on from {checkpoint} ({steps} steps done)", highlight=False, soft_wrap=True)
    return steps


def _forget(run_dir: Path) -> None:
    """Removes what an earlier run in this directory would otherwise mix into this one."""
    discard_checkpoints(run_dir / "checkpoints")
    for name in (EVALUATION_FILE, SAMPLES_FILE):
        (run_dir / name).unlink(missing_ok=True)


def _agreed_checkpoint(asked: str, directory: Path) -> Path | None:
    """The newest whole checkpoint of the run, or the one asked for by path. One rank looks for all."""
    chosen: list[str | None] = [None]
    if dist.get_rank() == 0:
        path = directory if asked == "auto" else Path(asked).expanduser()
        # a directory of checkpoints will do where one checkpoint is asked for
        found = find_checkpoint(path) if asked == "auto" or any(path.glob("step-*")) else path
        chosen = [None if found is None else str(found)]
    dist.broadcast_object_list(chosen, src=0)
    return None if chosen[0] is None else Path(chosen[0])


def _check_same_run(checkpoint: Path, state: dict[str, Any], identity: Mapping[str, Any], *, steps: int) -> None:
    """CheckpointError when the checkpoint is of another run; a warning when this one goes on with other settings."""
    if state["step"] > steps:
        raise CheckpointError(
            f"{checkpoint.absolute()} has {state['step']} steps behind it, train.steps={steps} asks for fewer. "
            "Raise train.steps, or use another run_dir."
        )
    # as JSON has it: tuples are lists
    here, there = json.loads(json.dumps(dict(identity))), dict(state.get("run", {}))
    changed = {key: (there.get(key), here.get(key)) for key in here | there if there.get(key) != here.get(key)}
    tolerated = {key for key in changed if key.startswith(_MAY_CHANGE) and key not in _MUST_AGREE}
    refused = sorted(changed.keys() - tolerated)
    if refused:
        raise CheckpointError(
            f"{checkpoint.absolute()} is of another run: {_differences(changed, refused)}. "
            "Use another run_dir, or checkpoint.resume=never to start over and remove the old one."
        )
    if tolerated:
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
