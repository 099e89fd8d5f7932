"""What a user can have wrong, or may not have meant, is said before a model is built."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_tropd.methods import build_method
from megatron_tropd.setup.validate import warn_of_biased_sampling, warn_of_few_prompts


@pytest.mark.parametrize(("prompts", "said"), [(3, "asks each of them 2.67 times"), (8, ""), (9, "")])
def test_a_step_that_asks_prompts_more_than_once_says_so(caplog, prompts: int, said: str):
    config = SimpleNamespace(train=SimpleNamespace(prompts_per_step=8))
    warn_of_few_prompts(config, SimpleNamespace(prompts=range(prompts)))  # type: ignore[arg-type]
    assert said in caplog.text and bool(said) == bool(caplog.text)


@pytest.mark.parametrize(
    ("name", "options", "changed", "said"),
    [
        ("opd", {}, {}, ""),
        ("opd", {}, {"temperature": 0.6}, "rollout.temperature=0.6: tokens are not drawn"),
        ("opd", {}, {"top_p": 0.95, "top_k": 20}, "rollout.top_p=0.95 and rollout.top_k=20"),
        ("opd", {"trusted": "k3"}, {"top_p": 0.95}, "the gradient of k3 is biased"),
        ("opd", {"ppo_clip": 0.2}, {"top_k": 5}, "the gradient of k1_pg is biased"),  # its ratio is of whole softmaxes
        ("rkl", {"k": 5}, {"temperature": 0.6}, ""),  # compares distributions at whatever token was drawn
        ("sft", {}, {"temperature": 0.6}, ""),
        ("tropd", {"k": 5}, {"temperature": 0.6}, "the gradient of k1_pg is biased"),
        ("grpo", {}, {"top_p": 0.9}, "the gradient of reward_pg"),
        ("resopd", {"k": 5}, {"top_p": 0.9}, "the gradient of rkl_topk_sampled is biased"),
        ("gkd", {}, {"temperature": 0.7}, ""),
        ("opd", {"temperature": 0.6}, {"temperature": 0.6}, ""),  # both models are taken at the temperature of draws
        ("opd", {"temperature": 0.6}, {}, "rollout.temperature=1: tokens are not drawn"),
    ],
)
def test_draws_from_another_distribution_than_the_objective_takes_them_for_are_said(
    caplog, name: str, options: dict, changed: dict, said: str
):
    rollout = SimpleNamespace(**({"temperature": 1.0, "top_p": 1.0, "top_k": 0} | changed))
    config: Any = SimpleNamespace(rollout=rollout, method=SimpleNamespace(name=name))
    warn_of_biased_sampling(config, build_method(name, **options))
    assert said in caplog.text and bool(said) == bool(caplog.text)
