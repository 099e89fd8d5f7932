"""The demo: its students, its last words, and with vLLM a server of its own for as long as it trains."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_tropd.config.loading import load_config
from megatron_tropd.errors import ConfigError, ServingError, printable
from megatron_tropd.report.records import AFTER, BEFORE, Evaluation, read_evaluations
from megatron_tropd.report.sinks import read_jsonl
from megatron_tropd.report.stuck import is_stuck
from megatron_tropd.setup.validate import check_method

# so many MiB hold all sequences of a step; vLLM would take a GiB
_SMALL_CACHE = "rollout.vllm.cache_mib=64"
_START_S = 300.0
_END_S = 15.0

STUDENTS: Mapping[str, str] = {  # by name: their folders in examples/demo
    "direct": "student_direct",  # answers off the top of its head: far from the teacher
    "mistaken": "student",  # shows its work, with wrong beliefs: near the teacher
}


def last_words(run_dir: Path) -> str:
    """Say in words what a finished demo showed: accuracies, lengths, and why nothing moved if nothing did."""
    metrics = run_dir / "metrics.jsonl"
    rows = read_jsonl(metrics)[0] if metrics.exists() else []
    evaluations = read_evaluations(run_dir)
    said = [part for part in (_accuracies(evaluations), _lengths(evaluations)) if part]
    if rows and is_stuck(rows[-1]):
        name = load_config(run_dir / "config.yaml", check_paths=False).method.name
        why = "the student is confident where the teacher would never go"
        said.append(f"{why}; {name} needs many more steps here, see docs/results.md")
    return ": ".join(text[:1].upper() + text[1:] if not number else text for number, text in enumerate(said))


def _accuracies(evaluations: Sequence[Evaluation]) -> str:
    found = {(e.model, e.suite): 100 * e.accuracy for e in evaluations}
    moved = [
        f"{found[BEFORE, suite]:.1f} -> {found[AFTER, suite]:.1f} % ({suite})"
        for suite in dict.fromkeys(e.suite for e in evaluations)
        if {(BEFORE, suite), (AFTER, suite)} <= found.keys()
    ]
    return f"accuracy {', '.join(moved)}" if moved else ""


def _lengths(evaluations: Sequence[Evaluation]) -> str:
    """Compare the responses before and after, of the last suite: it samples as training does."""
    length = {e.model: e.mean_length for e in evaluations if e.suite == evaluations[-1].suite}
    if not {BEFORE, AFTER} <= length.keys():
        return ""
    before, after = length[BEFORE], length[AFTER]
    change = "fell" if after < 0.9 * before else "grew" if after > 1.1 * before else "stayed"
    return f"responses {change} from {before:.3g} to {after:.3g} tokens"


@dataclass(frozen=True, slots=True)
class DemoFiles:
    """The demo's files, and how a run from elsewhere finds them."""

    root: Path  # holds examples/demo and examples/methods
    cwd: Path  # where the run is started: paths of overrides are relative to it
    overrides: tuple[str, ...]  # the student's path, and the configuration's own where they are not relative to cwd

    @property
    def config(self) -> Path:
        return self.root / "examples" / "demo" / "demo.yaml"


def find_demo(student: str) -> DemoFiles:
    """Find the demo, with one of its students: in the clone that the package is run from, else in the package itself.

    Raises:
        ConfigError: it is in neither, or has no such student.
    """
    if student not in STUDENTS:
        raise ConfigError(f"--student is {student}: use one of {', '.join(STUDENTS)}.")
    package = Path(__file__).resolve().parents[1]
    clone = DemoFiles(package.parent, package.parent, (f"student.model=examples/demo/{STUDENTS[student]}",))
    if clone.config.exists():
        return clone
    demo = package / "examples" / "demo"
    paths = {
        "student.model": demo / STUDENTS[student],
        "teacher.model": demo / "teacher",
        "data.prompts": demo / "data" / "train.jsonl",
        "evaluate.prompts": demo / "data" / "heldout.jsonl",
    }
    found = DemoFiles(package, Path.cwd(), tuple(f"{key}={json.dumps(str(path))}" for key, path in paths.items()))
    if not found.config.exists():
        raise ConfigError(
            f"{found.config} is not there, nor is {clone.config}: install the package again, or clone it."
        )
    return found


def check_settings(config: Path, changes: Sequence[str], processes: int) -> None:
    """Find a mistake in the settings here, where it is not buried under what the launcher says of its ranks."""
    # paths are relative to where the ranks will be
    check_method(load_config(config, changes, world_size=processes, check_paths=False))


def of_engine(name: str | None) -> tuple[list[str], bool]:
    """Return the overrides that the demo adds for a rollout engine, and whether it needs a server.

    ``name``: None is the configuration's own engine.

    Raises:
        ConfigError: no such engine, or one that cannot write.
    """
    from megatron_tropd.rollout.engines.registry import ROLLOUT_ENGINES

    if name is None:
        return [], False
    able = [other for other, row in ROLLOUT_ENGINES.items() if row.generates]
    if name not in able:
        raise ConfigError(f"--engine is {name}: use one of {', '.join(able)}.")
    row = ROLLOUT_ENGINES[name]
    return [_SMALL_CACHE] if row.needs_vllm or row.needs_servers else [], row.needs_servers


def ranks_for(wanted: int, overrides: Sequence[str]) -> int:
    """Return how many ranks this machine has room for, with a sentence where that is fewer: a GPU serves one rank."""
    import torch

    gpus = 0 if "device=cpu" in overrides or not torch.cuda.is_available() else torch.cuda.device_count()
    if not 0 < gpus < wanted:
        return wanted
    print(f"{gpus} GPU(s) here: the demo runs on {gpus} rank(s) instead of {wanted}", flush=True)
    return gpus


@contextmanager
def student_server(config: Path, overrides: Sequence[str], *, root: Path) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Run a server on a free port of loopback, ended with the block: its address, and the variable that holds its key.

    What the server says goes to ``server.log`` in ``run_dir``.

    Raises:
        ServingError: it ended, or was not ready in five minutes.
    """
    settings = load_config(config, overrides, check_paths=False)
    port, variable = _free_port(), settings.rollout.vllm_server.key_variable
    key = {variable: os.environ.get(variable) or secrets.token_urlsafe(24)}
    command = [sys.executable, "-m", "megatron_tropd", "serve", "student", str(config), *overrides, f"--port={port}"]
    log = root / settings.run_dir / "server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        server = subprocess.Popen(
            command,
            cwd=root,
            env={"OMP_NUM_THREADS": "1", **os.environ, **key},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # with its workers it makes up a group, which ends as one
        )
    try:
        print(printable(f"starting a vLLM server; it writes to {log}"), flush=True)
        _wait_until_well(server, f"http://127.0.0.1:{port}", log)
        yield f"http://127.0.0.1:{port}", key
    finally:
        _end(server)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_well(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + _START_S
    while True:
        with contextlib.suppress(urllib.error.URLError, OSError):
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
            return
        if server.poll() is not None or time.monotonic() > deadline:
            how = f"was not ready in {_START_S:g} s" if server.poll() is None else f"ended ({server.returncode})"
            said = log.read_text(errors="replace").strip().splitlines()
            raise ServingError(f"the vLLM server {how}: {said[-1] if said else 'it said nothing'} Look at {log}.")
        time.sleep(0.5)


def _end(server: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=_END_S)
