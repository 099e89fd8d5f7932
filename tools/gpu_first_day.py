"""The first half hour on a GPU: everything that only one can show, in the order in which it should be looked at.

    python tools/gpu_first_day.py                 # runs what this machine's GPUs allow; without one says what it would
    python tools/gpu_first_day.py --dry-run       # says it anyway
    python tools/gpu_first_day.py --only loss

Each step is a process of its own with a time limit: one that fails or hangs does not stop the others.
``OUT/report.json`` has every figure, ``OUT/NAME.log`` what a step printed; the table compares with the budgets
(docs/benchmarks.md).
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
DEMO = ("examples/demo/demo.yaml", "evaluate.prompts=null", "report.samples=0", "report.html=false")
# four steps of the demo in bf16 on a CPU, student and teacher at tensor 1: loss and gradient norm of each
DEMO_BF16 = ("dtype=bf16", "train.prompts_per_step=4", "optimizer.schedule=constant")
CPU_FIRST_STEP = {"loss": 0.01009, "grad_norm": 0.1802}
SHAPE = ("--tokens=16384", "--hidden=4096", "--vocab=151936", "--dtype=bf16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """One figure beside its budget; no budget: it is only reported."""

    what: str
    value: float
    budget: float = math.nan
    at_most: bool = True

    @property
    def kept(self) -> bool | None:
        """Return None where there is nothing to keep."""
        if math.isnan(self.budget):
            return None
        return self.value <= self.budget if self.at_most else self.value >= self.budget


Judge = Callable[[Path, str], list[Verdict]]  # from the figures' directory and the step's name


def nothing(out: Path, name: str) -> list[Verdict]:
    """Report no figures: a step that ends well has shown what it is for."""
    return []


@dataclass(frozen=True, slots=True, kw_only=True)
class FirstDayStep:
    """One process of the day. ``{out}`` in its arguments is the directory of the figures."""

    name: str
    why: str
    argv: Sequence[str]
    gpus: int = 1
    limit_s: float = 300.0
    environment: Mapping[str, str] = field(default_factory=dict)
    judge: Judge = nothing


def judge_loss(out: Path, name: str) -> list[Verdict]:
    """Compare the fused loss with its products, the plain loss, and Liger's where it is installed."""
    rows = {row["name"]: row for row in json.loads((out / f"{name}.json").read_text())["results"]}
    fused, plain, floor = rows["fused"], rows["plain"], rows["products"]
    found = [
        Verdict(what="fused / products, time", value=fused["seconds"] / floor["seconds"], budget=1.25),
        Verdict(what="fused / plain, extra memory", value=fused["extra_bytes"] / plain["extra_bytes"], budget=0.05),
        Verdict(what="plain / fused, time", value=plain["seconds"] / fused["seconds"], budget=2.0, at_most=False),
    ]
    if "liger" in rows:
        liger = rows["liger"]["seconds"] / fused["seconds"]
        found.append(Verdict(what="Liger / fused, time", value=liger, budget=1.0, at_most=False))
    return found


def judge_figures(out: Path, name: str) -> list[Verdict]:
    """Report a probe's figures: nothing may wait for the host within a pass, and publishing runs at memory's rate."""
    (values,) = json.loads((out / f"{name}.json").read_text())["figures"].values()
    found = [_budgeted(what, value) for what, value in values.items()]
    if name == "probe-copies":
        share = values["device to a file in memory, GB/s"] / values["device to host, GB/s"]
        found.append(Verdict(what="publishing / copying", value=share, budget=0.7, at_most=False))
    return found


def _budgeted(what: str, value: float) -> Verdict:
    return Verdict(what=what, value=value, budget=0.0 if what == "waits for the host" else math.nan)


def judge_demo(out: Path, name: str) -> list[Verdict]:
    """Compare the first step in bf16 with a CPU's: rounding moves it by percents, a wrong kernel by more."""
    first = json.loads((out / "demo-bf16" / "metrics.jsonl").read_text().splitlines()[0])
    return [
        Verdict(what=f"first step's {name}, off a CPU's by", value=abs(first[name] / expected - 1), budget=0.1)
        for name, expected in CPU_FIRST_STEP.items()
    ]


