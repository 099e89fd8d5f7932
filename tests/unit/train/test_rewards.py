"""Rewards of a batch: what is not known is named and counted, and is nobody's 0."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_tropd.config.sections import DataConfig
from megatron_tropd.engine.batch import BatchFacts, batch_weights
from megatron_tropd.errors import DataError
from megatron_tropd.evaluate.grader_pool import Grade
from megatron_tropd.methods import build_method
from megatron_tropd.setup.rewards import reward_function
from megatron_tropd.train import rewards
from megatron_tropd.train.metrics import of_rewards
from megatron_tropd.train.rewards import reward_batch
from megatron_tropd.types import Prompt, Region, Rollout, single_turn

SAMPLES, GUIDED = 3, 1
GIVEN: list[dict[str, Any]] = []  # what the functions under test were given


@pytest.fixture(autouse=True)
def alone(tmp_path: Path):
    dist.init_process_group("gloo", store=dist.FileStore(f"{tmp_path}/store", 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Words:
    eos_ids = (0,)

    def response_text(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def tokens(self, ids: list[int]) -> list[str]:
        return [str(i) for i in ids]


def prompts(*answers: str | None) -> list[Prompt]:
    ids = np.array([8, 9])
    return [Prompt(index=10 + i, token_ids=ids, text=f"ask {i}", answer=a, source="s") for i, a in enumerate(answers)]


def rollouts(count: int) -> list[Rollout]:
    """Every answer is its own number; the last of each prompt begins with a teacher's token."""
    found = []
    for number in range(count * (SAMPLES + GUIDED)):
        prefix = int(number % (SAMPLES + GUIDED) == SAMPLES)
        one = Rollout(
            sequence_id=number,
            prompt_index=number // (SAMPLES + GUIDED),
            token_ids=np.array([8, 9, *[7] * prefix, number, number]),
            region_L=single_turn(prompt=2, prefix=prefix, continuation=2),
            sampling_logprob=np.zeros(2, np.float32),
            model_logprob=np.zeros(2, np.float32),
            finished=bool(number % 2),
        )
        found.append(one)
    return found


def run_of(function: str | None = None, advantage: str = "group_mean") -> Any:
    return SimpleNamespace(
        method=build_method("grpo"),
        rollout=SimpleNamespace(samples_per_prompt=SAMPLES),
        reward=SimpleNamespace(advantage=advantage, function=function),
        reward_function=reward_function(function),
        data=DataConfig(prompts=("p",), grader="math"),
        evaluate=SimpleNamespace(code_execution=False),
        tokenizer=Words(),
    )


def of_function(place: Path, body: str, caplog: pytest.LogCaptureFixture, *, count: int = 2) -> Any:
    """Rewards by a function of the prompt ``n``, and the last warning."""
    text = f"def points(prompt, responses):\n    n = int(prompt[-1])\n    {body}\n"
    (place / "own.py").write_text(text)
    caplog.clear()
    found = reward_batch(run_of(f"{place}/own.py:points"), prompts(*[None] * count), rollouts(count), step=4)
    return found, caplog.text


@pytest.mark.parametrize(
    ("body", "message", "unknown"),
    [
        ("return [1.0, 2.0, float('nan') if n else 3.0, 4.0]", "answer 3 to prompt 11 of s: .* returned nan, no", [6]),
        ("return [1, None, 3, 4] if n else [1, 2, 3, 4]", "answer 2 to prompt 11 of s: .* returned None, no", [5]),
        ("return [1, 2, 3, 1 / (1 - n) if n < 1 else float('-inf')]", "answer 4 to prompt 11 .* returned -inf", [7]),
        ("return ['1', 2, 3, 4]", "answer 1 to prompt 10 of s: .* returned '1', .*; and 1 more faults", [0, 4]),
        ("return [1, 2, 3, 4][n:]", "all 4 answers to prompt 11 of s: .* returned a list of 3, not", [4, 5, 6, 7]),
        ("return 'abcd' if n else [1, 2, 3, 4]", "all 4 answers to prompt 11 of s: .* a str of 4, not", [4, 5, 6, 7]),
        ("return 3 if n else [1, 2, 3, 4]", "all 4 answers to prompt 11 of s: .* raised TypeError", [4, 5, 6, 7]),
        ("return [1, 2, 3, 4] if n else {}['x']", "all 4 answers to prompt 10 .* raised KeyError: 'x'", [0, 1, 2, 3]),
        ("return [1, 2, 3, 4] if n else exit(3)", "all 4 answers to prompt 10 .* raised SystemExit: 3", [0, 1, 2, 3]),
    ],
)
def test_what_a_function_does_not_reward_is_named_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, body: str, message: str, unknown: list[int]
):
    found, said = of_function(tmp_path, body, caplog)
    assert caplog.records[-1].levelno == logging.WARNING and "step 5: answers without a reward" in said
    assert re.search(message, said), said
    assert set(range(8)) - found.rewards.keys() == set(unknown) and found.missing == len(unknown)
    assert found.advantages.keys() == found.rewards.keys() - {3, 7}  # those begin with a teacher's token
    for group in (range(3), range(4, 7)):
        known = [i for i in group if i not in unknown]
        mean = sum(found.rewards[i] for i in known) / max(len(known), 1)
        assert [found.advantages[i] for i in known] == pytest.approx([found.rewards[i] - mean for i in known])
    assert of_rewards(found)["reward_missing"] == len(unknown)


