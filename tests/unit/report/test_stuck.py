"""The warning of a student that a method cannot move: when it comes, what it says, and that it comes once."""

from __future__ import annotations

import logging

import pytest

from megatron_tropd.methods import build_method
from megatron_tropd.report.stuck import StuckMonitor, is_stuck

STUCK = {"step": 2, "reverse_kl": 6.5, "stuck_fraction": 0.61, "grad_norm": 0.8}
NEAR = {"step": 2, "reverse_kl": 0.16, "stuck_fraction": 0.4, "grad_norm": 0.1}


def warnings_of(method: str, steps: list[dict[str, float]], caplog: pytest.LogCaptureFixture) -> list[str]:
    moves = build_method(method).teaches_certain_students
    monitor = StuckMonitor(method, teaches_certain_students=moves)
    with caplog.at_level(logging.WARNING):
        for metrics in steps:
            monitor.check(metrics)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("method", ["opd", "rkl", "tropd_mask", "tropd_clip", "reopold", "gkd"])
def test_the_warning_comes_once_with_the_numbers_and_what_to_try(method, caplog):
    (text,) = warnings_of(method, [NEAR, STUCK, STUCK | {"step": 3}], caplog)
    for part in ("step 2:", "6.5 nats", "61%", "gradient norm is 0.8", f"{method} moves", "method.name=tropd"):
        assert part in text


@pytest.mark.parametrize("method", ["tropd", "tropd_rkl", "aopd", "fkl"])
def test_methods_whose_outliers_learn_what_the_teacher_would_write_are_not_warned_of(method, caplog):
    assert warnings_of(method, [STUCK], caplog) == []


@pytest.mark.parametrize(
    "metrics",
    [
        NEAR,
        STUCK | {"stuck_fraction": 0.05},  # far, but unsure: the reward moves it
        STUCK | {"grad_norm": 30.0},
        {"step": 1, "reverse_kl": 6.5, "grad_norm": 0.8},  # no outlier in the step
        {"step": 1, "loss": 0.0},
    ],
)
def test_a_student_that_is_near_or_unsure_or_moving_is_not_stuck(metrics):
    assert is_stuck(STUCK) and not is_stuck(metrics)
