"""``RUN/report.html``: one page on the course of a run, from the files the run left. No network, no scripts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from megatron_tropd.errors import DataError
from megatron_tropd.report.charts import SERIES, FloatArray, Series, legend, line_chart, stacked_chart
from megatron_tropd.report.metrics import METRICS, STEP_PARTS, of_source
from megatron_tropd.report.records import (
    AFTER,
    BEFORE,
    DURING,
    TEACHER,
    Evaluation,
    Sample,
    distance_closed,
    read_evaluations,
    read_samples,
)
from megatron_tropd.report.sinks import read_jsonl
from megatron_tropd.storage.write_aside import remove_partials, write_aside

Rows = Sequence[Mapping[str, Any]]
Point = tuple[float, float, float, float]  # step, value, and its interval
_MOST_TOKENS = 1500  # shown of one answer
_NOT_NOISY = {"lr", "prefix_fraction"}
# what a model or a file says may hold characters that do something elsewhere: the page shows their escapes
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A titled picture with a line that says what it shows."""

    title: str
    unit: str
    note: str
    svg: Markup
    legend: Markup


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShare:
    """One part of the mean step."""

    name: str
    seconds: float
    fraction: float
    hue: int


# title, metrics, percent?
CURVES: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("Loss", ("loss",), False),
    ("Reverse KL", ("reverse_kl",), False),
    ("Outlier fraction", ("outlier_fraction",), True),
    ("Outliers the student is certain of", ("stuck_fraction",), True),
    ("Entropy", ("student_entropy", "teacher_entropy", "teacher_entropy_bound"), False),
    ("Gradient norm", ("grad_norm",), False),
    ("Response length", ("response_length",), False),
)
HEALTH: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("Learning rate", ("lr",), False),
    ("Sampler against trainer", ("logprob_gap_mean",), False),
    ("Throughput", ("tokens_per_second",), False),
)
_GUIDANCE: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("Prefix length", ("prefix_length",), False),
    ("Share of the response given", ("prefix_fraction",), True),
    ("Negative log-likelihood of the prefix", ("prefix_nll",), False),
)


def write_report(run_dir: str | Path, *, refresh_s: int | None = None) -> Path:
    """Write ``RUN/report.html`` and return its path. A file that is missing gives a section that says so.

    Args:
        refresh_s: seconds after which a browser loads the page again; None: it does not.

    Raises:
        DataError: ``run_dir`` does not exist, or a file in it cannot be read.
    """
    run_dir = existing_run(run_dir)
    remove_partials(run_dir)
    return write_aside(
        run_dir / "report.html", rendered("template.html.j2", _context(run_dir) | {"refresh": refresh_s})
    )


def existing_run(run_dir: str | Path) -> Path:
    """Return the directory of a run; DataError when there is none."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise DataError(f"there is no run directory {run_dir} ({run_dir.absolute()}). Give the run_dir of a run.")
    return run_dir


def rendered(template: str, context: Mapping[str, Any]) -> str:
    """Fill in a page's template; whatever it quotes is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,  # answers and prompts are whatever a model or a data file says
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(context).translate(_CONTROLS)


def _context(run_dir: Path) -> dict[str, Any]:
    rows, torn = metrics_of(run_dir)
    evaluations = read_evaluations(run_dir)
    config_text = config_text_of(run_dir)
    breakdown = _step_parts(rows)
    return {
        "run_name": run_dir.absolute().name,
        "facts": _facts(config_text, rows),
        "steps": len(rows),
        "torn": torn,
        "suites": _suites(evaluations),
        "models": [m for m in (BEFORE, AFTER, TEACHER) if any(e.model == m for e in evaluations)],
        "results": {(e.model, e.suite): e for e in evaluations if e.model != DURING},
        "closed": {suite: distance_closed(evaluations, suite) for suite in _suites(evaluations)},
        "accuracy": [*_accuracy_charts(evaluations, rows), *_charts(rows, _accuracy_curves(rows))],
        "curves": _charts(rows, CURVES),
        "health": _charts(rows, [*HEALTH, *_gap_curves(rows)]),
        "guidance": _charts(rows, _GUIDANCE),
        "shares": _shares(breakdown),
        "step_seconds": sum(float(np.mean(seconds)) for seconds in breakdown.values()),
        "hidden_seconds": _mean(rows, "time_rollout_hidden"),
        "time_chart": _time_chart(rows, breakdown),
        "pairs": _pairs(read_samples(run_dir)),
        "most_tokens": _MOST_TOKENS,
        "config": config_text,
    }


