"""Claims about advantages: by hand, with answers that have no reward, and that their means teach what they say."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from megatron_tropd.errors import ConfigError
from megatron_tropd.losses.advantages import ADVANTAGES, advantages

NAN = float("nan")


def test_advantages_by_hand():
    reward_PS = np.array([[1.0, 0.0, 0.0, 2.0], [3.0, 3.0, 3.0, 3.0]])
    # mean 3/4, sum of squares 9 + 16/... : (1/4, -3/4, -3/4, 5/4), squares 1+9+9+25 = 44 sixteenths, over 3
    std = (44 / 16 / 3) ** 0.5
    expected = {
        "raw": [[1, 0, 0, 2], [3, 3, 3, 3]],
        "group_mean": [[0.25, -0.75, -0.75, 1.25], [0, 0, 0, 0]],
        "leave_one_out": [[1 - 2 / 3, -1, -1, 2 - 1 / 3], [0, 0, 0, 0]],
        "normalized": [[x / (std + 1e-6) for x in (0.25, -0.75, -0.75, 1.25)], [0, 0, 0, 0]],
    }
    assert set(expected) == set(ADVANTAGES)
    for kind, by_hand in expected.items():
        np.testing.assert_allclose(advantages(reward_PS, kind), by_hand, rtol=1e-12, atol=1e-15)


def test_an_answer_without_a_reward_changes_nothing_of_the_others():
    for kind in ADVANTAGES:
        known = advantages(np.array([[1.0, 0.0, 2.0]]), kind)[0]
        np.testing.assert_array_equal(advantages(np.array([[1.0, NAN, 0.0, 2.0]]), kind)[0], np.insert(known, 1, 0.0))
        alone = advantages(np.array([[NAN, 4.0, NAN], [NAN, NAN, NAN]]), kind)
        np.testing.assert_array_equal(alone, [[0, 4.0 if kind == "raw" else 0, 0], [0, 0, 0]])


def test_leaving_one_out_is_unbiased_and_the_group_mean_is_smaller_by_one_answer():
    """Over all outcomes of three draws from four answers: the mean of A d log q is the gradient of the mean reward."""
    q, reward = np.array([0.4, 0.3, 0.2, 0.1]), np.array([1.0, -2.0, 0.5, 3.0])
    score = np.eye(4) - q  # d log q(y) / d logits
    truth = (q * reward) @ score
    for kind, share in (("raw", 1.0), ("leave_one_out", 1.0), ("group_mean", 2 / 3)):
        mean = np.zeros(4)
        for drawn in product(range(4), repeat=3):
            ids = list(drawn)
            mean += q[ids].prod() * (advantages(reward[ids][None], kind)[0] @ score[ids]) / 3
        np.testing.assert_allclose(mean, share * truth, rtol=1e-12)


def test_another_kind_is_refused():
    with pytest.raises(ConfigError, match="reward\\.advantage='median' must be one of group_mean, leave_one_out"):
        advantages(np.zeros((1, 2)), "median")  # type: ignore[arg-type]