def _train(name: str, *changes: str, ranks: int = 1, resumed: bool = False) -> tuple[str, ...]:
    """Write the command of a run of the demo, or of one that goes on from its second step's checkpoint."""
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}")
    start = f"{{out}}/{name}/checkpoints/step-00000002" if resumed else "never"
    places = (f"run_dir={{out}}/{name}{'-resumed' * resumed}", f"checkpoint.resume={start}", "checkpoint.keep=9")
    every = ("checkpoint.every=1", "train.steps=4", "optimizer.warmup_steps=1", "device=cuda")
    return (*launcher, "-m", "megatron_tropd", "train", *DEMO, *places, *every, *changes)


def _layout(student: str, teacher: str = "") -> tuple[str, ...]:
    parts = [f"student.parallel.{part}" for part in student.split()]
    return (*parts, *(f"teacher.parallel.{part}" for part in (teacher or student).split()))


ONE = ("student.parallel.tensor=1", "teacher.parallel.tensor=1")


def steps() -> list[FirstDayStep]:
    """List the day's steps in their order."""
    loss = ("-m", "megatron_tropd.benchmarks.loss", *SHAPE)
    probe = ("-m", "megatron_tropd.benchmarks.device")
    kernels = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit/losses/test_triton_kernels.py")
    on_gpu = {"MEGATRON_TROPD_TEST_GPU": "1"}
    found = [
        FirstDayStep(
            name="health", why="devices, versions, sums, the trainer's imports", argv=("-m", "megatron_tropd", "health")
        ),
        FirstDayStep(name="kernels", why="the kernels, compiled", argv=kernels, environment=on_gpu, limit_s=600.0),
    ]
    found += [
        FirstDayStep(
            name=f"probe-{name}",
            why=why,
            argv=(*probe, name, "--json", f"{{out}}/probe-{name}.json"),
            judge=judge_figures,
        )
        for name, why in (
            ("products", "rates of the loss's products"),
            ("top_k", "the search for candidates beside its product"),
            ("copies", "rates of memory, and of publishing through files"),
            ("layers", "layers of an 8B: rate, waits for the host by line, decoding"),
        )
    ]
    found += [
        FirstDayStep(name="loss", why="the fused loss", argv=(*loss, "--json", "{out}/loss.json"), judge=judge_loss),
        FirstDayStep(
            name="loss-entropy",
            why="the same with the entropy's gradient",
            argv=(*loss, "--entropy", "--json", "{out}/loss-entropy.json"),
            judge=judge_loss,
        ),
        FirstDayStep(name="demo-fp32", why="the demo in fp32", argv=_train("demo-fp32", *ONE, "dtype=fp32")),
        FirstDayStep(
            name="demo-bf16",
            why="the demo in bf16, beside a CPU's",
            argv=_train("demo-bf16", *ONE, *DEMO_BF16),
            judge=judge_demo,
        ),
        FirstDayStep(
            name="resumed",
            why="going on from that checkpoint",
            argv=_train("demo-fp32", *ONE, "dtype=fp32", resumed=True),
        ),
        FirstDayStep(
            name="offloads",
            why="both offloads",
            argv=_train("offloads", *ONE, "teacher.offload=true", "optimizer.offload=true"),
        ),
        FirstDayStep(
            name="racecheck",
            why="races in the kernels (compute-sanitizer)",
            argv=("compute-sanitizer", "--tool=racecheck", "--error-exitcode=3", sys.executable, *kernels),
            environment=on_gpu,
            limit_s=900.0,
        ),
    ]
    several: tuple[tuple[str, str, int, tuple[str, ...]], ...] = (
        ("tp1-tp2", "a teacher that is cut otherwise: some ranks have no message", 2, _layout("tensor=1", "tensor=2")),
        ("pp2", "a pipeline", 2, _layout("pipeline=2 tensor=1")),
        ("cp2", "context parallelism", 2, _layout("context=2 tensor=1")),
        ("distributed", "a distributed optimizer's checkpoint", 2, (*ONE, "optimizer.distributed=true")),
        ("tp2-sp", "tensor and sequence parallelism", 2, _layout("tensor=2 sequence=true")),
    )
    for name, why, ranks, changes in several:
        for part in ("", "resumed"):
            argv = _train(name, *changes, "dtype=bf16", ranks=ranks, resumed=bool(part))
            names = {"name": "-".join(filter(None, (name, part))), "why": ", ".join(filter(None, (why, part)))}
            found.append(FirstDayStep(**names, argv=argv, gpus=ranks))
    return found


