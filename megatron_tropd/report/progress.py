"""Progress of a run, for whoever watches: a live bar on a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_tropd.progress.phases import Heartbeat, Phase, heard
from megatron_tropd.report.terminal import literal

_SHOWN = (
    ("reverse_kl", "reverse KL {:.4f}"),
    ("loss", "loss {:.4f}"),
    ("outlier_fraction", "outliers {:.1%}"),
    ("tokens_per_second", "{:,.0f} tokens/s"),
)


class TrainingProgress:
    """Count steps and show the metrics that say whether a run is healthy. Quiet where not ``enabled``.

    Args:
        total: steps of the whole run.
        done: steps already done by an earlier process.
        enabled: True on one rank only.
        seconds_between_lines: where the output is no terminal, one line at most this often (first and last always).
        name: of what is done; steps of anything but ``train`` are prompts.
        hidden: metrics that mean nothing in this run.
    """

    def __init__(
        self,
        total: int,
        *,
        done: int = 0,
        enabled: bool = True,
        console: Console | None = None,
        seconds_between_lines: float = 10.0,
        name: str = "train",
        hidden: Collection[str] = (),
    ) -> None:
        self._total, self._done, self._enabled = total, done, enabled
        self._console = console or Console()
        self._seconds_between_lines = seconds_between_lines
        self._last_line = float("-inf")
        self._hidden = frozenset(hidden)
        self._bar = Progress(
            TextColumn(f"[bold]{name}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            TextColumn("<"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not (enabled and self._console.is_terminal),
        )
        self._unit = "step" if name == "train" else "prompt"
        self._task = self._bar.add_task(name, total=total, completed=done, shown="")
        self._phase = Phase(self._place())

    def __enter__(self) -> Self:
        self._phase.__enter__()
        if not self._bar.disable and Heartbeat.speaking is not None:
            Heartbeat.speaking.console = self._console  # which prints above the bar
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        self._phase.__exit__(kind, error, trace)

    def _place(self) -> str:
        if self._unit == "step":
            return f"step {min(self._done + 1, self._total)}/{self._total}"
        return f"{self._done}/{self._total} {self._unit}s"

    def update(self, metrics: Mapping[str, int | float | None]) -> None:
        """Count one step as done."""
        self.advance(1, metrics)

    def advance(self, count: int, metrics: Mapping[str, int | float | None] | None = None) -> None:
        """Count so many steps as done."""
        self._done += count
        self._phase.what = self._place()
        facts = metrics or {}
        values = {name: value for name, value in facts.items() if name not in self._hidden and value is not None}
        shown = "  ".join(form.format(values[name]) for name, form in _SHOWN if name in values)
        if self._bar.disable:
            self._line(shown)
        else:
            self._bar.update(self._task, completed=self._done, shown=shown)

    def say(self, message: str) -> None:
        """Print a line of text above the bar."""
        if self._enabled:
            heard()
            self._console.print(literal(message))

    def _line(self, shown: str) -> None:
        now = time.monotonic()
        if now - self._last_line >= self._seconds_between_lines or self._done == self._total:
            self._last_line = now
            self.say(f"{self._unit} {self._done}/{self._total}  {shown}")
