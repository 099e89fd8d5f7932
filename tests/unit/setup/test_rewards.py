"""A user's function that rewards answers: how it is loaded, what it may take, and what is refused by name."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_tropd.config.loading import parse_config
from megatron_tropd.config.run import RunConfig
from megatron_tropd.errors import ConfigError
from megatron_tropd.setup.rewards import GIVEN, check_answers, check_rewards, reward_function
from megatron_tropd.setup.validate import check_ahead, check_method

ROOT = Path(__file__).resolve().parents[3]
RIGHT = "def points(responses):\n    return [2.5 for _ in responses]\n"


def write(place: Path, body: str) -> str:
    (place / "rewards.py").write_text(body)
    return f"{place}/rewards.py:points"


def config(method: dict[str, Any], **sections: Any) -> RunConfig:
    plain = {"student": {"model": "s"}, "teacher": {"model": "t"}, "data": {"prompts": "p"}}
    return parse_config({**plain, "method": method, **sections})


def refusal(method: dict[str, Any], **sections: Any) -> str:
    found = config(method, **sections)
    with pytest.raises(ConfigError) as refused:
        check_rewards(found, check_method(found))
    return str(refused.value)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (None, "cannot read .*rewards.py .No such file"),
        ("x = 1\n", "has no function 'points'. It has none at all"),
        ("points = 3\n", "has no function 'points'"),
        ("def point(responses):\n    return 1\n", "has no function 'points'. It has point"),
        ("1 / 0\n", "raises ZeroDivisionError: division by zero. Mend the file"),
        ("import sys\nsys.exit(3)\n", "raises SystemExit: 3"),
        ("def points(responses, reference):\n    pass\n", "takes reference, which nobody gives it"),
        ("def points(responses, /):\n    pass\n", "takes responses, which nobody gives it"),
        ("def points(prompt, answer):\n    pass\n", "does not take responses"),
        ("async def points(responses):\n    pass\n", "is asynchronous"),
    ],
)
def test_a_function_that_cannot_be_called_is_one_error(tmp_path: Path, body: str | None, message: str):
    written = f"{tmp_path}/rewards.py:points" if body is None else write(tmp_path, body)
    with pytest.raises(ConfigError, match=rf"reward\.function={written}:? .*{message}"):
        reward_function(written)


def test_a_function_is_given_what_it_names(tmp_path: Path):
    found = reward_function(write(tmp_path, RIGHT))
    assert found is not None and found.takes == ("responses",) and found.call(responses=["a", "b"]) == [2.5, 2.5]
    again = reward_function(write(tmp_path, RIGHT + "\n# another\n"))
    assert again is not None and again.fingerprint != found.fingerprint
    every = reward_function(write(tmp_path, "def points(responses, scale=2, **more):\n    return [scale]\n"))
    assert every is not None and every.takes == GIVEN
    some = reward_function(write(tmp_path, "def points(answer, *, tokens, responses, scale=2):\n    return [scale]\n"))
    assert some is not None and set(some.takes) == {"answer", "tokens", "responses"}
    assert reward_function(None) is None


def test_the_example_rewards_what_it_says():
    found = reward_function(f"{ROOT}/examples/rewards.py:right_and_short")
    assert found is not None and found.takes == ("responses", "answer", "tokens", "finished")
    given = {"responses": ["it is 1,042", "1042 or 7", "#### 1042"], "tokens": [10, 20, 30], "finished": [1, 1, 0]}
    assert found.call(answer="1042", **given) == pytest.approx([0.99, -0.02, -0.03])
    assert found.call(answer=None, **given) == [None] * 3
    varied = reward_function(f"{ROOT}/examples/rewards.py:varied")
    assert varied is not None
    assert varied.call(responses=["abba", "aaa", ""]) == pytest.approx([math.log(2), 0.0, 0.0])


def test_what_cannot_be_rewarded_is_refused_by_name(tmp_path: Path):
    grpo = {"name": "grpo"}
    assert "does not look at rewards" in refusal({"name": "opd"}, reward={"advantage": "raw"})
    assert "leaves nothing to compare" in refusal(grpo, rollout={"samples_per_prompt": 1})
    assert "rollout.samples_per_prompt=0" in refusal(grpo, rollout={"samples_per_prompt": 0})
    assert "cannot read" in refusal(grpo, reward={"function": "/nowhere/x.py:points"})
    for method, sections in (
        (grpo, {"rollout": {"samples_per_prompt": 1}, "reward": {"advantage": "raw"}}),
        ({"name": "tropd", "gate": "correct"}, {"rollout": {"samples_per_prompt": 0}}),
        ({"name": "opd", "reward_weight": 0.5}, {"reward": {"function": write(tmp_path, RIGHT)}}),
    ):
        found = config(method, **sections)
        check_rewards(found, check_method(found))
    with pytest.raises(ConfigError, match=r"function = 'rewards\.points' is not PATH\.py:NAME"):
        config(grpo, reward={"function": "rewards.points"})


class Answered:
    """As much of a table of prompts as is asked."""

    def __init__(self, *answered: bool) -> None:
        self._answered = np.array(answered)

    def answered(self) -> np.ndarray:
        return self._answered

    def __len__(self) -> int:
        return len(self._answered)


def test_prompts_without_an_answer_are_counted_or_all_of_them_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    none, some, every = Answered(False, False), Answered(True, False, True), Answered(True)
    grpo = config({"name": "grpo"})
    method = check_method(grpo)
    with pytest.raises(ConfigError, match=r"no prompt has a reference answer\. Give data\.columns\.answer"):
        check_answers(grpo, method, none)  # type: ignore[arg-type]
    check_answers(grpo, method, every)  # type: ignore[arg-type]
    assert caplog.text == ""
    check_answers(grpo, method, some)  # type: ignore[arg-type]
    assert "1 of 3 prompts have no reference answer" in caplog.text
    own = config({"name": "grpo"}, reward={"function": write(tmp_path, RIGHT)})
    check_answers(own, method, none)  # type: ignore[arg-type]
    opd = config({"name": "opd"})
    check_answers(opd, check_method(opd), none)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "its reward_pg has no importance ratio .* Set method.reward_clip=0.2, take"),
        (
            {"reward_clip": 0.2, "reference_weight": 0.1},
            "its reference_k3 has .* Set method.reference=pg with method.reward_clip=0.2, take",
        ),
        ({"reward_clip": 0.2, "reference_weight": 0.1, "reference": "pg"}, None),
    ],
)
def test_old_rollouts_want_an_importance_ratio_of_rewards_too(options: dict[str, Any], message: str | None):
    found = config(
        {"name": "grpo", **options},
        rollout={"ahead": 1, "engine": "vllm_server", "vllm_server": {"urls": ["http://127.0.0.1:1"]}},
    )
    if message is None:
        check_ahead(found, check_method(found))
        return
    with pytest.raises(ConfigError, match=message):
        check_ahead(found, check_method(found))
