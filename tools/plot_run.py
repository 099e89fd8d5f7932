"""Draws a figure of docs/results.md from a run: ``python tools/plot_run.py runs/demo docs/images/demo.svg``."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import numpy as np

from megatron_tropd.report.records import AFTER, BEFORE, TEACHER, read_evaluations
from megatron_tropd.report.sinks import read_jsonl

COLORS = {BEFORE: "#c2570c", AFTER: "#1d6fb8", TEACHER: "#5b6470"}


def main(run_dir: Path, out: Path) -> None:
    """Accuracies with intervals on the left, outliers and prefix length over the run on the right."""
    rows, _ = read_jsonl(run_dir / "metrics.jsonl")
    steps = np.array([row["step"] for row in rows])
    plt.rcParams |= {"font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "run", "axes.spines.top": False}
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.6, 2.9), gridspec_kw={"width_ratios": [1.15, 1]})
    _accuracies(left, run_dir)
    right.plot(steps, [100 * row["outlier_fraction"] for row in rows], color=COLORS[AFTER], lw=1.4)
    right.set(xlabel="step", ylabel="outlier tokens, %", ylim=(0, None))
    lengths = right.twinx()
    lengths.plot(steps, [row["prefix_length"] for row in rows], color=COLORS[BEFORE], lw=1.4, ls="--")
    lengths.set(ylabel="teacher prefix, tokens", ylim=(0, None))
    right.set_title("what the gate refuses, and how much is given", loc="left", fontsize=9)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


def _accuracies(axes: plt.Axes, run_dir: Path) -> None:
    found = {(e.model, e.suite): e for e in read_evaluations(run_dir)}
    suites = list(dict.fromkeys(suite for _, suite in found))
    for offset, model in enumerate((BEFORE, AFTER, TEACHER)):
        chosen = [found[model, suite] for suite in suites]
        at = np.arange(len(suites)) + (offset - 1) * 0.27
        accuracy = np.array([100 * e.accuracy for e in chosen])
        spread = np.array([[100 * (e.accuracy - e.low) for e in chosen], [100 * (e.high - e.accuracy) for e in chosen]])
        # Wilson bounds of a perfect score touch it, up to rounding
        axes.bar(at, accuracy, 0.25, yerr=spread.clip(min=0), color=COLORS[model], label=model, error_kw={"lw": 1})
    axes.set_xticks(range(len(suites)), suites)
    axes.set(ylim=(0, 122), yticks=range(0, 101, 20), ylabel="accuracy, %")
    axes.legend(frameon=False, fontsize=8, loc="upper left", ncols=3)
    axes.set_title("held-out problems, 95 % intervals", loc="left", fontsize=9)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
