"""A training step beside that of TRL's ``DistillationTrainer``: the same work, in turns, in one run.

Both learn the reverse KL over the full vocabulary from the same prompts in the same steps, on two processes of as many
threads: ours data parallel, ours tensor parallel, TRL data parallel. Where other work shares the machine, processor
seconds say more than seconds.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from megatron_tropd.config.loading import load_config
from megatron_tropd.convert.hf import read_architecture
from megatron_tropd.errors import ConfigError
from megatron_tropd.types import Architecture

_CHILD = Path(__file__).with_name("trl_train.py")
_QUIET = (
    *("checkpoint.every=0", "checkpoint.resume=never", "evaluate.prompts=null", "report.html=false"),
    *("export.hf=null", "report.samples=0", "optimizer.schedule=constant", "optimizer.warmup_steps=0"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """The steps of one variant after warm-up, of all its turns."""

    seconds: list[float]
    processor_seconds: list[float]  # of all processes
    tokens: list[float]  # of responses, over all processes
    parts: list[Mapping[str, float]]
    peak_bytes: float  # of the process that held most

    @property
    def tokens_per_second(self) -> float:
        """Return the median over steps."""
        return statistics.median(t / s for t, s in zip(self.tokens, self.seconds, strict=True))

    @property
    def processor_milliseconds_per_token(self) -> float:
        """Return the median over steps."""
        return 1e3 * statistics.median(s / t for t, s in zip(self.tokens, self.processor_seconds, strict=True))


def steps_of(folder: Path, *, warmup: int, metrics: Sequence[Mapping[str, float]] | None = None) -> Steps:
    """Read what the ranks of a turn wrote; ``metrics``: the lines of a run of ours, where its tokens and parts are."""
    ranks = [json.loads(path.read_text()) for path in sorted(folder.glob("rank-*.json"))]
    marks = [rank["marks"][warmup:] for rank in ranks]
    seconds = [b[0] - a[0] for a, b in pairwise(marks[0])]
    used = [[b[1] - a[1] for a, b in pairwise(own)] for own in marks]
    if metrics is None:
        tokens, parts = ranks[0]["tokens"], ranks[0]["parts"]
    else:
        tokens = [row["tokens"] for row in metrics]
        parts = [{name: row.get(f"time_{name}", 0.0) for name in ("rollout", "teacher")} for row in metrics]
    return Steps(
        seconds=seconds,
        processor_seconds=[sum(step) for step in zip(*used, strict=True)],
        tokens=list(tokens[warmup:]),
        parts=list(parts[warmup:]),
        peak_bytes=max(rank["peak"] for rank in ranks),
    )


def joined(turns: Sequence[Steps]) -> Steps:
    """Put the turns of a variant together."""
    return Steps(
        seconds=[x for turn in turns for x in turn.seconds],
        processor_seconds=[x for turn in turns for x in turn.processor_seconds],
        tokens=[x for turn in turns for x in turn.tokens],
        parts=[x for turn in turns for x in turn.parts],
        peak_bytes=max(turn.peak_bytes for turn in turns),
    )


def products_per_token(a: Architecture) -> tuple[int, int]:
    """Count the multiply-adds that one token costs in the layers' weights, and in the output's."""
    queries, keys = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    mlp = 3 * a.hidden_size * a.ffn_size * max(a.experts_per_token, 1) + a.hidden_size * a.num_experts
    layer = a.hidden_size * (queries + 2 * keys) + queries * a.hidden_size + mlp
    return a.num_layers * layer, a.vocab_size * a.hidden_size


def floor_operations(student: Architecture, teacher: Architecture, *, prompt: float, response: float) -> float:
    """Count the floating-point operations of the products that a step cannot do without.

    Every prompt's tokens go through each model once and every response's once; the student's once more to be sampled,
    and its backward has two products per forward one. Attention, norms and everything else is left out.
    """
    of_student, of_teacher = products_per_token(student), products_per_token(teacher)
    forward = [layers * (prompt + response) + output * response for layers, output in (of_student, of_teacher)]
    return 2.0 * (forward[0] + forward[1] + 3 * forward[0])


def product_rate(seconds: float = 0.5) -> float:
    """Measure floating-point operations per processor second of this thread's fp32 products."""
    a, b = torch.randn(2, 768, 768)
    began, done = time.process_time(), 0
    while time.process_time() < began + seconds:
        a @ b
        done += 2 * 768**3
    return done / (time.process_time() - began)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The steps of every variant and the processor seconds that its products alone take, at the measured rate."""

    found: Mapping[str, Steps]
    floors: Mapping[str, float]
    rate: float  # floating-point operations per processor second


def compare(
    config: Path, overrides: Sequence[str], *, python: Path, rounds: int, steps: int, warmup: int
) -> Comparison:
    """Let the variants take turns.

    Raises:
        ConfigError: another method than TRL's is configured, there is no Python that has TRL, or a turn failed.
    """
    settings = load_config(config, [*overrides, *_QUIET])
    if settings.method.name != "rkl":
        raise ConfigError(f"method.name={settings.method.name}, but TRL learns the reverse KL. Add method.name=rkl.")
    if not python.exists():
        raise ConfigError(f"there is no {python}, the Python that has TRL. Say `make bench-trl`, or give --trl-python.")
    job = {
        "student": str(Path(settings.student.model).absolute()),
        "teacher": str(Path(settings.teacher.model).absolute()),
        "samples": settings.rollout.samples_per_prompt,
        "max_new_tokens": settings.rollout.max_new_tokens,
        "dtype": settings.dtype,
        "lr": settings.optimizer.lr,
        "weight_decay": settings.optimizer.weight_decay,
        "clip_grad": settings.optimizer.clip_grad,
    }
    turns: dict[str, list[Steps]] = {"ours, DP 2": [], "ours, TP 2": [], "TRL, DP 2": []}
    torch.set_num_threads(1)
    rates, prompt = [product_rate()], 0.0
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="tropd-against-") as folder:
            place = Path(folder)
            for name, size in (("ours, DP 2", 1), ("ours, TP 2", 2)):
                layout = [f"{model}.parallel.tensor={size}" for model in ("student", "teacher")]
                changes = [*overrides, *layout, *_QUIET, f"train.steps={steps + warmup}"]
                turns[name].append(_ours(config, changes, place / f"tp{size}", warmup=warmup))
            prompts = json.loads((place / "tp1" / "prompts.json").read_text())
            turns["TRL, DP 2"].append(_trl(job | {"prompts": prompts}, place / "trl", python=python, warmup=warmup))
            prompt = statistics.fmean(sum(map(len, batch)) for batch in prompts[warmup:])
        rates.append(product_rate())
    found = {name: joined(each) for name, each in turns.items()}
    models = [read_architecture(path) for path in (settings.student.model, settings.teacher.model)]
    rate = statistics.median(rates)
    floors = {
        name: floor_operations(*models, prompt=prompt, response=statistics.fmean(each.tokens)) / rate
        for name, each in found.items()
    }
    return Comparison(found=found, floors=floors, rate=rate)


def table_of(comparison: Comparison) -> Table:
    """Tabulate medians over steps; ``learn`` is what is neither rollout nor teacher."""
    columns = ("", "s", "rollout", "teacher", "learn", "tokens/s", "cpu s", "cpu ms/token", "floor, cpu s", "peak MiB")
    table = Table(title=f"medians of steps; products alone: {comparison.rate / 1e9:.0f} GFLOP/s", title_justify="left")
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for name, each in comparison.found.items():
        rollout, teacher = ([part.get(key, 0.0) for part in each.parts] for key in ("rollout", "teacher"))
        learn = [s - a - b for s, a, b in zip(each.seconds, rollout, teacher, strict=True)]
        figures = [statistics.median(x) for x in (each.seconds, rollout, teacher, learn)]
        table.add_row(
            name,
            *(f"{seconds:.3f}" for seconds in figures),
            f"{each.tokens_per_second:,.0f}",
            f"{statistics.median(each.processor_seconds):.3f}",
            f"{each.processor_milliseconds_per_token:.3f}",
            f"{comparison.floors[name]:.3f}",
            f"{each.peak_bytes / 2**20:,.0f}",
        )
    return table


def _ours(config: Path, changes: Sequence[str], place: Path, *, warmup: int) -> Steps:
    place.mkdir()
    run_dir = place / "run"
    module = ["-m", "megatron_tropd.benchmarks.marked_train", str(place), str(config), *changes, f"run_dir={run_dir}"]
    _launch(Path(sys.executable), module)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return steps_of(place, warmup=warmup, metrics=rows)


def _trl(job: Mapping[str, Any], place: Path, *, python: Path, warmup: int) -> Steps:
    place.mkdir()
    (place / "job.json").write_text(json.dumps(job))
    # not the folder of the script, where other benchmarks have the names of packages, nor this project's own path
    _launch(python, [str(_CHILD), str(place)], PYTHONSAFEPATH="1", PYTHONPATH="")
    return steps_of(place, warmup=warmup)


def _launch(python: Path, arguments: Sequence[str], **environment: str) -> None:
    command = [str(python), "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments]
    given = {"OMP_NUM_THREADS": "1", **os.environ, **environment}
    done = subprocess.run(command, env=given, stdin=subprocess.DEVNULL, check=False)
    if done.returncode:
        raise ConfigError(f"{' '.join(arguments[:2])} ended with status {done.returncode}; it said why above.")
