"""Sampled answers show the gate that training applies: built by the same function, from the same facts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_tropd.methods import PRESETS
from megatron_tropd.parallel.groups import GroupBuilder
from megatron_tropd.report.records import SampleToken
from megatron_tropd.report.stopwatch import Stopwatch
from megatron_tropd.train.loop import score_and_pack
from megatron_tropd.train.rewards import BatchRewards
from megatron_tropd.train.rollout_queue import score_rollouts
from megatron_tropd.train.sample_report import _gate_by_sequence, _sample_tokens
from tests.support.distributed import run_on_ranks
from tests.support.layout_cases import STEPS, VOCAB, Case, assemble, config_of, save_models
from tests.support.tiny_models import random_rollouts

# of two stages, the second begins in the middle; another temperature, another support
VARIANTS = {"tropd at 0.8": {"name": "tropd", "temperature": 0.8}, "opd, union": {"name": "fkl", "support": "union"}}
METHODS = {name: {"name": name} for name in PRESETS} | VARIANTS
METHODS["opd, union"] |= {"form": "topk", "k": 5}
METHODS["sdft"] |= {"k": 9}  # within the models' ids
METHODS["right answers"] = {"name": "tropd", "gate": ["soft", "correct"], "k": 5}
# of the eleven answers of a batch every second one is right, and one is not known
REWARDS = BatchRewards(rewards={i: i % 2.0 for i in range(10)}, advantages={i: i % 2 - 0.5 for i in range(10)})


def shares(models: str) -> dict[str, list[dict[str, Any]]]:
    """By method, at the first and at the last step: the metric of a training step, and what the report's tokens say."""
    builder, found = GroupBuilder(), {}
    for name, method in METHODS.items():
        run = assemble(config_of(Case(name=name, method=method), Path(models)), builder)
        tokenizer: Any = SimpleNamespace(eos_ids=(0,), tokens=lambda ids: [str(number) for number in ids])
        run = replace(run, tokenizer=tokenizer)
        found[name] = [shares_at(run, step) for step in (0, STEPS - 1)]
    return found


def shares_at(run: Any, step: int) -> dict[str, Any]:
    rollouts = random_rollouts(step, vocab_size=VOCAB)
    scored, watch = score_rollouts(run, rollouts, watch=Stopwatch()), Stopwatch()
    [packs] = score_and_pack(run, scored, step=step, watch=watch, rewards=REWARDS)
    stats = run.trainer.probe(packs).stats
    gates = _gate_by_sequence(run, rollouts, step=step, rewards=REWARDS)
    tokens: list[SampleToken] = []
    for rollout in rollouts:
        tokens += _sample_tokens(run, rollout, gates.get(rollout.sequence_id))
    own = [token for token in tokens if token.region == "continuation"]
    assert all((token.trust is None) == (token.region == "prefix") for token in tokens)
    assert all(token.trusted == (token.trust is not None and token.trust > 0.5) for token in own)
    return {
        "metric": stats["trusted_fraction"],
        "tokens": sum(token.trust or 0.0 for token in own) / len(own),
        "reverse_kl": stats["reverse_kl"],
        "log_ratio": sum(token.log_ratio or 0.0 for token in own) / len(own),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    models = save_models(tmp_path_factory.mktemp("models"))
    return run_on_ranks(shares, str(models), world_size=1)[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", METHODS)
def test_samples_and_metrics_agree_on_the_trusted_share(found: dict[str, list[dict[str, Any]]], name: str):
    for values in found[name]:
        assert values["tokens"] == pytest.approx(values["metric"], rel=1e-5, abs=1e-6), values
        assert values["log_ratio"] == pytest.approx(-values["reverse_kl"], rel=1e-4, abs=1e-5), values


def test_gates_by_entropy_trust_the_share_that_they_name(found: dict[str, list[dict[str, Any]]]):
    """0.2 of all tokens of the batch; PREFIX tokens count in it, so that of the others it is nearly that."""
    for name, step in (("entropy_opd", 0), ("entropy_opd", 1), ("reopold", 1)):
        assert 0.1 < found[name][step]["tokens"] < 0.35, found[name]
    assert found["opd"][0]["tokens"] == found["opd"][1]["tokens"] == 1.0