def run_step(step: FirstDayStep, out: Path) -> dict[str, Any]:
    """Run one step; say how it ended, and what its figures are."""
    argv = [part.format(out=out) for part in step.argv]
    argv = argv if argv[0] == "compute-sanitizer" else [sys.executable, *argv]
    log, started = out / f"{step.name}.log", time.monotonic()
    with log.open("w") as file:
        try:
            process = subprocess.Popen(
                argv,
                cwd=ROOT,
                env={"OMP_NUM_THREADS": "8", **os.environ, **step.environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except FileNotFoundError:
            return {"name": step.name, "ended": f"{argv[0]} is not here", "seconds": 0.0, "figures": []}
        ended = _wait(process, step.limit_s)
    figures = _judged(step, out) if ended == "well" else []
    return {"name": step.name, "ended": ended, "seconds": time.monotonic() - started, "figures": figures}


def _wait(process: subprocess.Popen[bytes], limit_s: float) -> str:
    try:
        status = process.wait(timeout=limit_s)
        return "well" if status == 0 else f"with status {status}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"not within {limit_s:g} s"


def _judged(step: FirstDayStep, out: Path) -> list[dict[str, Any]]:
    try:
        return [asdict(verdict) | {"kept": verdict.kept} for verdict in step.judge(out, step.name)]
    except (OSError, ValueError, KeyError, IndexError) as error:
        return [{"what": f"figures cannot be read: {error!r}", "value": math.nan, "budget": math.nan, "kept": False}]


def count_gpus() -> int:
    """Return how many GPUs torch sees."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def plan_table(found: Sequence[FirstDayStep], gpus: int) -> Table:
    """Tabulate what would be run, and what there are too few GPUs for."""
    table = Table(title=f"{gpus} GPU(s)", title_justify="left", box=None)
    for column in ("step", "what it shows", "GPUs", "at most"):
        table.add_column(column)
    for step in found:
        table.add_row(step.name, step.why, str(step.gpus), f"{step.limit_s / 60:g} min")
    return table


def _limit(figure: Mapping[str, Any]) -> str:
    sign = "<=" if figure.get("at_most", True) else ">="
    return "" if math.isnan(figure["budget"]) else f"{sign} {figure['budget']:g}"


def result_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Tabulate how every step ended, and its figures beside their budgets."""
    table = Table(title="The first day", title_justify="left", box=None)
    for column in ("step", "ended, or figure", "value", "budget", ""):
        table.add_column(column)
    for row in rows:
        table.add_row(
            row["name"], row["ended"], f"{row['seconds']:.0f} s", "", "" if row["ended"] == "well" else "LOOK"
        )
        for figure in row["figures"]:
            limit = (
                ""
                if math.isnan(figure["budget"])
                else f"{'<=' if figure.get('at_most', True) else '>='} {figure['budget']:g}"
            )
            table.add_row(
                "", figure["what"], f"{figure['value']:.3g}", limit, "LOOK" if figure["kept"] is False else ""
            )
    return table


def main(
    out: Annotated[Path, typer.Option(help="Directory for figures and logs.")] = Path("runs/gpu_first_day"),
    only: Annotated[list[str] | None, typer.Option(help="A step's name; may be given often.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be run, and stop.")] = False,
) -> None:
    """Run the day, or say what it would be."""
    gpus, console = count_gpus(), Console(width=160)
    chosen = [step for step in steps() if not only or step.name in only]
    if unknown := set(only or ()) - {step.name for step in chosen}:
        raise typer.BadParameter(f"{', '.join(sorted(unknown))}: no such step")
    if dry_run or not gpus:
        console.print(plan_table(chosen, gpus))
        console.print("Nothing was run." if dry_run else "No GPU here: nothing was run, and nothing is claimed.")
        return
    out = out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for step in chosen:
        if step.gpus > gpus:
            rows.append({"name": step.name, "ended": f"not run: {step.gpus} GPUs", "seconds": 0.0, "figures": []})
            continue
        console.print(f"{step.name}: {step.why}")
        rows.append(run_step(step, out))
        (out / "report.json").write_text(json.dumps({"gpus": gpus, "steps": rows}, indent=2))
    console.print(result_table(rows))
    if any(row["ended"] != "well" and row["seconds"] for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
