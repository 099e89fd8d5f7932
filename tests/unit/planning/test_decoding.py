"""The cost of sampling with the trainer's own model on a GPU is said; from a billion parameters on, vLLM is advised."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_tropd.planning.decoding import advice, host_seconds

LAYERS_36: Any = SimpleNamespace(num_layers=36, num_experts=0)
LAYERS_48_OF_128: Any = SimpleNamespace(num_layers=48, num_experts=128)


def test_a_token_costs_the_calls_of_its_layers_and_a_mixture_those_of_every_expert():
    assert host_seconds(LAYERS_36) == pytest.approx(4172 * 5e-6)
    assert host_seconds(LAYERS_48_OF_128) == pytest.approx((68 + 48 * (114 + 1280)) * 5e-6)


def test_vllm_is_recommended_from_a_billion_parameters_on():
    small, large = (advice(LAYERS_36, count, new_tokens=8192) for count in (0.6e9, 8.2e9))
    assert small == "about 21 ms of Python per token of a batch, 171 s for its longest"
    assert large.startswith(small) and "Use vLLM on a GPU (rollout.engine=vllm" in large
