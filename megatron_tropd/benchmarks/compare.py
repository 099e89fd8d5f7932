"""Compare methods on the demo's two pairs of models: a student far from its teacher, and one near it.

``python -m megatron_tropd.benchmarks.compare`` trains every method on both pairs, one process each and two at a time,
and writes ``compare.md`` (a table per pair), ``compare.json`` (its rows) and ``compare.svg`` (accuracy over steps, a
panel per pair) to ``--out``. Started again it resumes: a finished arm is not trained again, and a killed one continues
from its checkpoint. ``--only direct:opd`` and the like train a part of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer

from megatron_tropd.commands.demo import STUDENTS
from megatron_tropd.config.loading import read_overrides
from megatron_tropd.errors import ConfigError, DataError
from megatron_tropd.methods import PRESETS, build_method
from megatron_tropd.report.records import AFTER, BEFORE, TEACHER, Evaluation, read_evaluations
from megatron_tropd.report.sinks import read_jsonl
from megatron_tropd.storage.write_aside import make_directory, write_aside

METHODS = (
    *("opd", "rkl", "gkd", "eopd", "aopd", "reopold", "local_support"),
    *("tropd_mask", "tropd_clip", "tropd", "tropd_rkl", "tropd_resopd"),
)
WINDOW = 5  # steps of the running mean: 320 responses at the demo's sizes
_EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
_TITLES = {"direct": "far: answers off the top of its head", "mistaken": "near: wrong beliefs"}
# lines are told from one another by dash and color; the hue says whether outliers learn what the teacher would write
_BLUES = ("#0b4f8a", "#1d86d6", "#12806a", "#5b3fa8", "#3aa6a0", "#7a8cf0")
_REDS = ("#b3261e", "#d9730d", "#8a5a00", "#c2185b", "#7d6b5d", "#e0a100", "#9c4a8b")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1.2)), (0, (7, 1.5, 1.5, 1.5)), (0, (3, 1)), (0, (9, 2)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A method on a pair, and all that its run is told; without a method: the models as they come, evaluated."""

    pair: str
    method: str
    changes: tuple[str, ...]

    @property
    def name(self) -> str:
        """Return the name of its folder."""
        return f"{self.pair}-{self.method or 'models'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmOutcome:
    """The course and the end of an arm. Accuracies are fractions; suites keep the order of the evaluation."""

    arm: Arm
    step: Sequence[int]
    accuracy: Sequence[float]  # of each step's own responses, T=1
    final: Mapping[str, tuple[float, float, float]]  # by suite: accuracy and its 95 % interval
    length: float  # tokens of a response of the last suite, at the end
    stuck: Sequence[float]  # stuck_fraction at the first and the last step, nan where there was no outlier
    seconds: float  # of its process, evaluation included


def arms_of(pairs: Sequence[str], methods: Sequence[str], overrides: Sequence[str], *, steps: int) -> list[Arm]:
    """List the arms, pair by pair, the models themselves first.

    Raises:
        ConfigError: no such pair or method.
    """
    for given, known, what in ((pairs, STUDENTS, "pair"), (methods, PRESETS, "method")):
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ConfigError(f"unknown {what} {', '.join(unknown)}: use some of {', '.join(known)}.")
    training = (
        *(f"train.steps={steps}", "evaluate.before=false", "evaluate.teacher=false"),
        *("report.samples=0", "report.html=false", "export.hf=null"),
    )
    arms = []
    for pair in pairs:
        shared = (
            "student.parallel.tensor=1",
            "teacher.parallel.tensor=1",
            f"student.model=examples/demo/{STUDENTS[pair]}",
        )
        arms.append(Arm(pair=pair, method="", changes=(*shared, *overrides)))
        for method in methods:
            preset = read_overrides(_EXAMPLES / "methods" / f"{method}.yaml")
            arms.append(Arm(pair=pair, method=method, changes=(*preset, *shared, *training, *overrides)))
    return arms


