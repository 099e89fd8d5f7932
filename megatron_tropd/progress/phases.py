"""Name what a program is doing, with counts, and say so whenever nothing was said for some seconds.

Whatever may take long opens a ``Phase``; phases nest. They cost nothing and say nothing by themselves: a ``Heartbeat``,
which the command line starts on one rank, prints a line of them where the program would otherwise be silent. Libraries
that are being imported are a phase without being opened as one.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from types import FrameType, TracebackType
from typing import Self, TypeVar

from rich.console import Console
from rich.text import Text

from megatron_tropd.errors import printable

Item = TypeVar("Item")

_OURS = __name__.partition(".")[0]
_running: list[Phase] = []  # outermost first


class Phase:
    """A part of the work that may take long.

    Args:
        what: is done, such as "reading train.jsonl".
        total: how many of what ``advance`` counts there are; None where that is not known.
    """

    def __init__(self, what: str, *, total: int | None = None) -> None:
        self.what, self._total = what, total
        self._done, self._share, self._started = 0, 0.0, time.monotonic()

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        _running.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _running.remove(self)

    def advance(self, count: int = 1) -> None:
        """Count so many more as done."""
        self.reach(self._done + count)

    def reach(self, done: int, *, share: float | None = None) -> None:
        """Count so many as done, which are so large a share of the work (that of ``total``, where it is not given)."""
        self._done = done
        self._share = share if share is not None else done / self._total if self._total else 0.0

    def watch(self, items: Iterable[Item]) -> Iterator[Item]:
        """Pass items on, counting each when the next one is wanted."""
        for item in items:
            yield item
            self.advance()

    def counts(self, now: float) -> str:
        """Say how much is done, since when, and how long the rest takes at this rate."""
        spent = now - self._started
        parts = [f"{self._done:,}/{self._total:,}"] if self._total else [f"{self._done:,}"] if self._done else []
        parts.append(f"{_duration(spent)} so far")
        if 0.0 < self._share < 1.0:
            parts.append(f"about {_duration(spent * (1.0 - self._share) / self._share)} left")
        return ", ".join(parts)


class Heartbeat:
    """Print what is running, outer phases first, whenever nothing was said for ``seconds``. One is enough.

    What the thread that makes it is importing is named, too; while the system maps one shared library nothing can be.

    Args:
        enabled: True on one rank only.
        seconds: of silence that are allowed, within a second.
    """

    speaking: Heartbeat | None = None

    def __init__(self, *, enabled: bool = True, console: Console | None = None, seconds: float = 6.0) -> None:
        self._enabled, self._seconds = enabled, seconds
        self.console = console or Console()
        self.heard_at = self._started = time.monotonic()
        self._watched = threading.get_ident()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)

    def __enter__(self) -> Self:
        if self._enabled:
            Heartbeat.speaking = self
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._enabled:
            Heartbeat.speaking = None
            self._thread.join()

    def _beat(self) -> None:
        while not self._over.wait(min(1.0, self._seconds / 4)):
            now, phases, library = time.monotonic(), tuple(_running), _library(sys._current_frames().get(self._watched))
            if (phases or library) and now - self.heard_at >= self._seconds:
                line = _line(phases, now, library, spent=now - self._started)
                self.heard_at = now
                self.console.print(Text(printable(line)), soft_wrap=True)


def heard() -> None:
    """Tell the heartbeat, if there is one, that something was said just now."""
    if Heartbeat.speaking is not None:
        Heartbeat.speaking.heard_at = time.monotonic()


def _line(phases: tuple[Phase, ...], now: float, library: str = "", *, spent: float = 0.0) -> str:
    """Name the phases, but for the outermost one that all others are in; ``spent``: seconds, where there is none."""
    names = [phase.what for phase in phases]
    inner = [*names[1:], f"loading {library}"] if library else names[1:]
    counts = phases[-1].counts(now) if phases else f"{_duration(spent)} so far"
    return f"{', '.join(inner or names)}: {counts}"


def _library(frame: FrameType | None) -> str:
    """Name what the code of a frame is importing: the first package that is not this one; empty where it is nothing."""
    found = ""
    while frame is not None:
        if frame.f_code.co_name == "_find_and_load" and frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            package = str(frame.f_locals["name"]).partition(".")[0]
            found = package if package != _OURS or not found else found
        frame = frame.f_back
    return found


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
