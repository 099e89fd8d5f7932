"""Several runs on one page: accuracies, curves over one another, and what differs between their configurations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from markupsafe import Markup

from megatron_tropd.errors import DataError, StorageError
from megatron_tropd.report.charts import SERIES, Series, line_chart, line_mark
from megatron_tropd.report.html import (
    CURVES,
    HEALTH,
    Chart,
    Rows,
    column_of,
    config_text_of,
    existing_run,
    metrics_of,
    parsed_config,
    rendered,
)
from megatron_tropd.report.metrics import METRICS
from megatron_tropd.report.records import AFTER, BEFORE, TEACHER, Evaluation, read_evaluations
from megatron_tropd.report.settings import flat
from megatron_tropd.storage.write_aside import write_aside

MOST_RUNS = len(SERIES)
_OURS = '<meta name="generator" content="megatron_tropd">'
_ACCURACY = ("Accuracy while training", ("accuracy_train",), True)
_NOT_COMPARED = {"run_dir"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ComparedRun:
    """One run of a comparison, with what it has left on disk."""

    name: str
    hue: int  # of its line
    line: Markup
    method: str
    steps: str
    config: Mapping[str, str]  # values by dotted key
    rows: Rows
    before: Mapping[str, Evaluation]  # by suite
    after: Mapping[str, Evaluation]
    teacher: Mapping[str, Evaluation]


def write_comparison(run_dirs: Sequence[str | Path], out: str | Path, *, refresh_s: int | None = None) -> Path:
    """Write a page that compares runs to ``out``; return its path.

    Args:
        refresh_s: seconds after which a browser loads the page again; None: it does not.

    Raises:
        DataError: a directory does not exist or is given twice, there are more runs than colors, or a file cannot be
            read.
        StorageError: ``out`` is somebody else's file.
    """
    out, found = Path(out), [existing_run(one) for one in run_dirs]
    places = [one.resolve() for one in found]
    if len(set(places)) < len(places):
        raise DataError(f"{', '.join(map(str, found))}: a run is given twice. Give different ones.")
    if len(found) > MOST_RUNS:
        raise DataError(f"{len(found)} runs are more than the {MOST_RUNS} colors there are for lines. Leave some out.")
    _check_ours(out)
    runs = [_read(one, name, number) for number, (one, name) in enumerate(zip(found, _names(found), strict=True))]
    context = {
        "runs": runs,
        "suites": list(dict.fromkeys(suite for run in runs for suite in (*run.before, *run.after, *run.teacher))),
        "charts": _charts(runs),
        "differences": differences([run.config for run in runs]),
        "refresh": refresh_s,
    }
    return write_aside(out, rendered("comparison.html.j2", context))


def _check_ours(out: Path) -> None:
    if out.exists() and (not out.is_file() or _OURS not in out.read_text(encoding="utf-8", errors="replace")[:2000]):
        raise StorageError(f"{out} is there, and no page of this program: it is left alone. Give another --out.")


def _names(run_dirs: Sequence[Path]) -> list[str]:
    """Name runs by their directories: by the last part where that tells them apart."""
    last = [one.absolute().name for one in run_dirs]
    return last if len(set(last)) == len(last) else [str(one) for one in run_dirs]


def _read(run_dir: Path, name: str, number: int) -> ComparedRun:
    rows, _ = metrics_of(run_dir)
    config = flat(parsed_config(config_text_of(run_dir)) or {})
    by_model: dict[str, dict[str, Evaluation]] = {model: {} for model in (BEFORE, AFTER, TEACHER)}
    for one in read_evaluations(run_dir):
        if one.model in by_model:
            by_model[one.model][one.suite] = one
    return ComparedRun(
        name=name,
        hue=number % MOST_RUNS + 1,
        line=line_mark(number),
        method=config.get("method.name", "no configuration"),
        steps=f"{len(rows):,} of {config.get('train.steps', '?')} steps",
        config=config,
        rows=rows,
        before=by_model[BEFORE],
        after=by_model[AFTER],
        teacher=by_model[TEACHER],
    )


def differences(configs: Sequence[Mapping[str, str]]) -> list[tuple[str, list[str]]]:
    """List the keys on which configurations differ, with the value of each; a dash where one lacks the key."""
    keys = dict.fromkeys(key for config in configs for key in config)
    found = [(key, [config.get(key, "-") for config in configs]) for key in keys if key not in _NOT_COMPARED]
    return [(key, values) for key, values in found if len(set(values)) > 1]


def _charts(runs: Sequence[ComparedRun]) -> list[Chart]:
    """Draw a chart for every metric that any of the runs has, a line for each of them."""
    charts = []
    for title, names, percent in (_ACCURACY, *CURVES, *HEALTH):
        # of a chart of several metrics the first: a line is a run here
        name = names[0]
        columns = [(run, column_of(run.rows, name)) for run in runs]
        lines = {run.hue: (run, column) for run, column in columns if np.isfinite(column).any()}
        if not lines:
            continue
        series = [
            Series(label=run.name, step=column_of(run.rows, "step"), value=column, style=run.hue - 1)
            for run, column in lines.values()
        ]
        svg = line_chart(series, alt=f"{title} over training steps, of {len(series)} runs", percent=percent)
        unit = "" if percent else METRICS[name].unit
        charts.append(Chart(title=title, unit=unit, note=METRICS[name].meaning, svg=svg, legend=Markup()))
    return charts
