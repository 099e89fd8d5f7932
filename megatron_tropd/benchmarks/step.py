"""Where the time of a training step goes.

``python -m megatron_tropd.benchmarks.step`` trains a few steps of the demo on two ranks, or of ``--config FILE`` with
``key=value`` overrides, as ``tropd train`` would, and prints the mean of each part. ``--metrics RUN/metrics.jsonl``
reads the parts of a run that has been made instead, of whatever size. ``--against trl`` compares with TRL.

Overhead is what is neither sampling, scoring (by teacher or student), forward and backward, nor the optimizer: packing,
publishing weights, and all else. Evaluation and checkpoints lie outside a step and are off here.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from megatron_tropd.benchmarks.against import compare
from megatron_tropd.benchmarks.against import table_of as table_of_comparison
from megatron_tropd.errors import ConfigError, DataError

WORK = ("rollout", "student", "teacher", "forward and backward", "optimizer")
OVERHEAD = ("pack", "publish", "other")
_DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo" / "demo.yaml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Breakdown:
    """Mean seconds of a step and of its parts, which add up to it."""

    steps: int
    step: float
    parts: Mapping[str, float]
    tokens_per_second: float

    @property
    def overhead(self) -> float:
        """Return the share of the step outside its work."""
        return sum(self.parts[name] for name in OVERHEAD) / self.step


def breakdown(rows: Sequence[Mapping[str, float]], *, warmup: int) -> Breakdown:
    """Break down the lines of a ``metrics.jsonl``, without the first ``warmup``.

    Raises:
        DataError: no step is left to average.
    """
    steady = rows[warmup:]
    if not steady:
        raise DataError(f"{len(rows)} steps were measured and {warmup} are left out as warm-up. Measure more steps.")

    def mean(name: str) -> float:
        return statistics.fmean(float(row.get(f"time_{name}") or 0.0) for row in steady)

    optimizer = mean("optimizer")
    parts = {
        "rollout": mean("rollout"),
        "student": mean("student"),
        "teacher": mean("teacher"),
        "forward and backward": mean("train") - optimizer,
        "optimizer": optimizer,
        **{name: mean(name) for name in OVERHEAD},
    }
    seconds = mean("step")
    tokens = statistics.fmean(float(row["tokens"]) for row in steady)
    return Breakdown(steps=len(steady), step=seconds, parts=parts, tokens_per_second=tokens / seconds)


def measure(config: Path, overrides: Sequence[str], *, processes: int, steps: int) -> list[Mapping[str, float]]:
    """Train ``steps`` steps in processes of their own; return the lines that the run wrote."""
    with tempfile.TemporaryDirectory(prefix="tropd-step-") as folder:
        changes = [
            *overrides,
            *(f"run_dir={folder}/run", f"train.steps={steps}"),
            *("checkpoint.every=0", "checkpoint.resume=never", "evaluate.prompts=null"),
            *("export.hf=null", "report.html=false", "report.samples=0"),
        ]
        command = [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"),
            *("-m", "megatron_tropd", "train", str(config), *changes),
        ]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, check=False)
        if done.returncode:
            raise ConfigError(f"the training to be measured ended with status {done.returncode}; it said why above.")
        return read_rows(Path(folder) / "run" / "metrics.jsonl")


def read_rows(path: Path) -> list[Mapping[str, float]]:
    """Read the lines of a ``metrics.jsonl``."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table_of(found: Breakdown) -> Table:
    """Tabulate the parts, one line each."""
    table = Table(title=f"mean of {found.steps} steps, {found.tokens_per_second:,.0f} tokens/s", title_justify="left")
    for column in ("part", "s", "share"):
        table.add_column(column, justify="left" if column == "part" else "right")
    for name, seconds in found.parts.items():
        table.add_row(name, f"{seconds:.4f}", f"{seconds / found.step:.2%}", end_section=name in (WORK[-1], "other"))
    table.add_row("step", f"{found.step:.4f}", "100.00%")
    table.add_row("overhead (pack, publish, other)", f"{found.overhead * found.step:.4f}", f"{found.overhead:.2%}")
    return table


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as method.name=opd.")] = None,
    config: Annotated[Path | None, typer.Option(help="Configuration to train; the demo's by default.")] = None,
    metrics: Annotated[Path | None, typer.Option(help="Read this metrics.jsonl instead of training.")] = None,
    processes: Annotated[int, typer.Option(help="Ranks; tensor-parallel ones for the demo.", min=1)] = 2,
    steps: Annotated[int, typer.Option(help="Steps that count.", min=1)] = 8,
    warmup: Annotated[int, typer.Option(help="Steps before them that do not.", min=0)] = 2,
    json_path: Annotated[Path | None, typer.Option("--json", help="Also write the figures here.")] = None,
    against: Annotated[str, typer.Option(help="trl: beside TRL's trainer, in turns; method.name=rkl.")] = "",
    rounds: Annotated[int, typer.Option(help="Turns of each with --against.", min=1)] = 3,
    trl_python: Annotated[Path, typer.Option(help="The Python of `make bench-trl`.")] = Path(".venv-trl/bin/python"),
) -> None:
    """Print the breakdown of a mean training step."""
    if against:
        _check_comparison(against, metrics, processes)
        chosen = ["method.name=rkl", "rollout.samples_per_prompt=5", *(overrides or [])]
        own = chosen if config is None else overrides or []
        compared = compare(config or _DEMO, own, python=trl_python, rounds=rounds, steps=steps, warmup=warmup)
        Console(width=140).print(table_of_comparison(compared))
        if json_path is not None:
            json_path.write_text(json.dumps(asdict(compared), indent=2) + "\n")
        return
    if metrics is not None:
        rows = read_rows(metrics)
    else:
        layout = [] if config is not None else [f"{m}.parallel.tensor={processes}" for m in ("student", "teacher")]
        rows = measure(config or _DEMO, [*layout, *(overrides or [])], processes=processes, steps=warmup + steps)
    found = breakdown(rows, warmup=warmup)
    Console().print(table_of(found))
    if json_path is not None:
        json_path.write_text(json.dumps(asdict(found) | {"overhead": found.overhead}, indent=2) + "\n")


def _check_comparison(against: str, metrics: Path | None, processes: int) -> None:
    if against != "trl":
        raise ConfigError(f"--against={against}: only trl can be compared with.")
    if metrics is not None or processes != 2:
        raise ConfigError(f"--metrics={metrics}, --processes={processes}: --against trl trains, on 2. Leave them out.")


if __name__ == "__main__":
    typer.run(main)
