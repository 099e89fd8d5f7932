"""A phase that counts nothing says that it goes on, on one rank, and nothing when it is short."""

from __future__ import annotations

import io
import time

from rich.console import Console

from megatron_tropd.report.progress import Heartbeat


def said(*, enabled: bool, seconds: float, until: str) -> str:
    console = Console(file=io.StringIO(), width=200)
    with Heartbeat("sampling 5 answers", enabled=enabled, console=console, seconds=seconds):
        deadline = time.monotonic() + 60
        while until and until not in console.file.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    return console.file.getvalue()


def test_a_long_phase_says_since_when_and_a_short_one_nothing():
    assert "sampling 5 answers: 0 s so far" in said(enabled=True, seconds=0.01, until="so far")
    assert said(enabled=True, seconds=600.0, until="") == ""
    assert said(enabled=False, seconds=0.0, until="") == ""
