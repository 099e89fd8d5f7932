"""Metrics of a step of several minibatches are means over its tokens, by hand."""

from __future__ import annotations

import pytest

from megatron_tropd.engine.step import StepResult, means_over_tokens


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


def test_a_minibatch_without_tokens_counts_for_nothing():
    assert means_over_tokens([StepResult(0.0, 0.0, 0.0, {})]) == (0.0, {})
