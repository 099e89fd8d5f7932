"""The suite's ranks are many to a machine and talk by gloo: a GPU is hidden from all tests but those marked for one."""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests import conftest


def test_a_gpu_is_hidden_from_the_tests_and_from_what_they_start():
    assert conftest.ON_GPU or os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.gpu
def test_on_a_gpu_only_the_tests_that_are_for_one_are_run(request: pytest.FixtureRequest):
    mine = request.node
    other: Any = next((item for item in request.session.items if item.get_closest_marker("gpu") is None), None)
    if other is not None:  # there are none where they have been left out
        assert conftest.of_this_device([other, mine], on_gpu=True) == [mine]
        assert conftest.of_this_device([other, mine], on_gpu=False) == [other, mine]
