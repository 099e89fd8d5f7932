"""The comparison of methods on the demo's pairs: its arms, what it reads off them by hand, and that it resumes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from megatron_tropd.benchmarks import compare
from megatron_tropd.benchmarks.compare import (
    METHODS,
    Arm,
    ArmOutcome,
    arms_of,
    draw,
    outcome_of,
    part_of,
    run_arm,
    running_mean,
    steps_to,
    table_of,
)
from megatron_tropd.commands.demo import STUDENTS
from megatron_tropd.config.loading import load_config
from megatron_tropd.errors import ConfigError, DataError
from megatron_tropd.report.records import AFTER, BEFORE, TEACHER, Evaluation, record_evaluations

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo" / "demo.yaml"
INTERVAL = {"low": 0.0, "high": 1.0, "problems": 256, "samples": 4, "mean_length": 31.0}


def outcome(method: str, accuracy: list[float], last: float, *, pair: str = "direct") -> ArmOutcome:
    return ArmOutcome(
        arm=Arm(pair=pair, method=method, changes=()),
        step=list(range(1, len(accuracy) + 1)),
        accuracy=accuracy,
        final={"greedy": (0.5, 0.4, 0.6), "T=1": (last, last - 0.01, last + 0.01)},
        length=31.2,
        stuck=[0.4, float("nan")],
        seconds=61.7,
    )


def test_every_arm_is_a_run_of_its_method_and_student_on_one_rank():
    arms = arms_of(list(STUDENTS), METHODS, ["seed=3"], steps=7)
    assert len(arms) == len({arm.name for arm in arms}) == 2 * (1 + len(METHODS))
    for arm in arms:
        config = load_config(DEMO, [*arm.changes, "run_dir=x"], check_paths=False)
        assert config.student.model.name == {"direct": "student_direct", "mistaken": "student"}[arm.pair]
        assert config.student.parallel.tensor == config.teacher.parallel.tensor == 1 and config.seed == 3
        if arm.method:
            assert config.method.name == arm.method and config.train.steps == 7 and not config.evaluate.before
            assert config.evaluate.after


def test_unknown_pairs_methods_and_parts_are_refused_by_name():
    with pytest.raises(ConfigError, match="unknown method tropdd"):
        arms_of(["direct"], ["tropdd"], [], steps=1)
    arms = arms_of(["direct", "mistaken"], ["opd", "tropd"], [], steps=1)
    assert [arm.name for arm in part_of(arms, ["mistaken:opd"])] == ["mistaken-models", "mistaken-opd"]
    with pytest.raises(ConfigError, match="--only names near:opd"):
        part_of(arms, ["near:opd"])


def test_steps_are_counted_on_the_running_mean():
    values = [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    # windows of five, cut at the ends: 0/3, 0/4, 1/5, 2/5, 3/5, 4/5, 4/4, 3/3
    assert running_mean(values).tolist() == pytest.approx([0.0, 0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    found = outcome("opd", values, 0.9)
    assert (steps_to(found, 0.5), steps_to(found, 1.1)) == (5, None)


def test_the_table_has_the_best_first_and_counts_from_the_student_to_the_teacher():
    references = [
        Evaluation(model=model, suite=suite, accuracy=share, step=None, **INTERVAL)
        for model, share in ((BEFORE, 0.0), (TEACHER, 1.0))
        for suite in ("greedy", "T=1")
    ]
    text = table_of([outcome("opd", [0.0] * 8, 0.01), outcome("tropd", [0.0] * 4 + [1.0] * 4, 0.8)], references)
    lines = text.splitlines()
    assert lines[4].startswith("| `tropd` | 50.0 [40.0, 60.0] | 80.0 [79.0, 81.0] | 5 | 7 | 31 | 40% / - | 62 |")
    assert lines[5].startswith("| `opd` |") and "| - | - |" in lines[5]
    assert len({line.count("|") for line in lines}) == 1


def test_the_picture_has_a_panel_per_pair_and_every_method_by_name(tmp_path: Path):
    several = {pair: [outcome(m, [0.1, 0.5], 0.5, pair=pair) for m in METHODS] for pair in STUDENTS}
    draw(several, tmp_path / "compare.svg")
    svg = (tmp_path / "compare.svg").read_text()
    assert all(f">{method}<" in svg for method in METHODS)
    assert "far: answers off the top of its head" in svg and "near: wrong beliefs" in svg


def test_a_finished_arm_is_not_run_again_and_one_of_other_settings_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(compare.subprocess, "run", lambda *_, **__: pytest.fail("started"))
    arm = Arm(pair="direct", method="opd", changes=("train.steps=2",))
    (tmp_path / arm.name).mkdir()
    (tmp_path / arm.name / "arm.json").write_text(json.dumps({"changes": ["train.steps=2"], "seconds": 1.5}))
    assert run_arm(arm, tmp_path) is False
    with pytest.raises(ConfigError, match="holds a finished run of other settings"):
        run_arm(Arm(pair="direct", method="opd", changes=("train.steps=3",)), tmp_path)


def test_what_an_arm_left_is_read_and_what_it_did_not_leave_is_named(tmp_path: Path):
    arm = Arm(pair="direct", method="opd", changes=())
    folder = tmp_path / arm.name
    folder.mkdir()
    (folder / "arm.json").write_text('{"changes": [], "seconds": 1.5}')
    rows = [{"step": 1, "accuracy_train": 0.25, "stuck_fraction": 0.4}, {"step": 2, "accuracy_train": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="2 steps and 0 evaluations"):
        outcome_of(arm, tmp_path)
    record_evaluations(folder, [Evaluation(model=AFTER, suite="T=1", accuracy=0.75, step=2, **INTERVAL)])
    found = outcome_of(arm, tmp_path)
    assert (found.step, found.accuracy, found.final) == ([1, 2], [0.25, 0.5], {"T=1": (0.75, 0.0, 1.0)})
    assert found.stuck[0] == 0.4 and np.isnan(found.stuck[1]) and found.seconds == 1.5