def run_arm(arm: Arm, out: Path) -> bool:
    """Run an arm in a process of its own, unless it is finished; say whether it was run now.

    Raises:
        ConfigError: its folder holds a run of other settings, or the run ended with an error, which its log says.
    """
    mark = out / arm.name / "arm.json"
    if mark.exists():
        if json.loads(mark.read_text(encoding="utf-8"))["changes"] != list(arm.changes):
            raise ConfigError(f"{mark.parent} holds a finished run of other settings. Give another --out.")
        return False
    log = out / f"{arm.name}.log"
    verb = "train" if arm.method else "evaluate"
    command = [sys.executable, "-m", "megatron_tropd", verb, str(_EXAMPLES / "demo" / "demo.yaml")]
    started = time.monotonic()
    with log.open("ab") as file:
        done = subprocess.run(
            [*command, *arm.changes, f"run_dir={(out / arm.name).resolve()}"],
            cwd=_EXAMPLES.parent,  # where the demo's paths start
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        raise ConfigError(f"{arm.name} ended with status {done.returncode}: {log} says why.")
    seconds = time.monotonic() - started
    write_aside(mark, json.dumps({"changes": arm.changes, "seconds": seconds}) + "\n")
    return True


def outcome_of(arm: Arm, out: Path) -> ArmOutcome:
    """Read what a finished arm has left.

    Raises:
        DataError: it left no metrics, or no evaluation.
    """
    folder = out / arm.name
    rows, _ = read_jsonl(folder / "metrics.jsonl")
    after = [e for e in read_evaluations(folder) if e.model == AFTER]
    if not rows or not after:
        raise DataError(f"{folder} has {len(rows)} steps and {len(after)} evaluations: move it away and start again.")
    stuck = [rows[place].get("stuck_fraction") for place in (0, -1)]
    return ArmOutcome(
        arm=arm,
        step=[int(row["step"]) for row in rows],
        accuracy=[float(row["accuracy_train"]) for row in rows],
        final={e.suite: (e.accuracy, e.low, e.high) for e in after},
        length=after[-1].mean_length,
        stuck=[float("nan") if value is None else float(value) for value in stuck],
        seconds=json.loads((folder / "arm.json").read_text(encoding="utf-8"))["seconds"],
    )


def running_mean(values: Sequence[float], window: int = WINDOW) -> npt.NDArray[np.float64]:
    """Average each value with those around it, ``window`` in all, fewer at the ends."""
    half = window // 2
    return np.array([np.mean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))])


def steps_to(outcome: ArmOutcome, accuracy: float) -> int | None:
    """Return the first step at which the running mean of the accuracy is ``accuracy``; None: it never is."""
    reached = np.flatnonzero(running_mean(outcome.accuracy) >= accuracy)
    return outcome.step[int(reached[0])] if len(reached) else None


def table_of(outcomes: Sequence[ArmOutcome], references: Sequence[Evaluation]) -> str:
    """Tabulate the arms of one pair in Markdown: percent with 95 % intervals, best last suite first.

    ``references``: the student before and the teacher. Half and nine tenths are of the way from the one to the other,
    by the running mean of the accuracy of each step's own responses.
    """
    suites = list(outcomes[0].final)
    start, goal = (
        next(e.accuracy for e in references if e.model == model and e.suite == suites[-1])
        for model in (BEFORE, TEACHER)
    )
    rows = [f"| | {' | '.join(suites)} | steps to half | to 0.9 | tokens | stuck, first / last step | s |"]
    rows.append("|---" * (len(suites) + 6) + "|")
    for model in (BEFORE, TEACHER):
        cells = [_cell(e.accuracy, e.low, e.high) for e in references if e.model == model]
        length = next(e.mean_length for e in references if e.model == model and e.suite == suites[-1])
        rows.append(f"| {model} | {' | '.join(cells)} | - | - | {length:.0f} | - | - |")
    for one in sorted(outcomes, key=lambda one: -one.final[suites[-1]][0]):
        reached = (steps_to(one, start + share * (goal - start)) for share in (0.5, 0.9))
        cells = [
            *(_cell(*one.final[suite]) for suite in suites),
            *("-" if step is None else str(step) for step in reached),
            f"{one.length:.0f}",
            " / ".join("-" if np.isnan(share) else f"{share:.0%}" for share in one.stuck),
            f"{one.seconds:.0f}",
        ]
        rows.append(f"| `{one.arm.method}` | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def _cell(accuracy: float, low: float, high: float) -> str:
    return f"{100 * accuracy:.1f} [{100 * low:.1f}, {100 * high:.1f}]"


def draw(outcomes: Mapping[str, Sequence[ArmOutcome]], path: Path) -> None:
    """Draw the accuracy over steps, a panel per pair, in the format that ``path`` ends in."""
    import matplotlib
    from matplotlib.figure import Figure

    # one below the other: narrow enough to be read on a phone
    figure = Figure(figsize=(4.8, 2.5 * len(outcomes) + 0.9), layout="constrained", facecolor="white")
    panels = figure.subplots(len(outcomes), 1, squeeze=False)[:, 0]
    methods = list(dict.fromkeys(one.arm.method for several in outcomes.values() for one in several))
    styles = _styles(methods)
    for axes, (pair, several) in zip(panels, outcomes.items(), strict=True):
        for one in several:
            color, dashes = styles[one.arm.method]
            axes.plot(one.step, 100 * running_mean(one.accuracy), color=color, ls=dashes, lw=1.7, label=one.arm.method)
        axes.set_title(_TITLES.get(pair, pair), loc="left", fontsize=10)
        axes.set(xlabel="step", ylabel="accuracy at T=1, %", ylim=(-2, 102))
        axes.set_xlim(1, max(one.step[-1] for one in several))
        axes.grid(axis="y", color="#dddddd", lw=0.7)
        axes.spines[["top", "right"]].set_visible(False)
    lines = {label: line for axes in panels for line, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        [lines[name] for name in methods],
        methods,
        loc="outside lower center",
        ncols=min(4, len(methods)),
        frameon=False,
        fontsize=9.5,
        handlelength=2.6,
    )
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "compare"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)


