"""Line charts of the report, drawn by matplotlib as SVG whose colors are CSS variables of the page.

Colors are drawn as sentinels and replaced afterwards, so that one picture serves light, dark and print. Series differ
in line style as well as in color.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from markupsafe import Markup, escape

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FloatArray = npt.NDArray[np.float64]

_INK, _MUTED, _GRID = "#010203", "#010204", "#010205"
SERIES = tuple(f"#01020{digit}" for digit in "6789abc")  # sentinels of var(--s1) ... var(--s7)
_VARIABLES = {_INK: "ink", _MUTED: "muted", _GRID: "line", **{hue: f"s{i + 1}" for i, hue in enumerate(SERIES)}}
_DASHES = ("none", "7 3", "2 2.4", "10 2.5 2 2.5", "4 1.5", "14 3", "1 4")  # of successive lines, as SVG writes them
_MOST_POINTS = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """One line: values over steps, NaN where there is none. ``low`` and ``high`` draw an interval around it."""

    label: str
    step: FloatArray
    value: FloatArray
    low: FloatArray | None = None
    high: FloatArray | None = None
    smooth: bool = True  # draw a running mean over the faint raw line
    style: int | None = None  # which color and dashes; None: those of its place among the lines


def line_chart(series: Sequence[Series], *, alt: str, percent: bool = False) -> Markup:
    """Draw lines over training steps. ``alt`` describes the chart to those who cannot see it."""
    figure, axes = _axes()
    for place, line in enumerate(series):
        i = place if line.style is None else line.style
        _draw_line(axes, line, color=SERIES[i % len(SERIES)], dashes=_DASHES[i % len(_DASHES)])
    every_step = np.concatenate([line.step for line in series])
    room = 0.5 if every_step.min() == every_step.max() else 0.0
    axes.set_xlim(every_step.min() - room, every_step.max() + room)  # lines that end early show that they do
    form = (lambda value, _: f"{100 * value:.3g}%") if percent else (lambda value, _: f"{value:.4g}")
    axes.yaxis.set_major_formatter(form)
    return _svg(figure, alt=alt)


def legend(labels: Sequence[str]) -> Markup:
    """Write what the lines of :func:`line_chart` are, in the page's own text so that long names wrap; empty for one
    line.
    """
    if len(labels) < 2:
        return Markup()
    items = (Markup("<li>{}{}</li>").format(line_mark(i), label) for i, label in enumerate(labels))
    return Markup('<ul class="lines">{}</ul>').format(Markup("").join(items))


def line_mark(style: int) -> Markup:
    """Draw a short piece of a line of :func:`line_chart`."""
    mark = Markup(
        '<svg class="line" width="26" height="8" aria-hidden="true"><line x1="0" x2="26" y1="4" y2="4" '
        'stroke="var(--s{})" stroke-width="2.2" stroke-dasharray="{}"/></svg>'
    )
    return mark.format(style % len(SERIES) + 1, _DASHES[style % len(_DASHES)])


def stacked_chart(steps: FloatArray, parts: Mapping[str, FloatArray], *, alt: str) -> Markup:
    """Draw areas on top of each other, in the order given, in the colors of ``SERIES``."""
    figure, axes = _axes()
    thin_steps = _thin(steps)
    stack = np.stack([_thin(np.nan_to_num(values)) for values in parts.values()])
    top = np.cumsum(stack, axis=0)
    for i in range(len(stack)):
        axes.fill_between(thin_steps, top[i] - stack[i], top[i], color=SERIES[i % len(SERIES)], linewidth=0, alpha=0.85)
    axes.set_ylim(bottom=0)
    return _svg(figure, alt=alt)


def _draw_line(axes: Axes, line: Series, *, color: str, dashes: str) -> None:
    step, value = _thin(line.step), _thin(line.value)
    noisy = line.smooth and np.isfinite(value).sum() > 20
    if noisy:
        axes.plot(step, value, color=color, linewidth=0.7, alpha=0.35)
        value = _running_mean(value, window=max(3, len(value) // 15))
    # matplotlib counts dashes in line widths
    style = "-" if dashes == "none" else (0, tuple(float(part) / 2 for part in dashes.split()))
    few = np.isfinite(value).sum() <= 12
    axes.plot(
        step, value, color=color, linewidth=1.7, linestyle=style, label=line.label, marker="o" if few else None, ms=4
    )
    if line.low is not None and line.high is not None:
        axes.fill_between(_thin(line.step), _thin(line.low), _thin(line.high), color=color, alpha=0.15, linewidth=0)


def _axes() -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.5, 2.5), layout="constrained")
    axes = figure.add_subplot()
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_MUTED)
    axes.tick_params(colors=_MUTED, labelsize=10.5, length=0, pad=4)
    axes.set_xlabel("step", color=_MUTED, fontsize=10.5, labelpad=1)
    axes.margins(x=0.01)
    return figure, axes


def _thin(values: FloatArray) -> FloatArray:
    """Thin to means over equal runs of points, so that a long run does not make a heavy page."""
    run = -(-len(values) // _MOST_POINTS)
    if run <= 1:
        return values
    padded = np.concatenate([values, np.full(-len(values) % run, np.nan)]).reshape(-1, run)
    count = np.isfinite(padded).sum(axis=1)
    return np.where(count > 0, np.nansum(padded, axis=1) / np.maximum(count, 1), np.nan)


def _running_mean(values: FloatArray, *, window: int) -> FloatArray:
    """Return the centered mean over ``window`` points, fewer at the ends; NaN counts for nothing and stays NaN."""
    there, kernel = np.isfinite(values), np.ones(window)
    total = np.convolve(np.where(there, values, 0.0), kernel, mode="full")
    count = np.convolve(there.astype(float), kernel, mode="full")
    middle = slice((window - 1) // 2, (window - 1) // 2 + len(values))
    return np.where(there, total[middle] / np.maximum(count[middle], 1), np.nan)


def _svg(figure: Figure, *, alt: str) -> Markup:
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": alt}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    # ids of groups repeat from chart to chart and nothing refers to them; ids in <defs> are hashes salted by alt
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg, count=2)
    for sentinel, name in _VARIABLES.items():
        svg = svg.replace(sentinel, f"var(--{name})")
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1))
