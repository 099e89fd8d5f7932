"""Tests with real vLLM: where they run, and tiny models that it can serve."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from tests.support.run_inputs import Commands, commands, save_model

REQUIRED = os.environ.get("MEGATRON_TROPD_REQUIRE_VLLM", "0") == "1"
INSTALLED = importlib.util.find_spec("vllm") is not None
needs_vllm = pytest.mark.skipif(
    not INSTALLED and not REQUIRED, reason="vLLM is not installed here: `make test-vllm` runs these in .venv-vllm"
)

# head sizes that vLLM's CPU attention knows; the rest odd where tensor parallelism over 2 ranks lets it be
SIZES = {
    "hidden_size": 52,
    "intermediate_size": 70,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 160,
}
TEACHER = {**SIZES, "hidden_size": 44, "num_hidden_layers": 2, "num_attention_heads": 2}
# settings of a run in which vLLM is as small as its models
SMALL = ("rollout.vllm.cache_mib=16", "rollout.vllm.max_sequences=16", "rollout.vllm.options={block_size: 32}")


def small_model(directory: Path, *, tied: bool, seed: int = 3) -> Path:
    """A random Qwen3 directory."""
    return save_model(directory, SIZES, tied=tied, seed=seed)


def vllm_commands() -> Commands:
    """Runs functions and commands in forks of a process that has imported vLLM."""
    return commands("tests.support.vllm_preload")
