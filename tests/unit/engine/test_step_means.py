"""Metrics of a step of several minibatches are means over its tokens, by hand."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_tropd.engine.step import StepResult, Trainer, _Sums, means_over_tokens


def test_minibatches_of_unequal_sizes_give_the_mean_over_tokens_not_over_minibatches():
    one = StepResult(2.0, 1.0, 1e-3, {"reverse_kl": 1.0, "logprob_gap_max": 0.3}, weight=3.0, counts={"reverse_kl": 9})
    two = StepResult(
        5.0,
        1.0,
        1e-3,
        {"reverse_kl": 4.0, "prefix_nll": 7.0, "logprob_gap_max": 0.2},
        weight=1.0,
        counts={"reverse_kl": 3, "prefix_nll": 2},
    )
    loss, stats = means_over_tokens([one, two])
    assert loss == pytest.approx(2.75)  # (3 * 2 + 5) / 4; the mean of the two is 3.5
    assert stats["reverse_kl"] == pytest.approx(1.75)  # (9 * 1 + 3 * 4) / 12
    assert stats["prefix_nll"] == 7.0  # of the one minibatch that has such tokens
    assert stats["logprob_gap_max"] == 0.3


def test_a_statistic_with_weights_of_its_own_is_a_mean_under_them_over_packs_and_minibatches():
    zero = torch.zeros((), dtype=torch.float64)
    sums = _Sums(zero, zero, zero, zero)
    inside = torch.tensor([True, True, False])
    sums.add("stuck_fraction", torch.tensor([1.0, 0.0, 1.0]), inside, torch.tensor([0.5, 0.25, 9.0]))
    sums.add("stuck_fraction", torch.tensor([1.0]), torch.tensor([True]), torch.tensor([0.25]))
    assert (float(sums.stats["stuck_fraction"]), float(sums.counts["stuck_fraction"])) == (0.75, 1.0)
    one = StepResult(0.0, 1.0, 1e-3, {"stuck_fraction": 0.75}, counts={"stuck_fraction": 1.0})
    two = StepResult(0.0, 1.0, 1e-3, {"stuck_fraction": 0.0}, counts={"stuck_fraction": 0.5})
    assert means_over_tokens([one, two])[1]["stuck_fraction"] == pytest.approx(0.5)  # 0.75 / 1.5


def test_a_minibatch_without_tokens_counts_for_nothing():
    assert means_over_tokens([StepResult(0.0, 0.0, 0.0, {})]) == (0.0, {})


@pytest.mark.parametrize(("weight", "said"), [(1.0, "No weight was changed"), (float("nan"), "not a number since")])
def test_an_update_that_fails_over_weights_that_are_no_numbers_does_not_say_that_none_was_changed(weight, said):
    layer = torch.nn.Linear(2, 2)
    layer.bias.data[1] = weight
    trainer: Any = SimpleNamespace(model=SimpleNamespace(chunks=[layer]))
    assert said in Trainer._blame(trainer, 3)
