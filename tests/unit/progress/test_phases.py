"""Long phases are told with their counts, by one rank, and only where the program would otherwise be silent."""

from __future__ import annotations

import importlib
import io
import sys
import time
from collections.abc import Callable

from rich.console import Console

from megatron_tropd.progress import phases
from megatron_tropd.progress.phases import Heartbeat, Phase, heard

WAITS: list[Callable[[], None]] = []  # what a library of a test does while it is imported


def said(*, enabled: bool = True, seconds: float, work: Callable[[Console], None]) -> str:
    console = Console(file=io.StringIO(), width=200)
    with Heartbeat(enabled=enabled, console=console, seconds=seconds):
        work(console)
    return console.file.getvalue()


def until_said(text: str) -> Callable[[Console], None]:
    def wait(console: Console) -> None:
        deadline = time.monotonic() + 60
        while text not in console.file.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)

    return wait


def test_a_long_phase_says_since_when_and_a_short_one_nothing():
    with Phase("sampling 5 answers"):
        assert "sampling 5 answers: 0 s so far" in said(seconds=0.01, work=until_said("so far"))
        assert said(seconds=600.0, work=until_said("")) == ""
        assert said(enabled=False, seconds=0.0, work=until_said("")) == ""


def test_a_line_names_what_a_phase_is_part_of_but_not_the_program():
    with Phase("tropd train"), Phase("step 3/8"), Phase("rollouts"), Phase("sampled", total=36) as phase:
        phase.reach(12)
        text = said(seconds=0.01, work=until_said("so far"))
    assert text.startswith("step 3/8, rollouts, sampled: 12/36, 0 s so far")


def test_a_library_that_is_being_loaded_is_named_with_and_without_a_phase(tmp_path, monkeypatch):
    """By the package that our own code has asked for, however deep in it the import is."""
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "slow_library"
    package.mkdir()
    (package / "__init__.py").write_text("from slow_library import inner")
    (package / "inner.py").write_text("import slower_library")
    (tmp_path / "slower_library.py").write_text(f"from {__name__} import WAITS\nWAITS[0]()")

    def load(console: Console) -> None:
        WAITS[:] = [lambda: until_said("so far")(console)]
        for name in ("slow_library", "slow_library.inner", "slower_library"):
            sys.modules.pop(name, None)
        importlib.import_module("slow_library")

    assert said(seconds=0.01, work=load).startswith("loading slow_library: 0 s so far")
    with Phase("tropd train"):
        assert said(seconds=0.01, work=load).startswith("loading slow_library: 0 s so far")
        with Phase("drawing the report"):
            assert said(seconds=0.01, work=load).startswith("drawing the report, loading slow_library: 0 s so far")
    assert said(seconds=0.01, work=lambda _: time.sleep(0.1)) == ""  # nothing is done that has a name


def test_the_rest_takes_as_long_as_the_share_that_is_done_says():
    counted = Phase("packs", total=5)
    counted.advance()
    started = counted._started
    assert counted.counts(started + 30) == "1/5, 30 s so far, about 120 s left".replace("120 s", "2 min")
    counted.reach(1, share=0.75)
    assert counted.counts(started + 30) == "1/5, 30 s so far, about 10 s left"
    counted.reach(5)
    assert counted.counts(started + 30) == "5/5, 30 s so far"
    endless = Phase("reading train.jsonl")
    assert endless.counts(endless._started + 9) == "9 s so far"
    assert list(endless.watch("abc")) == ["a", "b", "c"]
    assert endless.counts(endless._started + 7 * 3600 + 300) == "3, 7 h 05 min so far"


def test_what_is_said_otherwise_puts_the_next_line_off(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(phases.time, "monotonic", lambda: now[0])
    beat = Heartbeat(seconds=8.0)
    monkeypatch.setattr(Heartbeat, "speaking", beat)
    now[0] = 105.0
    heard()
    assert beat.heard_at == 105.0


def test_phases_are_over_when_their_work_fails():
    try:
        with Phase("loading"):
            raise ValueError
    except ValueError:
        pass
    assert phases._running == []
