"""Rewards of whole answers: the gradient is GRPO's and RLOO's, wherever the answers of a group are learned from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_tropd.parallel.groups import GroupBuilder
from megatron_tropd.report.stopwatch import Stopwatch
from megatron_tropd.setup.rewards import RewardFunction
from megatron_tropd.train.loop import score_and_pack
from megatron_tropd.train.metrics import of_rewards
from megatron_tropd.train.rewards import reward_batch
from megatron_tropd.train.rollout_queue import score_rollouts
from megatron_tropd.types import Prompt, Rollout, single_turn
from tests.support.distributed import run_on_ranks
from tests.support.layout_cases import VOCAB, Case, assemble, config_of, whole_gradients
from tests.support.tiny_models import STUDENT, TEACHER, hf_logprobs, load_hf, relative_error, save_qwen3

PROMPTS, SAMPLES = 3, 4  # and of every prompt one more, guided, which is in no group
UNKNOWN = (1, 2)  # prompt and sample of an answer that nobody can judge
WEIGHT, REFERENCE = 0.7, 0.3
PLAIN = {"prefix_schedule": "none", "outlier": "mask"}
# the method, and reward.advantage
OBJECTIVES: dict[str, tuple[dict[str, Any], str]] = {
    "group mean": ({"name": "grpo"}, "group_mean"),
    "raw": ({"name": "grpo", "reward_weight": WEIGHT}, "raw"),
    "RLOO and the reverse KL to a reference": (
        {"name": "grpo", "reference_weight": REFERENCE, "reference": "pg"},
        "leave_one_out",
    ),
    "GRPO and its KL to a reference": ({"name": "grpo", "reference_weight": REFERENCE}, "normalized"),
    "beside distillation": ({"name": "opd", "reward_weight": WEIGHT}, "normalized"),
    "right answers alone": ({"name": "tropd", "gate": "correct", **PLAIN}, "group_mean"),
}
WORLDS = {"one rank": (1, {}), "groups over two replicas, two tensor ranks each": (4, {"tensor": 2})}


def prompts() -> list[Prompt]:
    rng = np.random.default_rng(1)
    return [Prompt(index=i, token_ids=rng.integers(1, VOCAB, 3 + i), text=f"prompt {i}") for i in range(PROMPTS)]


def answers() -> list[Rollout]:
    rng = np.random.default_rng(2)
    found = []
    for prompt in prompts():
        for sample in range(SAMPLES + 1):
            written, prefix = int(rng.integers(1, 14)), 2 * (sample == SAMPLES)
            tokens = np.concatenate([prompt.token_ids, rng.integers(1, VOCAB, prefix + written)])
            logprob = rng.uniform(-4, 0, written).astype(np.float32)
            found.append(
                Rollout(
                    sequence_id=len(found),
                    prompt_index=prompt.index,
                    token_ids=tokens,
                    region_L=single_turn(prompt=len(prompt.token_ids), prefix=prefix, continuation=written),
                    sampling_logprob=logprob,
                    model_logprob=logprob,
                    finished=True,
                )
            )
    return found


def worth(prompt: int, response: str) -> float:
    """All answers to the last prompt fare alike."""
    return 0.5 if prompt == PROMPTS - 1 else len(response) % 5 - 1.5


def judged(prompt: str, responses: list[str]) -> list[float | None]:
    """The user's function."""
    number = int(prompt.removeprefix("prompt "))
    return [None if (number, i) == UNKNOWN else worth(number, text) for i, text in enumerate(responses)]


class Letters:
    """A letter for every token, and more."""

    eos_ids = (0,)

    def response_text(self, ids: list[int]) -> str:
        return "x" * (sum(map(int, ids)) % 17)


def gradients(models: str, ranks: int, student: dict[str, int]) -> dict[str, Any]:
    """On every rank: loss, gradients under HF names and metrics of each objective."""
    builder, found = GroupBuilder(), {}
    function = RewardFunction("own.py:judged", judged, ("prompt", "responses"), "")
    for name, (method, advantage) in OBJECTIVES.items():
        case = Case(name="", ranks=ranks, student=student, method=method, pack_tokens=48, base={})
        config = config_of(case, Path(models))
        config = config.model_copy(
            update={
                "reward": config.reward.model_copy(update={"advantage": advantage}),
                "rollout": config.rollout.model_copy(update={"samples_per_prompt": SAMPLES, "guided_per_prompt": 1}),
            }
        )
        letters: Any = Letters()
        run = replace(assemble(config, builder), tokenizer=letters, reward_function=function)
        given, watch = answers(), Stopwatch()
        rewards = reward_batch(run, prompts(), given, step=0)
        [packs] = score_and_pack(run, score_rollouts(run, given, watch=watch), step=0, watch=watch, rewards=rewards)
        result = run.trainer.probe(packs)
        owners: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(owners, sorted({int(i) for item in packs for i in item.pack.sequence_ids}))
        whole = whole_gradients(run.student)
        found[name] = {
            "loss": result.loss,
            "predictions": result.predictions,
            "gradients": whole if dist.get_rank() == 0 else {},
            "owners": owners,
            "metrics": of_rewards(rewards),
        }
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    save_qwen3(directory / "untied", STUDENT, seed=1)
    save_qwen3(directory / "teacher", TEACHER, seed=3)
    save_qwen3(directory / "base", STUDENT, seed=6)
    return directory


