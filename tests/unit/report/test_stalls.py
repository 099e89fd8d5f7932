"""Warnings of runs that stand still: when they come, with which numbers and causes, and that each comes once."""

from __future__ import annotations

import logging

import pytest

from megatron_tropd.report.stalls import WINDOW, StallMonitor

GOOD = {
    "finished_fraction": 0.9,
    "response_length": 40.0,
    "student_entropy": 0.6,
    "teacher_entropy": 0.4,
    "outlier_fraction": 0.05,
}


def warned(rows: list[dict[str, float]], caplog: pytest.LogCaptureFixture) -> list[str]:
    monitor = StallMonitor()
    with caplog.at_level(logging.WARNING):
        for step, row in enumerate(rows, start=1):
            monitor.check({"step": step, **GOOD, **row})
    return [record.getMessage() for record in caplog.records]


def test_a_run_that_learns_is_left_alone(caplog: pytest.LogCaptureFixture):
    falling = [{"student_entropy": 0.6 - 0.02 * n, "outlier_fraction": 0.3 / (n + 1)} for n in range(15)]
    assert warned(falling, caplog) == []


def test_responses_at_their_budget_are_named_once_after_a_window(caplog: pytest.LogCaptureFixture):
    rows = [{}, {}, *[{"finished_fraction": 0.35, "response_length": 128.0}] * 9]
    (text,) = warned(rows, caplog)
    # the mean of steps 2 to 6 is (0.9 + 4 * 0.35) / 5 = 0.46 finished, and (40 + 4 * 128) / 5 = 110.4 tokens
    assert text.startswith("steps 2 to 6: 54% of the responses, 110 tokens long on average, were cut off")
    assert "rollout.max_new_tokens" in text and "Said once." in text


def test_one_bad_step_is_none(caplog: pytest.LogCaptureFixture):
    assert warned([{}, {"finished_fraction": 0.0, "outlier_fraction": 0.1}, {}, {}, {}, {}, {}], caplog) == []


def test_an_entropy_that_falls_below_the_teachers_is_named(caplog: pytest.LogCaptureFixture):
    rows = [{"student_entropy": 0.6}] * WINDOW + [{"student_entropy": 0.08}] * 12
    (text,) = warned(rows, caplog)
    # mean of the last five: one of 0.6 and four of 0.08 are 0.92 / 5, less than 0.6 / 3 and 0.4 / 2
    assert text.startswith("steps 5 to 9: the student's entropy has fallen from 0.6 to 0.184 nats per token")
    assert "teacher's 0.4" in text and "optimizer.lr" in text


def test_an_entropy_that_follows_the_teachers_down_is_none(caplog: pytest.LogCaptureFixture):
    rows = [{"student_entropy": 2.0}] * WINDOW + [{"student_entropy": 0.3, "teacher_entropy": 0.3}] * 12
    assert warned(rows, caplog) == []
    assert warned([{"student_entropy": 2.0, "teacher_entropy": float("nan")}] * 9, caplog) == []


def test_outliers_that_become_more_are_named(caplog: pytest.LogCaptureFixture):
    rows = [{"outlier_fraction": 0.05}] * WINDOW + [{"outlier_fraction": 0.28}] * 12
    (text,) = warned(rows, caplog)
    # (3 * 0.05 + 2 * 0.28) / 5 = 0.142; a step before it was 0.096, less than twice the least
    assert text.startswith("steps 3 to 7: 14.2% of the student's tokens are outliers, after 5.0%")


def test_each_kind_has_its_own_warning(caplog: pytest.LogCaptureFixture):
    bad = {"finished_fraction": 0.1, "student_entropy": 0.01, "outlier_fraction": 0.6}
    assert len(warned([{}] * WINDOW + [bad] * 20, caplog)) == 3