def test_a_function_that_fails_for_every_prompt_ends_the_run(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    with pytest.raises(DataError, match=r"rewarded no answer to any of 2 prompts: all 4 answers to prompt 10 of s: "):
        of_function(tmp_path, "return responses.lenght", caplog)
    # those that a report shows are not worth the run
    found = reward_batch(run_of(f"{tmp_path}/own.py:points"), prompts(None), rollouts(1), step=None)
    assert found.missing == 4 and found.rewards == {} and "answers shown: answers without a reward" in caplog.text


def test_numbers_of_other_libraries_are_numbers(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    found, said = of_function(tmp_path, "import torch; return torch.tensor([0.5, 2, 3, -4])", caplog)
    assert said == "" and [found.rewards[i] for i in range(4)] == [0.5, 2, 3, -4]
    found, said = of_function(tmp_path, "import numpy; return (numpy.float32(2.5), True, 3, numpy.int64(4))", caplog)
    assert said == "" and [found.rewards[i] for i in range(4)] == [2.5, 1, 3, 4]


def test_a_function_is_given_texts_lengths_and_whose_they_are(tmp_path: Path):
    (tmp_path / "own.py").write_text(
        "def points(**given):\n"
        "    from tests.unit.train import test_rewards\n"
        "    test_rewards.GIVEN.append(given)\n"
        "    return given['tokens']\n"
    )
    GIVEN.clear()
    found = reward_batch(run_of(f"{tmp_path}/own.py:points", "raw"), prompts("42"), rollouts(1), step=0)
    assert GIVEN == [
        {
            "prompt": "ask 0",
            "answer": "42",
            "source": "s",
            "responses": ["0 0", "1 1", "2 2", "7 3 3"],
            "finished": [False, True, False, True],
            "tokens": [2, 2, 2, 3],
            "guided": [False, False, False, True],
        }
    ]
    assert found.advantages == {0: 2.0, 1: 2.0, 2: 2.0}


# --------------------------------------------------------------------------- by the graders


def test_answers_that_a_grader_gave_up_on_have_no_reward(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    wrong, right = Grade(False), Grade(True)
    unread = Grade(False, "the reference cannot be read", bad_reference=True)
    late = Grade(False, "grading took longer than 10 s, or too much memory", timed_out=True, given_up=True)
    looped = Grade(False, "ran longer than 10 s", timed_out=True)  # a program that does not end is wrong
    given = [right, wrong, late, right, right, looped, wrong, unread]
    monkeypatch.setattr(rewards, "grades", lambda *_, **__: given)
    found = reward_batch(run_of(), prompts("1", None, "2"), rollouts(3), step=0)
    # the second prompt has no answer: four of its own, and the two that are not known
    assert found.rewards == {0: 1, 1: 0, 3: 1, 8: 1, 9: 0, 10: 0} and found.missing == 6
    assert found.advantages == pytest.approx({0: 0.5, 1: -0.5, 8: 2 / 3, 9: -1 / 3, 10: -1 / 3})
    assert "prompt 10 of s: grading took longer than 10 s, or too much memory; and 1 more faults" in caplog.text
    assert found.marks is not None
    np.testing.assert_array_equal(found.marks, [[1, 0, 0], [1, 0, 0]])  # what accuracy_train takes


def test_a_method_that_looks_at_no_rewards_has_none_computed():
    run = run_of()
    run.method = build_method("opd")
    assert reward_batch(run, prompts("1"), rollouts(1), step=0) == rewards.BatchRewards()


def test_the_gate_leaves_answers_without_a_reward_out_of_loss_and_denominator():
    region = np.array([Region.PREFIX, Region.CONTINUATION, Region.CONTINUATION, Region.CONTINUATION, Region.PAD])
    pack: Any = SimpleNamespace(
        region_T=region.astype(np.uint8),
        sequence_T=np.array([5, 5, 6, 6, -1]),
        target_T=np.zeros(5, np.int64),
        token_T=np.zeros(5, np.int64),
    )
    groups: Any = SimpleNamespace(replica=0, context_rank=0, layout=SimpleNamespace(context=1))
    facts = BatchFacts(seed=0, step=0, progress=0.0, rewards={6: 0.0})
    gated, beside = build_method("tropd", gate="correct"), build_method("opd", reward_weight=1.0)
    for method, expected in ((gated, [1, 0, 1, 1]), (beside, [1, 1, 1, 1])):
        [weight_N] = batch_weights([[pack]], method, facts, groups)
        torch.testing.assert_close(torch.from_numpy(weight_N), torch.tensor(expected, dtype=torch.float32))