def _styles(methods: Sequence[str]) -> dict[str, tuple[str, Any]]:
    """Give each method a color, blue to green where outliers learn what the teacher would write, and a dash."""
    count = {True: 0, False: 0}
    styles = {}
    for method in methods:
        moves = build_method(method).teaches_certain_students
        colors = _BLUES if moves else _REDS
        styles[method] = (colors[count[moves] % len(colors)], _DASHES[count[moves] % len(_DASHES)])
        count[moves] += 1
    return styles


def main(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, such as optimizer.lr=1e-3.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the runs and of what is made of them.")] = Path("runs/compare"),
    pairs: Annotated[str, typer.Option(help="Students of the demo.")] = ",".join(STUDENTS),
    methods: Annotated[str, typer.Option(help="Presets.")] = ",".join(METHODS),
    only: Annotated[str, typer.Option(help="Train these alone, such as direct:opd,mistaken:tropd.")] = "",
    steps: Annotated[int, typer.Option(help="Steps of every arm.", min=1)] = 80,
    jobs: Annotated[int, typer.Option(help="Arms at a time, a core each.", min=1)] = 2,
) -> None:
    """Train the arms and write the table and the picture."""
    arms = arms_of(pairs.split(","), methods.split(","), overrides or [], steps=steps)
    if only:
        arms = part_of(arms, only.split(","))
    make_directory(out)
    started = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool:
        for arm, ran in zip(arms, pool.map(lambda arm: run_arm(arm, out), arms), strict=True):
            print(f"{arm.name}: {'done' if ran else 'done before'} ({time.monotonic() - started:.0f} s)", flush=True)
    write_comparison(arms, out)


def part_of(arms: Sequence[Arm], wanted: Sequence[str]) -> list[Arm]:
    """Return the arms named ``PAIR:METHOD``, and the models of their pairs.

    Raises:
        ConfigError: there is no such arm.
    """
    known = {f"{arm.pair}:{arm.method}" for arm in arms if arm.method}
    missing = [name for name in wanted if name not in known]
    if missing:
        raise ConfigError(f"--only names {', '.join(missing)}, which --pairs and --methods do not give.")
    pairs = {name.split(":")[0] for name in wanted}
    return [arm for arm in arms if f"{arm.pair}:{arm.method}" in wanted or (not arm.method and arm.pair in pairs)]


def write_comparison(arms: Sequence[Arm], out: Path) -> None:
    """Write table, rows and picture of finished arms."""
    outcomes: dict[str, list[ArmOutcome]] = {}
    for arm in arms:
        if arm.method:
            outcomes.setdefault(arm.pair, []).append(outcome_of(arm, out))
    tables = []
    for pair, several in outcomes.items():
        references = read_evaluations(out / f"{pair}-models")
        tables.append(f"## {_TITLES.get(pair, pair)}\n\n{table_of(several, references)}")
    write_aside(out / "compare.md", "\n".join(tables))
    rows = [asdict(one) for several in outcomes.values() for one in several]
    write_aside(out / "compare.json", json.dumps(rows, indent=1) + "\n")
    draw(outcomes, out / "compare.svg")
    print("\n".join(tables))
    print(f"{out / 'compare.md'}, {out / 'compare.json'}, {out / 'compare.svg'}")


if __name__ == "__main__":
    typer.run(main)
