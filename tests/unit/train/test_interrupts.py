"""Ctrl-C in a program of a user's own is an exception there; the command line ends the process."""

from __future__ import annotations

import signal

import pytest

from megatron_tropd.train.preemption import StopRequest


def test_outside_of_training_ctrl_c_is_an_interrupt():
    with StopRequest(raises=True) as stop, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert stop.heard is None


def test_within_training_the_first_is_remembered_and_the_second_an_interrupt(capfd: pytest.CaptureFixture[str]):
    with StopRequest(raises=True) as stop:
        with pytest.raises(KeyboardInterrupt, match=r"^$"), stop.deferred():
            signal.raise_signal(signal.SIGINT)
            assert stop.heard == signal.SIGINT
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("the second one did not interrupt")
        assert stop.heard == signal.SIGINT
    assert "a checkpoint is written" in capfd.readouterr().err
