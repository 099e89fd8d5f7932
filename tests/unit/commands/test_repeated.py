"""A key that is given twice is said to be, with the value that counts."""

from __future__ import annotations

import warnings

import pytest

from megatron_tropd.cli import _say_repeated


def test_a_key_given_twice_is_named_with_the_value_that_counts():
    with pytest.warns(UserWarning, match=r"train.steps is given twice: 4 counts, 3 does not"):
        _say_repeated(["train", "my.yaml", "train.steps=3", "seed=1", "train.steps=4"])


def test_the_same_value_twice_and_options_are_fine():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _say_repeated(["train.steps=3", "train.steps=3", "--template-option=a=1", "--template-option=b=2", "x.yaml"])
