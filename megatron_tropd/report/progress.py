"""Progress of a run, for whoever watches: a live bar on a terminal, a plain line now and then in a log file."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from megatron_tropd.report.terminal import literal, say

_SHOWN = (
    ("loss", "loss {:.4f}"),
    ("reverse_kl", "reverse KL {:.4f}"),
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
    ) -> None:
        self._total, self._done, self._enabled = total, done, enabled
        self._console = console or Console()
        self._seconds_between_lines = seconds_between_lines
        self._last_line = float("-inf")
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

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def update(self, metrics: Mapping[str, int | float | None]) -> None:
        """Count one step as done."""
        self.advance(1, metrics)

    def advance(self, count: int, metrics: Mapping[str, int | float | None] | None = None) -> None:
        """Count so many steps as done."""
        self._done += count
        facts = metrics or {}
        shown = "  ".join(form.format(value) for name, form in _SHOWN if (value := facts.get(name)) is not None)
        if self._bar.disable:
            self._line(shown)
        else:
            self._bar.update(self._task, completed=self._done, shown=shown)

    def say(self, message: str) -> None:
        """Print a line of text above the bar."""
        if self._enabled:
            self._console.print(literal(message))

    def _line(self, shown: str) -> None:
        now = time.monotonic()
        if now - self._last_line >= self._seconds_between_lines or self._done == self._total:
            self._last_line = now
            self.say(f"{self._unit} {self._done}/{self._total}  {shown}")


class Heartbeat:
    """Report now and then that a phase is running, and since when: for phases that count nothing. Quiet if short.

    Args:
        what: the phase, such as "sampling 1,319 answers".
        enabled: True on one rank only.
        seconds: between two lines, and before the first.
    """

    def __init__(
        self, what: str, *, enabled: bool = True, console: Console | None = None, seconds: float = 10.0
    ) -> None:
        self._what, self._enabled, self._seconds = what, enabled, seconds
        self._console = console or Console()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Self:
        if self._enabled:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._enabled:
            self._thread.join()

    def _beat(self) -> None:
        started = time.monotonic()
        while not self._over.wait(self._seconds):
            spent = time.monotonic() - started
            say(f"{self._what}: {spent:.0f} s so far", console=self._console)