@pytest.fixture(scope="module", params=WORLDS)
def found(request: pytest.FixtureRequest, models: Path) -> dict[str, Any]:
    ranks, student = WORLDS[request.param]
    return run_on_ranks(gradients, str(models), ranks, student, world_size=ranks, timeout_s=280)[0]


# --------------------------------------------------------------------------- the same in plain fp64


def advantages_by_hand(rewards: list[float | None], kind: str) -> list[float]:
    known = [r for r in rewards if r is not None]
    mean, others = sum(known) / len(known), len(known) - 1
    std = (sum((r - mean) ** 2 for r in known) / others) ** 0.5
    over = {
        "raw": lambda r: r,
        "group_mean": lambda r: r - mean,
        "leave_one_out": lambda r: r - (sum(known) - r) / others,
        "normalized": lambda r: (r - mean) / (std + 1e-6),
    }[kind]
    return [0.0 if r is None else over(r) for r in rewards]


def loss_by_hand(models: Path, name: str, student: Any) -> tuple[torch.Tensor, int]:
    """The loss, and what it is divided by."""
    (method, kind), letters, given = OBJECTIVES[name], Letters(), answers()
    teacher, base = load_hf(models / "teacher"), load_hf(models / "base")
    total, count = torch.zeros((), dtype=torch.float64), 0
    for number in range(PROMPTS):
        group = given[number * (SAMPLES + 1) : (number + 1) * (SAMPLES + 1)]
        texts = [letters.response_text(one.token_ids[one.prompt_length :].tolist()) for one in group]
        rewards = [None if (number, i) == UNKNOWN else worth(number, text) for i, text in enumerate(texts)]
        over = [*advantages_by_hand(rewards[:SAMPLES], kind), 0.0]
        for one, reward, advantage in zip(group, rewards, over, strict=True):
            begin = int(np.flatnonzero(one.region_L == 2)[0])
            target = torch.from_numpy(one.token_ids[begin:])[:, None]
            logq, logp, logb = (
                hf_logprobs(model, one.token_ids, VOCAB)[begin - 1 :].gather(1, target)[:, 0]
                for model in (student, teacher, base)
            )
            logp, logb = logp.detach(), logb.detach()
            count += len(one.token_ids) - one.prompt_length
            if method["name"] == "tropd":
                if reward is None:  # in neither loss nor denominator
                    count -= len(logq)
                elif reward >= 0.5:
                    total = total - ((logp - logq.detach()) * logq).sum()
                continue
            total = total - method.get("reward_weight", 1.0) * (advantage * logq).sum()
            if method["name"] == "opd":
                total = total - ((logp - logq.detach()) * logq).sum()
            if method.get("reference") == "pg":
                total = total - REFERENCE * ((logb - logq.detach()) * logq).sum()
            elif "reference_weight" in method:
                ratio = logb - logq
                tangent = (np.exp(3) - 1) * (ratio - 3) + np.exp(3) - 1 - 3
                total = total + REFERENCE * torch.where(ratio > 3, tangent, ratio.exp() - 1 - ratio).sum()
    return total / count, count


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_is_that_of_plain_fp64(found: dict[str, Any], models: Path, name: str):
    student = load_hf(models / "untied")
    loss, count = loss_by_hand(models, name, student)
    loss.backward()
    here = found[name]
    assert here["predictions"] == count
    assert here["loss"] == pytest.approx(loss.item(), rel=1e-5, abs=1e-6)
    truth = {key: parameter.grad for key, parameter in student.named_parameters()}
    assert here["gradients"].keys() == truth.keys()
    flat = [torch.cat([of[key].double().flatten() for key in truth]) for of in (here["gradients"], truth)]
    assert relative_error(*flat) < 1e-5
    assert float(torch.nn.functional.cosine_similarity(*flat, dim=0)) > 1 - 1e-10
    assert float(flat[0].norm() / flat[1].norm()) == pytest.approx(1.0, rel=1e-5)


def test_groups_are_split_over_the_replicas(found: dict[str, Any]):
    owners = found["raw"]["owners"]
    if len(owners) > 1:
        replicas = [set(owners[0]), set(owners[-1])]
        groups = [set(range(i * (SAMPLES + 1), (i + 1) * (SAMPLES + 1))) for i in range(PROMPTS)]
        assert any(group & replicas[0] and group & replicas[1] for group in groups)
    assert set().union(*map(set, owners)) == set(range(PROMPTS * (SAMPLES + 1)))


def test_metrics_count_what_was_rewarded(found: dict[str, Any]):
    letters, rewards = Letters(), []
    for number, one in enumerate(answers()):
        place = divmod(number, SAMPLES + 1)
        if place != UNKNOWN and place[1] < SAMPLES:
            text = letters.response_text(one.token_ids[one.prompt_length :].tolist())
            rewards.append(worth(one.prompt_index, text))
    for name in OBJECTIVES:
        assert found[name]["metrics"]["reward_missing"] == 1
        assert found[name]["metrics"]["reward_mean"] == pytest.approx(np.mean(rewards))
    assert found["raw"]["metrics"]["reward_advantage"] == pytest.approx(np.mean(np.abs(rewards)))
