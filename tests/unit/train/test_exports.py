"""Which weights are best, how long there was no gain, what a card says, and which exports are dropped."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_tropd.config.sections import DEFAULT_SUITES, SuiteConfig
from megatron_tropd.report.records import AFTER, BEFORE, DURING, TEACHER, Evaluation
from megatron_tropd.storage.owned import mark_directory
from megatron_tropd.train.best import BestSoFar, deciding_suite
from megatron_tropd.train.exports import _drop_oldest
from megatron_tropd.train.model_card import CardFacts, model_card


def measured(step: int | None, accuracy: float, *, suite: str = "sampled", model: str = DURING) -> Evaluation:
    return Evaluation(
        model=model,
        suite=suite,
        accuracy=accuracy,
        low=accuracy - 0.1,
        high=accuracy + 0.1,
        problems=7,
        samples=3,
        mean_length=5.0,
        step=step,
    )


def test_the_suite_that_decides_is_the_one_named_else_the_first_that_samples():
    assert deciding_suite(DEFAULT_SUITES, None) == "mean@4 T=0.6"
    assert deciding_suite(DEFAULT_SUITES, "greedy") == "greedy"
    assert deciding_suite([SuiteConfig(name="a"), SuiteConfig(name="b")], None) == "a"
    assert deciding_suite([], None) is None


def test_the_best_weights_are_the_first_of_the_most_accurate_and_trained():
    best = BestSoFar("sampled")
    assert not best.add([measured(0, 0.9, model=BEFORE), measured(None, 1.0, model=TEACHER)]) and best.step is None
    found = []
    for step, accuracy in ((2, 0.3), (4, 0.5), (6, 0.5), (8, 0.4), (10, 0.6), (12, 0.1)):
        greedy = measured(step, 1.0 - accuracy, suite="greedy")  # does not decide
        found.append((best.add([greedy, measured(step, accuracy)]), best.step, best.without_gain))
    assert found == [(True, 2, 0), (True, 4, 0), (False, 4, 1), (False, 4, 2), (True, 10, 0), (False, 10, 1)]


def test_a_run_that_resumes_knows_what_it_has_measured_once():
    earlier = [measured(2, 0.5), measured(4, 0.4), measured(6, 0.3), measured(6, 0.3, model=AFTER)]
    best = BestSoFar("sampled", earlier)
    assert (best.step, best.without_gain) == (2, 2)
    assert not best.add([measured(6, 0.3, model=AFTER)]) and best.without_gain == 2


def test_a_card_says_method_data_accuracy_and_versions():
    commit = "0" * 40
    facts = CardFacts(
        student=f"own/tiny@{commit}",
        teachers=["models/large"],
        data=[f"own/sums@{commit}:main:train", "mine.jsonl"],
        method={"name": "tropd", "k": 7},
        settings={"optimizer.lr": 0.001},
        steps=9,
    )
    before, mine, other = measured(0, 0.25, model=BEFORE), measured(6, 0.5), measured(4, 0.75)
    card = model_card(facts, [before, other, mine, measured(None, 0.875, model=TEACHER)], step=6)
    header = yaml.safe_load(card.split("---\n")[1])
    assert header["base_model"] == "own/tiny" and header["datasets"] == ["own/sums"] and "tropd" in header["tags"]
    for line in (
        "# tiny, distilled from large",
        "6 of 9 steps",
        f"| student | own/tiny@{commit} |",
        "| data | mine.jsonl |",
        "| method.k | 7 |",
        "| optimizer.lr | 0.001 |",
        "| student before | sampled | 25.0 [15.0, 35.0] | 7 x 3 |",
        "| student, step 6 | sampled | 50.0 [40.0, 60.0] | 7 x 3 |",
        "| teacher | sampled | 87.5 [77.5, 97.5] | 7 x 3 |",
        "| megatron-core | 0.16.1 |",
    ):
        assert line in card
    assert "75.0" not in card  # of other weights
    assert "Not measured." in model_card(facts, [], step=6)


def test_only_the_newest_exports_stay_and_nothing_of_the_users_goes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for step in (2, 4, 6, 8):
        directory = tmp_path / f"step-{step:08d}"
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        mark_directory(directory, kind="Hugging Face model")
    (tmp_path / "step-00000004" / "notes.txt").write_text("mine")
    (tmp_path / "best").mkdir()
    (tmp_path / "step-two").mkdir()
    _drop_oldest(tmp_path, keep=2)
    there = sorted(path.name for path in tmp_path.iterdir())
    assert there == ["best", "step-00000004", "step-00000006", "step-00000008", "step-two"]
    assert "notes.txt" in capsys.readouterr().out
