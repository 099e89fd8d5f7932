"""SIGKILL at chosen points of every command that writes: started again, it ends like one that nothing has happened to.

A point is the moment before a command opens a file for writing, renames, removes or makes something below its
directory; Python's audit events tell. Between two of these a command computes, and what it has computed is on no disk.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.attacks import Attack, Hole
from tests.support.run_inputs import Task, commands, make_task, save_tokenizer, steady_metrics

_CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link"}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_NEVER = 1 << 40


def command(argv: list[str], root: str, kill_at: int, counted: str) -> None:
    """In a process of its own: ``tropd ARGV``, killed at the ``kill_at``-th point; their number goes to ``counted``."""
    seen = 0

    def watch(event: str, details: tuple[Any, ...]) -> None:
        nonlocal seen
        if not _changes_something(event, details) or not str(details[0]).startswith(root):
            return
        seen += 1
        if seen == kill_at:
            os.killpg(0, signal.SIGKILL)  # with the processes that write a checkpoint, if it is one of them

    sys.addaudithook(watch)
    try:
        if argv[0] == "publish":
            _publish(Path(argv[1]))
        else:
            from megatron_tropd.cli import main

            sys.argv = ["tropd", *argv]
            main()
    finally:
        Path(counted).write_text(str(seen))


def _changes_something(event: str, details: tuple[Any, ...]) -> bool:
    if event == "open":
        mode, flags = details[1], details[2]
        return any(c in "wax+" for c in mode or "") or bool((flags or 0) & _WRITES)
    return event in _CHANGES


def _publish(parent: Path) -> None:
    """What a run with servers on this host does with its weights, without the servers."""
    from megatron_tropd.weight_sync.publish_directory import PublishDirectory

    place = PublishDirectory(parent)
    for version in range(3):
        folder = place.path / f"version-{version}"
        folder.mkdir()
        (folder / "00000.safetensors").write_bytes(b"weights")
        place.drop_all_but(folder)
    place.close()


# --------------------------------------------------------------------------- what is started, and what it leaves


@dataclass(frozen=True, slots=True, kw_only=True)
class Storm:
    """A command, what it leaves when nothing happens to it, and how often it is killed in the full form."""

    name: str
    argv: Callable[[Task, Path], Sequence[object]]  # of a directory that it writes to
    outcome: Callable[[Path], Any]
    kills: int
    prepare: Callable[[Task, Path], None] = lambda task, directory: None
    in_a_row: int = 4  # kills before it may finish


_QUIET = ("report.samples=0", "report.html=false", "rollout.guided_per_prompt=1", "evaluate.teacher=false")


def _train(task: Task, directory: Path) -> Sequence[object]:
    few = ("train.steps=3", "checkpoint.every=1", "checkpoint.keep=2", "evaluate.every=1", "evaluate.max_problems=2")
    records = (
        f"rollout.record={directory}/rollouts",
        f"teacher.record={directory}/scores",
        "rollout.ahead=1",
        "method.ppo_clip=0.2",
    )
    suites = "evaluate.suites=[{name: greedy}]"
    where = (f"run_dir={directory}/run", f"export.hf={directory}/export")
    return ("train", task.config, *where, *_QUIET, *few, *records, suites)


def _trained(directory: Path) -> Any:
    return (
        steady_metrics(directory / "run"),
        json.loads((directory / "run" / "evaluation.json").read_text()),
        _digest(directory / "export" / "model.safetensors"),
        _scored(directory),
        [_digest(path) for path in sorted((directory / "rollouts").glob("*.npz"))],
    )


def _score(task: Task, directory: Path) -> Sequence[object]:
    return (
        "score",
        task.config,
        f"teacher.record={directory}/scores",
        f"run_dir={directory}/run",
        "train.prompts_per_step=1",
    )


def _scored(directory: Path) -> Any:
    from megatron_tropd.teacher.store import Store

    store = Store(directory / "scores")
    return [
        (key, *((name, store.read(place, name).tolist()) for name in sorted(store.columns(place))))
        for key in sorted(store.keys())
        for place in store.find(key)[:1]
    ]


def _imported(task: Task, directory: Path) -> None:
    target = directory.parent / "megatron"
    if not target.exists():
        commands().run("convert", "hf-to-megatron", task.student, target).expect_success()


def _read_import(directory: Path) -> Any:
    state = json.loads((directory / "megatron" / "complete.json").read_text())
    return sorted(state["files"]), {name: one for name, one in state["files"].items() if name.endswith(".distcp")}


def _run_directory(task: Task, directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    rows = [{"step": step, "loss": 1.0 / step, "reverse_kl": 0.5} for step in range(1, 9)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


_SAMPLED = ("--max-new-tokens", 9, "--dtype", "fp32", "--samples", 60)
STORMS = (
    Storm(name="train", argv=_train, outcome=_trained, kills=36, in_a_row=6),
    Storm(
        name="generate",
        argv=lambda task, directory: ("generate", task.student, task.prompts, directory / "out.jsonl", *_SAMPLED),
        outcome=lambda directory: _digest(directory / "out.jsonl"),
        kills=14,
    ),
    Storm(name="score", argv=_score, outcome=_scored, kills=14),
    Storm(
        name="evaluate",
        argv=lambda task, directory: ("evaluate", task.config, f"run_dir={directory}/run", "--limit", 2),
        outcome=lambda directory: json.loads((directory / "run" / "evaluation.json").read_text()),
        kills=8,
    ),
    Storm(
        name="convert hf-to-megatron",
        argv=lambda task, directory: ("convert", "hf-to-megatron", task.student, directory / "megatron"),
        outcome=_read_import,
        kills=14,
    ),
    Storm(
        name="convert megatron-to-hf",
        argv=lambda task, directory: ("convert", "megatron-to-hf", directory.parent / "megatron", directory / "hf"),
        outcome=lambda directory: {path.name: _digest(path) for path in sorted((directory / "hf").glob("[!.]*"))},
        prepare=_imported,
        kills=14,
    ),
    Storm(
        name="report",
        argv=lambda task, directory: ("report", directory),
        outcome=lambda directory: "<svg" in (directory / "report.html").read_text(),
        prepare=_run_directory,
        kills=4,
        in_a_row=2,
    ),
    Storm(
        name="weights published as files",
        argv=lambda task, directory: ("publish", directory),
        outcome=lambda directory: None,
        kills=12,
    ),
)


# --------------------------------------------------------------------------- the storm


def _names(directory: Path) -> set[str]:
    """Every file that is there in the end; names that depend on how often a command was started are left out.

    So is ``OUT.1`` where it equals ``OUT``: a command that is killed when all its work is done, on letting go of its
    lock, and started again, was run twice.
    """
    found = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    for name in sorted(found):
        if name.endswith(".1") and _digest(directory / name) == _digest(directory / name.removesuffix(".1")):
            found.remove(name)
    return {name for name in found if "earlier-run" not in name and not name.endswith(".parquet")}


def _start(storm: Storm, task: Task, directory: Path, kill_at: int) -> tuple[int, str, int]:
    """Exit status, output, and the number of points, where it was not killed."""
    counted = task.directory / "points"
    counted.unlink(missing_ok=True)
    argv = [str(word) for word in storm.argv(task, directory)]
    outcome = commands().start_call(command, argv, str(directory), kill_at, str(counted)).wait(600)
    return outcome.status, outcome.output, int(counted.read_text()) if counted.exists() else 0


def _whole(storm: Storm, task: Task, directory: Path, *, kill_at: int = _NEVER) -> int:
    status, output, points = _start(storm, task, directory, kill_at)
    if status != 0:
        raise Hole(f"status {status}: {output.strip().splitlines()[-1:]}")
    return points


def _new(storm: Storm, task: Task, directory: Path) -> Path:
    directory.mkdir(parents=True)
    storm.prepare(task, directory)
    return directory


def struck(storm: Storm, kills: int, *, seed: int = 0) -> Callable[[Path], str]:
    """Kills a command so often, at random points and some times in a row, and compares what it leaves in the end."""

    def attempt(directory: Path) -> str:
        task, rng, done, rounds = make_task(directory / "task"), random.Random(seed), 0, 0
        save_tokenizer(task.student)
        whole = _new(storm, task, directory / "whole")
        points = _whole(storm, task, whole)
        expected, names = storm.outcome(whole), _names(whole)
        while done < kills:
            rounds += 1
            place = _new(storm, task, directory / f"storm-{rounds}")
            bystander = place / "notes.txt"
            bystander.write_text("mine")
            for _ in range(min(storm.in_a_row, kills - done)):
                status, output, _ = _start(storm, task, place, rng.randint(1, points))
                if status == 0:
                    break  # there was less left to do than the point lies ahead
                if status != -signal.SIGKILL:
                    raise Hole(f"after {done} kills: status {status}: {output.strip().splitlines()[-1:]}")
                done += 1
            _whole(storm, task, place)
            if storm.outcome(place) != expected:
                raise Hole(f"round {rounds} (seed {seed}) ends otherwise than an unbroken run")
            if bystander.read_text() != "mine" or _names(place) - {"notes.txt"} != names:
                raise Hole(f"round {rounds} leaves {sorted(_names(place) ^ names)[:5]}")
        return (
            f"{done} kills at {points} points, in {rounds} rounds: each ended like an unbroken run, with no file more"
        )

    return attempt


ATTACKS = (
    *(
        Attack(name=f"{storm.name}: two kills", attempt=struck(storm, 2, seed=1))
        for storm in STORMS
        if storm.name in ("convert hf-to-megatron", "weights published as files")
    ),
    *(Attack(name=storm.name, attempt=struck(storm, storm.kills), quick=False) for storm in STORMS),
)