# --------------------------------------------------------------------------- reading


def metrics_of(run_dir: Path) -> tuple[Rows, bool]:
    """Read the metrics of a run, and whether a torn last line was left out."""
    path = run_dir / "metrics.jsonl"
    return read_jsonl(path) if path.exists() else ([], False)


def config_text_of(run_dir: Path) -> str | None:
    """Read ``config.yaml`` of a run; None where there is none."""
    path = run_dir / "config.yaml"
    return path.read_text(encoding="utf-8") if path.exists() else None


def _facts(config_text: str | None, rows: Rows) -> list[tuple[str, str]]:
    """Name and value of what a reader wants to know first."""
    config = parsed_config(config_text)
    if config is None:
        return []
    facts = [
        ("Method", _at(config, "method", "name")),
        ("Student", _last_part(_at(config, "student", "model"))),
        ("Teacher", _last_part(_at(config, "teacher", "model"))),
        ("Steps", f"{len(rows)} of {_at(config, 'train', 'steps')}"),
        ("Learning rate", _at(config, "optimizer", "lr")),
        ("Rows per token", _percent(_mean(rows, "rows_fraction"))),
        ("Seed", _at(config, "seed")),
    ]
    return [(name, str(value)) for name, value in facts if value is not None]


def parsed_config(text: str | None) -> Any:
    """Read a run's ``config.yaml``; None where there is none."""
    if text is None:
        return None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise DataError(f"config.yaml of the run is not valid YAML: {error}. Restore or delete it.") from None


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.0%}"


def _at(tree: Any, *keys: str) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _last_part(path: Any) -> str | None:
    return None if path is None else Path(str(path)).name


def column_of(rows: Rows, name: str) -> FloatArray:
    """Return the values over the rows, NaN where a row has none."""
    values = (row.get(name) for row in rows)
    return np.array([np.nan if value is None else float(value) for value in values], dtype=np.float64)


# --------------------------------------------------------------------------- charts


def _charts(rows: Rows, wanted: Sequence[tuple[str, tuple[str, ...], bool]]) -> list[Chart]:
    """Draw those of the wanted charts for which there is anything to draw."""
    step, charts = column_of(rows, "step"), []
    for title, names, percent in wanted:
        there = {name: column for name in names if np.isfinite(column := column_of(rows, name)).any()}
        if not there:
            continue
        series = [
            Series(label=_label(name), step=step, value=column, smooth=name not in _NOT_NOISY)
            for name, column in there.items()
        ]
        svg = line_chart(series, alt=f"{title} over training steps", percent=percent)
        note = " ".join(dict.fromkeys(METRICS[name.split("/")[0]].meaning for name in there))
        unit = "" if percent else METRICS[names[0].split("/")[0]].unit
        charts.append(Chart(title=title, unit=unit, note=note, svg=svg, legend=legend([s.label for s in series])))
    return charts


def _accuracy_curves(rows: Rows) -> list[tuple[str, tuple[str, ...], bool]]:
    """Draw the accuracy of the step's own responses, and the same by data source where there are several."""
    name = "accuracy_train"
    sources = sorted({key for row in rows for key in row if key.startswith(of_source(name, ""))})
    curves: list[tuple[str, tuple[str, ...], bool]] = [("Accuracy while training", (name,), True)]
    return [*curves, ("The same by source", tuple(sources), True)] if sources else curves


def _gap_curves(rows: Rows) -> list[tuple[str, tuple[str, ...], bool]]:
    """Draw the gap between sampler and trainer by position in the sequence, where sequences are long enough for
    several.
    """
    start = of_source("logprob_gap_mean", "")
    names = sorted(
        {key for row in rows for key in row if key.startswith(start)},
        key=lambda name: int(re.findall(r"\d+", name)[0]),
    )
    return [("Sampler against trainer, by position", tuple(names), False)] if len(names) > 1 else []


