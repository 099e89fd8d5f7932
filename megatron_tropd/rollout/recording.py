"""``recording.json``: the one run whose rollouts a directory holds, and how they were sampled."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_tropd.errors import DataError
from megatron_tropd.storage.write_aside import make_directory, remove_partials, write_aside
from megatron_tropd.types import SamplingParams

FILE = "recording.json"
_COMPARED = ("max_new_tokens", "temperature", "top_p", "top_k")


def claim_recording(
    directory: Path, *, run_dir: Path, identity: Mapping[str, Any], sampling: SamplingParams, resumed: bool
) -> None:
    """Write down that a run records into a directory. Collective.

    ``identity``: what shapes the run's rollouts, by name. A run that starts over writes what it wrote before; a
    ``resumed`` one may have changed settings, which its checkpoint has agreed to.

    Raises:
        DataError: the directory holds rollouts of another run.
    """
    facts = {"run_dir": str(run_dir.absolute()), "identity": dict(identity), "sampling": asdict(sampling)}
    facts = json.loads(json.dumps(facts))
    _check_owner(directory, facts, resumed=resumed)
    dist.barrier()  # nobody looks any more
    if dist.get_rank() == 0:
        make_directory(directory)
        remove_partials(directory)
        write_aside(directory / FILE, json.dumps(facts, indent=2, sort_keys=True))


def recorded_facts(directory: Path) -> dict[str, Any] | None:
    """Read what was written down; None where an earlier version recorded. DataError for a broken file."""
    path = directory / FILE
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{path.absolute()} cannot be read ({error}): it is not known whose rollouts these are. Record into "
            "another directory."
        ) from error


def _check_owner(directory: Path, facts: Mapping[str, Any], *, resumed: bool) -> None:
    steps = sorted(path.stem for path in directory.glob("step-*.npz"))
    recorded = recorded_facts(directory)
    if not steps or (recorded is None and resumed):
        return
    holds = f"{directory.absolute()} holds {steps[0]} to {steps[-1]} of"
    fix = "Record into another directory (rollout.record)."
    if recorded is None:
        raise DataError(f"{holds} a run of an earlier version, not of {facts['run_dir']}. {fix}")
    if recorded.get("run_dir") != facts["run_dir"]:
        raise DataError(f"{holds} the run in {recorded.get('run_dir')}, not of the one in {facts['run_dir']}. {fix}")
    was, now = recorded.get("identity", {}), facts["identity"]
    changed = sorted(key for key in was | now if was.get(key) != now.get(key))
    if changed and not resumed:
        raise DataError(
            f"{holds} an earlier run in {facts['run_dir']}, which had another {', '.join(changed)} than the one that "
            f"starts there now. {fix}"
        )


def check_sampling(directory: Path, params: SamplingParams) -> None:
    """Compare how rollouts were sampled with how the replay says that they are.

    Raises:
        DataError: a setting differs.
    """
    recorded = (recorded_facts(directory) or {}).get("sampling", {})
    changed = [
        f"rollout.{name}={recorded[name]}, not {getattr(params, name)}"
        for name in _COMPARED
        if name in recorded and recorded[name] != getattr(params, name)
    ]
    if changed:
        raise DataError(
            f"{directory.absolute()} was recorded with {' and '.join(changed)}. Replay with the settings of the "
            "recording."
        )
