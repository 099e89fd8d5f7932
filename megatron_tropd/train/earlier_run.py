"""Move aside what an earlier run has left in a run directory: it is never mixed into a new one and never removed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_tropd.report.records import EVALUATION_FILE, PROVENANCE_FILE, SAMPLES_FILE
from megatron_tropd.report.terminal import say
from megatron_tropd.report.trackers import TRACKERS
from megatron_tropd.storage.owned import free_name
from megatron_tropd.storage.write_aside import storage_errors, sync_directory, write_aside

CHECKPOINTS = "checkpoints"
# all that a run writes to its directory by itself, and that the next one would take for its own
RESULTS = (
    CHECKPOINTS,
    "exports",
    "metrics.jsonl",
    EVALUATION_FILE,
    SAMPLES_FILE,
    "report.html",
    "config.yaml",
    PROVENANCE_FILE,
    "tensorboard",
    *(f"{name}_id" for name in TRACKERS),
    "wandb",
    "swanlog",
)
MEASURED = ("metrics.jsonl", EVALUATION_FILE)
_ASIDE = "earlier-run"


def set_aside(run_dir: Path, names: Sequence[str] = RESULTS) -> Path | None:
    """Move results of an earlier run to ``RUN/earlier-run`` (or ``-1``, ...), and say so. On one rank only.

    Returns:
        Where they are now; None when there was nothing.
    """
    found = [name for name in names if _is_something(run_dir / name)]
    if not found:
        return None
    kept = free_name(run_dir / _ASIDE)
    with storage_errors(kept):
        for name in found:
            (kept / name).parent.mkdir(parents=True, exist_ok=True)
            (run_dir / name).rename(kept / name)
        sync_directory(run_dir)
    say(f"{run_dir} held results of an earlier run ({', '.join(found)}): they are in {kept} now")
    return kept


def set_aside_later(run_dir: Path, step: int) -> Path | None:
    """Move checkpoints after ``step``, which a run that goes back to it will write anew, likewise. On one rank only.

    Copies of the metrics and evaluations, which are cut back, go with them.
    """
    root = run_dir / CHECKPOINTS
    later = [
        f"{CHECKPOINTS}/{path.name}"
        for path in sorted(root.glob("step-*"))
        if path.name.removeprefix("step-").isdecimal() and int(path.name.removeprefix("step-")) > step
    ]
    kept = set_aside(run_dir, later)
    if kept is None:
        return None
    for name in MEASURED:  # what was measured after that step will be cut from them
        if (run_dir / name).is_file():
            write_aside(kept / name, (run_dir / name).read_bytes())
    return kept


def _is_something(path: Path) -> bool:
    return path.is_symlink() or path.is_file() or (path.is_dir() and any(path.iterdir()))
