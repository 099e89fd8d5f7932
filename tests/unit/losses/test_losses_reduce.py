"""Claims about ``losses.reduce``: which mean the loss is, which tokens count, where a quantile lies."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_tropd.errors import ConfigError
from megatron_tropd.losses.reduce import entropy_threshold, special_token_keep, token_weights
from megatron_tropd.types import Region

PROMPT, PREFIX, CONT, PAD = Region.PROMPT, Region.PREFIX, Region.CONTINUATION, Region.PAD
# Three sequences of 1, 4 and 2 valid tokens, and padding.
REGION = np.array([PROMPT, CONT, PROMPT, PREFIX, PREFIX, PREFIX, CONT, CONT, CONT, PAD], dtype=np.uint8)
SEQUENCE = np.array([3, 3, 4, 4, 4, 4, 4, 9, 9, -1])
LOSS = np.array([100.0, 1.0, 100.0, 2.0, 4.0, 6.0, 8.0, 3.0, 5.0, 100.0])


def test_token_weights_are_one_on_valid_tokens():
    np.testing.assert_array_equal(token_weights(REGION, SEQUENCE), [0, 1, 0, 1, 1, 1, 1, 1, 1, 0])


def test_sequence_weights_give_the_mean_of_sequence_means():
    weight = token_weights(REGION, SEQUENCE, normalization="sequence")
    assert weight.dtype == np.float32
    assert weight.sum() == pytest.approx(7)
    assert (weight * LOSS).sum() / 7 == pytest.approx((1.0 + 5.0 + 4.0) / 3)


def test_region_weights_give_the_mean_of_region_means():
    weight = token_weights(REGION, SEQUENCE, normalization="region")
    assert weight.sum() == pytest.approx(7)
    assert (weight * LOSS).sum() / 7 == pytest.approx((4.0 + (1 + 8 + 3 + 5) / 4) / 2)
    only = np.where(REGION == PREFIX, PROMPT, REGION)
    np.testing.assert_allclose(token_weights(only, SEQUENCE, normalization="region"), only == CONT)


@pytest.mark.parametrize("normalization", ["token", "sequence", "region"])
def test_dropped_tokens_leave_loss_and_counts_alone(normalization):
    keep = np.ones(10, dtype=bool)
    keep[[1, 4]] = False  # all of sequence 3, one prefix token of 4
    weight = token_weights(REGION, SEQUENCE, normalization=normalization, keep_T=keep)
    assert weight[1] == weight[4] == 0
    assert weight.sum() == pytest.approx(5)
    if normalization == "sequence":
        assert (weight * LOSS).sum() / 5 == pytest.approx((16 / 3 + 4) / 2)


@pytest.mark.parametrize("normalization", ["token", "sequence", "region"])
def test_a_batch_without_valid_tokens_has_no_weight(normalization):
    weight = token_weights(np.array([PROMPT, PAD], dtype=np.uint8), np.array([0, -1]), normalization=normalization)
    np.testing.assert_array_equal(weight, [0, 0])


def test_unknown_normalization_is_refused():
    with pytest.raises(ConfigError, match="normalization='batch' must be one of token, sequence, region"):
        token_weights(REGION, SEQUENCE, normalization="batch")


def test_special_tokens_lose_their_loss_in_valid_regions_only():
    target = np.array([50, 50, 7, 50, 51, 50, 51, 7, 50, 50])
    keep = special_token_keep(target, SEQUENCE, REGION, special_ids=[50, 51])
    np.testing.assert_array_equal(keep, [1, 0, 1, 0, 0, 0, 0, 1, 0, 1])


def test_only_the_first_occurrence_of_each_special_token_is_dropped_per_sequence():
    target = np.array([50, 50, 7, 50, 51, 50, 51, 7, 50, 50])
    keep = special_token_keep(target, SEQUENCE, REGION, special_ids=(50, 51), first_only=True)
    np.testing.assert_array_equal(keep, [1, 0, 1, 0, 0, 1, 1, 1, 0, 1])


def test_no_special_ids_keep_everything():
    assert special_token_keep(np.arange(10), SEQUENCE, REGION, special_ids=[], first_only=True).all()


def test_entropy_threshold_leaves_the_share_strictly_above():
    entropy = np.random.default_rng(0).permutation(np.linspace(0.1, 3.0, 101)).astype(np.float32)
    assert (entropy > entropy_threshold(entropy, fraction=0.2)).sum() == 20
    few = np.arange(9, dtype=np.float32)
    for fraction, above in ((0.2, 2), (0.3, 3), (0.6, 5), (0.05, 0)):  # 1.8, 2.7, 5.4 and 0.45 of 9: the nearest
        assert (few > entropy_threshold(few, fraction=fraction)).sum() == above
    assert entropy_threshold(entropy, fraction=0.2) == entropy_threshold(entropy[::-1], fraction=0.2)
    assert entropy_threshold(np.empty(0, dtype=np.float32), fraction=0.2) == 0.0
    assert (np.float32([2.0, 1.0]) > entropy_threshold(np.float32([2.0, 1.0]), fraction=0.99)).sum() == 1
    with pytest.raises(ConfigError, match=r"fraction 1\.0 must lie"):
        entropy_threshold(entropy, fraction=1.0)
