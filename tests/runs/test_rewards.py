"""Whole runs that learn from rewards: resumed, ahead of training, replayed, with a function that fails now and then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.run_inputs import STUDENT, Task, commands, make_task, save_model, steady_metrics, train_each

QUIET = ("report.html=false", "evaluate.prompts=null", "train.prompts_per_step=3", "checkpoint.keep=2")
BESIDE = ("method.name=opd", "method.reward_weight=0.5", "reward.advantage=leave_one_out")
POINTS = """
def points(prompt, responses, tokens):
    if len(prompt) % 4 == 1:
        raise LookupError("a prompt of such a length")
    return [sum(map(ord, text)) % 7 - length for text, length in zip(responses, tokens)]
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    made = make_task(tmp_path_factory.mktemp("task"))
    save_model(made.student, STUDENT | {"num_hidden_layers": 1}, tied=True, seed=1)
    made.config.write_text(made.config.read_text().replace("name: tropd\n  k: 7\n  beta: 0.3", "name: opd"))
    return made


def test_rewards_are_those_of_the_rollouts_whenever_they_are_computed(task: Task, tmp_path: Path):
    (tmp_path / "own.py").write_text(POINTS)
    function = f"reward.function={tmp_path}/own.py:points"
    beside = [*QUIET, *BESIDE, function, "train.steps=4", "checkpoint.every=2"]
    ahead = [*beside, "method.ppo_clip=0.2", "method.reward_clip=0.2", "rollout.ahead=1", "report.samples=0"]
    record, quiet = f"rollout.record={tmp_path}/rollouts", "report.samples=0"
    replay = ("rollout.engine=recorded", f"rollout.recorded_from={tmp_path}/rollouts")
    gated = ("method.name=tropd", "method.gate=[soft,correct]", "method.k=7", "train.steps=2", "report.samples=1")
    cases = {
        "whole": [*beside, record, "report.samples=1"],
        "again": [*beside, quiet, f"checkpoint.resume={tmp_path}/whole/checkpoints/step-00000002"],
        "replayed": [*beside, *replay, quiet],
        "ahead": ahead,
        "ahead again": [*ahead, f"checkpoint.resume={tmp_path}/ahead/checkpoints/step-00000002"],
        "gated": [*QUIET, *gated],
    }
    commands().call(train_each, task.config, tmp_path, cases, ranks=0, timeout_s=280)
    found: dict[str, list[dict[str, Any]]] = {name: steady_metrics(tmp_path / name) for name in cases}
    whole = found["whole"]
    assert found["again"] == whole[2:]
    assert found["replayed"] == whole
    assert found["ahead again"] == found["ahead"][2:]
    assert found["ahead"][0]["reward_mean"] == whole[0]["reward_mean"]
    assert found["ahead"][1]["staleness_max"] == 1
    # a prompt that the function fails for has two answers of the student's own, and counts in no mean
    assert {row["reward_missing"] for row in whole} <= {0, 2} and 2 in {row["reward_missing"] for row in whole}
    assert len({row["reward_mean"] for row in whole}) == 4 and all(row["reward_advantage"] > 0 for row in whole)
    # a random model solves nothing: every token is an outlier
    assert found["gated"][0]["reward_mean"] == found["gated"][0]["accuracy_train"] == 0.0
    assert found["gated"][0]["outlier_fraction"] == 1.0 and found["gated"][0]["reward_missing"] == 0

    (tmp_path / "own.py").write_text(POINTS.replace("% 7", "% 5"))
    outcome = commands().run("train", task.config, *cases["again"], f"run_dir={tmp_path}/changed")
    assert outcome.status == 2 and "reward.function.program are others of the same kind" in outcome.output