def _label(name: str) -> str:
    if "/" in name:  # a curve of one data source
        return name.split("/", 1)[1]
    return name.replace("_entropy", "").replace("_", " ")


def _accuracy_charts(evaluations: Sequence[Evaluation], rows: Rows) -> list[Chart]:
    """Draw the student's accuracy over steps, when it was evaluated in between, and pass@k where requested."""
    if not any(evaluation.model == DURING for evaluation in evaluations):
        return []
    student = [evaluation for evaluation in evaluations if evaluation.model != TEACHER]
    student.sort(key=lambda evaluation: _step_of(evaluation, len(rows)))
    accuracy: dict[str, list[Point]] = {}
    solved: dict[str, list[Point]] = {}
    for one in student:
        step = _step_of(one, len(rows))
        accuracy.setdefault(one.suite, []).append((step, one.accuracy, one.low, one.high))
        for k, (mean, low, high) in one.pass_at.items():
            solved.setdefault(f"{one.suite}: pass@{k}", []).append((step, mean, low, high))
    charts = [_points_chart("Accuracy over steps", accuracy)]
    # a chart of one curve has no legend: its title names it
    title = f"{next(iter(solved))} over steps" if len(solved) == 1 else "pass@k over steps"
    return [*charts, _points_chart(title, solved)] if solved else charts


def _points_chart(title: str, points: Mapping[str, Sequence[Point]]) -> Chart:
    series = []
    for label, found in points.items():
        step, value, low, high = np.array(found, dtype=np.float64).T
        series.append(Series(label=label, step=step, value=value, low=low, high=high, smooth=False))
    svg = line_chart(series, alt=f"{title}, on held-out problems", percent=True)
    note = "Student on held-out problems, with 95 % intervals."
    return Chart(title=title, unit="", note=note, svg=svg, legend=legend(list(points)))


def _step_of(evaluation: Evaluation, steps: int) -> int:
    if evaluation.step is not None:
        return evaluation.step
    return 0 if evaluation.model == BEFORE else steps


def _suites(evaluations: Sequence[Evaluation]) -> list[str]:
    return list(dict.fromkeys(evaluation.suite for evaluation in evaluations))


# --------------------------------------------------------------------------- step time


def _step_parts(rows: Rows) -> dict[str, FloatArray]:
    """Return the seconds per step of every part that was measured; what is left of ``time_step`` goes to ``other``."""
    columns = {part: column_of(rows, f"time_{part}") for part in STEP_PARTS}
    parts = {part: np.nan_to_num(column) for part, column in columns.items() if np.isfinite(column).any()}
    whole = column_of(rows, "time_step")
    if parts and "other" not in parts and np.isfinite(whole).any():
        parts["other"] = np.nan_to_num(np.maximum(whole - sum(parts.values()), 0.0))
    return parts


def _mean(rows: Rows, name: str) -> float | None:
    """Return the mean of the steps that have the metric; None when none has."""
    column = column_of(rows, name)
    return float(np.nanmean(column)) if np.isfinite(column).any() else None


def _shares(parts: Mapping[str, FloatArray]) -> list[StepShare]:
    total = sum(float(np.mean(seconds)) for seconds in parts.values())
    return [
        StepShare(
            name=name,
            seconds=float(np.mean(seconds)),
            fraction=float(np.mean(seconds)) / total,
            hue=i % len(SERIES) + 1,
        )
        for i, (name, seconds) in enumerate(parts.items())
        if total > 0
    ]


def _time_chart(rows: Rows, parts: Mapping[str, FloatArray]) -> Markup | None:
    if not parts:
        return None
    return stacked_chart(column_of(rows, "step"), parts, alt="Seconds per step, by part, over training steps")


# --------------------------------------------------------------------------- samples


def _pairs(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Pair answers to one prompt side by side, in the order in which prompts first appear."""
    prompts = list(dict.fromkeys((sample.prompt, sample.answer) for sample in samples))
    return [
        {
            "prompt": prompt,
            "answer": answer,
            "samples": [
                sample
                for when in ("before", "after")
                for sample in samples
                if (sample.prompt, sample.answer, sample.when) == (prompt, answer, when)
            ],
        }
        for prompt, answer in prompts
    ]
