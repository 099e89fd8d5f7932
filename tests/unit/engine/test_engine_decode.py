"""The embedded sampler against uncached `transformers` in fp64, and its draws against a computation by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from megatron_tropd.config.sections import Layout
from megatron_tropd.convert.hf import HFWeights, read_architecture
from megatron_tropd.data.random import Stream, uniforms
from megatron_tropd.engine.decode import sample
from megatron_tropd.errors import ConfigError
from megatron_tropd.parallel.groups import GroupBuilder, Groups, initialize_distributed
from megatron_tropd.rollout.engines.megatron import MegatronSampler
from megatron_tropd.types import Region, RolloutRequest, SamplingParams
from tests.support.distributed import run_on_ranks
from tests.support.run_inputs import save_nudged
from tests.support.tiny_models import STUDENT, load_hf, save_qwen3

VOCAB, LIMIT = STUDENT["vocab_size"], STUDENT["max_position_embeddings"]
SEED, STEP = 11, 3


def request(number: int, prompt: int, prefix: int, budget: int) -> RolloutRequest:
    rng = np.random.default_rng(number)
    return RolloutRequest(
        sequence_id=number,
        prompt_index=100 + number,
        prompt_ids=rng.integers(0, VOCAB, prompt),
        prefix_ids=rng.integers(0, VOCAB, prefix),
        max_new_tokens=budget,
    )


# prompts and prefixes of all lengths, budgets from none to many
REQUESTS = [
    request(number, prompt, prefix, budget)
    for number, (prompt, prefix, budget) in enumerate(
        [(5, 0, 13), (1, 0, 20), (17, 3, 9), (8, 0, 1), (3, 9, 0), (12, 0, 17), (2, 1, 5), (9, 0, 20), (5, 5, 12)]
    )
]
# a long prompt is done soon and waits at the model's last position while the short ones, the most of its batch, go on
AT_THE_LIMIT = [request(50, LIMIT - 3, 0, 3), *(request(51 + i, 2 + i, 0, 12) for i in range(4))]
EVERYTHING = SamplingParams(max_new_tokens=20)


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    params: SamplingParams
    requests: Sequence[RolloutRequest] = tuple(REQUESTS)
    vocab_size: int = VOCAB
    stop_at: int = 0  # the stop tokens are what the plain greedy answers hold at this index and the next


CASES = [
    Case(name="greedy", params=SamplingParams(max_new_tokens=20, temperature=0.0)),
    Case(name="plain", params=EVERYTHING),
    Case(name="shaped", params=SamplingParams(max_new_tokens=20, temperature=0.7, top_p=0.8, top_k=11)),
    Case(name="nucleus", params=SamplingParams(max_new_tokens=20, temperature=1.6, top_p=0.5)),
    Case(name="fewer-ids", params=EVERYTHING, vocab_size=83),
    Case(name="greedy-stops", params=SamplingParams(max_new_tokens=20, temperature=0.0), stop_at=3),
    Case(name="stops-not-yet", params=SamplingParams(max_new_tokens=20, min_new_tokens=4), stop_at=1),
    Case(name="at-the-limit", params=SamplingParams(max_new_tokens=20), requests=tuple(AT_THE_LIMIT)),
]


def with_stops(case: Case, greedy: list[dict[str, Any]]) -> SamplingParams:
    if not case.stop_at:
        return case.params
    at = slice(case.stop_at, case.stop_at + 2)
    stops = {token for row in greedy for token in row["continuation"][at]}
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "min_new_tokens")
    return SamplingParams(**{name: getattr(case.params, name) for name in names}, stop_token_ids=tuple(sorted(stops)))


def generate_all(model: str, layouts: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """On every rank: the rollouts of every case under each (tensor-parallel size, batch size)."""
    builder = GroupBuilder()
    return [generate_cases(model, builder.build(Layout(tensor=tensor)), batch) for tensor, batch in layouts]


def generate_cases(model: str, groups: Groups, batch_size: int) -> dict[str, Any]:
    device, weights = initialize_distributed(), HFWeights(model)
    found: dict[str, Any] = {}
    for case in CASES:
        sampler = MegatronSampler(
            read_architecture(model),
            groups,
            dtype=torch.float32,
            device=device,
            batch_size=batch_size,
            vocab_size=case.vocab_size,
        )
        sampler.update_weights(((name, weights[name][:]) for name in weights), version=7)
        params = with_stops(case, found.get("greedy", []))
        rollouts = sampler.generate(list(case.requests), params, seed=SEED, step=STEP)
        assert all(r.weight_version == 7 for r in rollouts)
        found[case.name] = [
            {
                "ids": (r.sequence_id, r.prompt_index, r.count(Region.PROMPT), r.count(Region.PREFIX)),
                "context": r.token_ids[r.region_L != Region.CONTINUATION].tolist(),
                "continuation": r.token_ids[r.region_L == Region.CONTINUATION].tolist(),
                "sampling": r.sampling_logprob.tolist(),
                "model": r.model_logprob.tolist(),
                "finished": r.finished,
            }
            for r in rollouts
        ]
    too_long = [request(60, LIMIT - 3, 0, 4)]
    with pytest.raises(ConfigError, match=f"exceed the model's {LIMIT} positions"):
        sampler.generate(too_long, EVERYTHING, seed=SEED, step=STEP)
    return found


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen3(tmp_path_factory.mktemp("decode") / "model", STUDENT, tied=True, seed=5)


@pytest.fixture(scope="module")
def rollouts(model: Path) -> dict[str, Any]:
    """What one rank generates, five sequences at a time."""
    found: dict[str, Any] = run_on_ranks(generate_all, str(model), [(1, 5)], world_size=1)[0][0]
    return found


Logits = Callable[[list[int]], np.ndarray]


@pytest.fixture(scope="module")
def logits(model: Path) -> Logits:
    """``[L, V]`` of a whole sequence, uncached and in fp64."""
    reference = load_hf(model)

    def of(tokens: list[int]) -> np.ndarray:
        with torch.no_grad():
            answer: np.ndarray = reference(torch.tensor([tokens])).logits[0].numpy()
        return answer

    return of


@pytest.fixture(scope="module")
def rounding(model: Path, logits: Logits, tmp_path_factory: pytest.TempPathFactory) -> float:
    """What rounding may do to a log-probability: a number of several nats, from logits that are sums of either sign.

    In fp64, how far any moves when every weight is one step of fp32 away, up or down, for the sqrt(n)/2 = 5 steps that
    sums of n = 97 terms (the ids; every other is shorter) are rounded by.
    """
    place = tmp_path_factory.mktemp("nudged")
    moved = load_hf(save_nudged(place / "model", model, seed=0))
    tokens = np.random.default_rng(4).integers(0, STUDENT["vocab_size"], 40).tolist()
    with torch.no_grad():
        changed_LV = moved(torch.tensor([tokens])).logits[0].log_softmax(-1)
    exact_LV = torch.from_numpy(logits(tokens)).log_softmax(-1)
    return 5 * float((changed_LV - exact_LV).abs().max())


def softmax(logits_V: np.ndarray) -> np.ndarray:
    weights = np.exp(logits_V - logits_V.max())
    return weights / weights.sum()


def distribution(logits_V: np.ndarray, params: SamplingParams, step: int) -> tuple[list[int], list[float]]:
    """Ids in the order they are laid out on [0, 1), and their probabilities, by the definitions."""
    logits_V = logits_V.copy()
    if step < params.min_new_tokens:
        logits_V[list(params.stop_token_ids)] = -math.inf
    probability = softmax(logits_V / params.temperature)
    ids = list(range(len(probability)))
    if params.top_k or params.top_p < 1:
        ids.sort(key=lambda i: (-probability[i], i))
        ids = ids[: params.top_k or None]
        total, held, kept = sum(probability[i] for i in ids), 0.0, []
        for i in ids:
            if held >= params.top_p * total:
                break
            kept.append(i)
            held += probability[i]
        ids = kept
    chosen = np.array([probability[i] for i in ids])
    return ids, (chosen / chosen.sum()).tolist()


def drawn(ids: list[int], probability: list[float], uniform: float) -> int:
    """The id whose interval holds ``uniform``."""
    edge = 0.0
    for i, share in zip(ids, probability, strict=True):
        edge += share
        if uniform < edge:
            return i
    return ids[-1]


# --------------------------------------------------------------------------- whole rollouts


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_token_is_the_one_that_its_number_draws(case, rollouts, logits, rounding):
    params = with_stops(case, rollouts["greedy"])
    for wanted, row in zip(case.requests, rollouts[case.name], strict=True):
        context = [*wanted.prompt_ids.tolist(), *wanted.prefix_ids.tolist()]
        assert row["ids"] == (
            wanted.sequence_id,
            wanted.prompt_index,
            len(wanted.prompt_ids),
            len(wanted.prefix_ids),
        )
        assert row["context"] == context
        written = row["continuation"]
        numbers = uniforms(
            seed=SEED, step=STEP, sequence_id=wanted.sequence_id, stream=Stream.SAMPLING, count=len(written)
        )
        whole = logits([*context, *written])[:, : case.vocab_size]
        for i, token in enumerate(written):
            logits_V = whole[len(context) - 1 + i]
            assert row["model"][i] == pytest.approx(math.log(softmax(logits_V)[token]), abs=rounding)
            if params.temperature == 0:
                assert (token, row["sampling"][i]) == (int(logits_V.argmax()), 0.0)
                continue
            ids, probability = distribution(logits_V, params, i)
            assert token == drawn(ids, probability, float(numbers[i]))
            shaped = rounding / min(params.temperature, 1.0)  # logits are divided by it, and so is what they err by
            assert row["sampling"][i] == pytest.approx(math.log(probability[ids.index(token)]), abs=shaped)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_rollout_ends_at_a_stop_token_or_with_its_budget(case, rollouts):
    stops = set(with_stops(case, rollouts["greedy"]).stop_token_ids)
    for wanted, row in zip(case.requests, rollouts[case.name], strict=True):
        written = row["continuation"]
        assert len(row["sampling"]) == len(row["model"]) == len(written) <= wanted.max_new_tokens
        assert not stops & set(written[:-1])
        if written:
            assert row["finished"] == (written[-1] in stops)
        if not row["finished"]:
            assert len(written) == wanted.max_new_tokens


def test_some_rollouts_stop_early_and_none_too_early(rollouts):
    greedy, stopped, held = (rollouts[name] for name in ("greedy", "greedy-stops", "stops-not-yet"))
    assert any(len(a["continuation"]) < len(b["continuation"]) for a, b in zip(stopped, greedy, strict=True))
    for a, b in zip(stopped, greedy, strict=True):
        assert a["continuation"] == b["continuation"][: len(a["continuation"])]
    assert any(row["finished"] for row in held)
    assert all(len(row["continuation"]) >= 4 for row in held if row["finished"])


def test_shaping_the_distribution_changes_what_is_drawn(rollouts):
    """Otherwise the comparisons above would prove little."""
    plain, shaped = ([row["continuation"] for row in rollouts[name]] for name in ("plain", "shaped"))
    assert plain != shaped
    assert max(token for row in rollouts["fewer-ids"] for token in row["continuation"]) < 83
    assert max(token for row in plain for token in row) >= 83


@pytest.fixture(scope="module")
def on_two_ranks(model: Path) -> list[list[dict[str, Any]]]:
    """What each of two ranks ends up with: as replicas of one rank each, then as one replica of both."""
    return run_on_ranks(generate_all, str(model), [(1, 5), (2, 100)], world_size=2)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [0, 1], ids=["two replicas", "tensor parallel"])
def test_every_layout_of_the_sampler_writes_the_same(layout, on_two_ranks, rollouts, rounding):
    coldest = min(case.params.temperature or 1.0 for case in CASES)
    limit = {"model": rounding, "sampling": rounding / min(coldest, 1.0)}
    for rank in on_two_ranks:
        for name, rows in rank[layout].items():
            for found, expected in zip(rows, rollouts[name], strict=True):
                for key in ("ids", "context", "continuation", "finished"):
                    assert found[key] == expected[key], name
                for key in ("sampling", "model"):
                    assert found[key] == pytest.approx(expected[key], abs=limit[key]), name


# --------------------------------------------------------------------------- single draws


LOGITS = torch.tensor([0.3, -1.0, 2.0, 2.0, -5.0, 1.1, 0.0, -0.2, 1.9])
SHAPES = {
    "plain": EVERYTHING,
    "cold": SamplingParams(max_new_tokens=1, temperature=0.3),
    "top-k": SamplingParams(max_new_tokens=1, top_k=3),
    "top-k within a tie": SamplingParams(max_new_tokens=1, top_k=1),
    "top-p": SamplingParams(max_new_tokens=1, top_p=0.75),
    "a nucleus of one": SamplingParams(max_new_tokens=1, top_p=1e-6),
    "all three": SamplingParams(max_new_tokens=1, temperature=2.0, top_k=5, top_p=0.8),
    "a ban": SamplingParams(max_new_tokens=1, stop_token_ids=(2, 5), min_new_tokens=1),
}


@pytest.mark.parametrize("params", SHAPES.values(), ids=SHAPES.keys())
def test_evenly_spread_numbers_draw_tokens_in_their_exact_proportions(params):
    count = 4000
    grid = (torch.arange(count) + 0.5) / count
    stops = torch.tensor(params.stop_token_ids, dtype=torch.long)
    found = sample(LOGITS.expand(count, -1), grid, params, stops=stops)
    ids, probability = distribution(LOGITS.double().numpy(), params, 0)
    exact = dict(zip(ids, probability, strict=True))
    counts = torch.bincount(found.token_B, minlength=len(LOGITS))
    for token, seen in enumerate(counts.tolist()):
        assert abs(seen - count * exact.get(token, 0.0)) <= 1 + 1e-3, token
        assert seen == 0 or token in exact
    expected = torch.tensor([math.log(exact[token]) for token in found.token_B.tolist()])
    # divided by the temperature, less the log of their sum: three roundings of half a step of numbers so large
    step = torch.finfo(torch.float32).eps * float(LOGITS.max() - LOGITS.min())
    rounding = 1.5 * step / min(params.temperature, 1.0)
    torch.testing.assert_close(found.sampling_logprob_B, expected, rtol=0, atol=rounding)
    exact = LOGITS.double().log_softmax(-1)[found.token_B].float()
    torch.testing.assert_close(found.model_logprob_B, exact, rtol=0, atol=1.5 * step)


def test_the_numbers_of_many_sequences_draw_the_distribution():
    count = 5000
    numbers = [uniforms(seed=1, step=2, sequence_id=i, stream=Stream.SAMPLING, count=1)[0] for i in range(count)]
    found = sample(LOGITS.expand(count, -1), torch.tensor(numbers), EVERYTHING)
    observed = torch.bincount(found.token_B, minlength=len(LOGITS)).numpy()
    expected = count * LOGITS.double().softmax(-1).numpy()
    assert chisquare(observed, expected * observed.sum() / expected.sum()).pvalue > 1e-3


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-24], ids=["least", "largest"])
def test_a_token_without_probability_is_never_drawn(uniform):
    logits = torch.tensor([[-math.inf, 1.0, -math.inf, 0.0, -math.inf]])
    found = sample(logits, torch.tensor([uniform]), EVERYTHING)
    assert found.token_B.item() == (1 if uniform == 0.0 else 3)
    assert math.isfinite(found.sampling_logprob_B.item())
