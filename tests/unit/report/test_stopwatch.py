"""Seconds of a part are those of the work, also where a device does it later than it was asked to."""

from __future__ import annotations

import time

import pytest

from megatron_tropd.report.stopwatch import Stopwatch


class LateDevice:
    """A clock, and a device that does its work when somebody waits for it."""

    def __init__(self) -> None:
        self.now, self.asked = 100.0, 0.0

    def ask(self, seconds: float) -> None:
        self.asked += seconds

    def settle(self) -> None:
        self.now, self.asked = self.now + self.asked, 0.0


def test_a_part_has_the_seconds_of_what_it_asked_of_the_device(monkeypatch: pytest.MonkeyPatch):
    device = LateDevice()
    monkeypatch.setattr(time, "perf_counter", lambda: device.now)
    device.ask(50.0)  # of the step before
    watch = Stopwatch(device.settle)
    watch.reset()
    with watch("train"):
        device.ask(3.0)
        with watch("publish"):
            device.ask(4.0)
        device.ask(0.5)
    with watch("pack"):
        pass
    found = watch.metrics()
    assert found == {"time_train": 3.5, "time_publish": 4.0, "time_pack": 0.0, "time_step": 7.5, "time_other": 0.0}
