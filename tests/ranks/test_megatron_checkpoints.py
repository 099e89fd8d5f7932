"""Checkpoints that plain megatron-core wrote under one layout are the same model under two others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.distributed import run_on_ranks
from tests.support.megatron_reader import LAYOUTS, different_tensors, logit_error, read_all, save_models
from tests.support.megatron_writer import BY_NAME, Written, write_all

# one for every way of writing that is read otherwise; docs/conversion.md has all, by tools/megatron_checkpoints.py
HERE = tuple(BY_NAME[n] for n in ("llama-tp2", "qwen2-pp2", "qwen3-nemo", "qwen3-moe-grouped", "mixtral-singleton"))
READ = ("llama-tp2", "qwen2-pp2", "qwen3-moe-grouped")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("megatron")
    save_models(root, HERE)
    return root


def write_and_read(root: str) -> dict[str, Any]:
    write_all(root, HERE)
    return read_all(READ, root)


@pytest.mark.parametrize("case", HERE, ids=lambda case: case.name)
def test_every_tensor_is_that_of_the_model_bit_for_bit(root: Path, logits: list[dict[str, Any]], case: Written):
    assert different_tensors(case, root) == []


@pytest.fixture(scope="module")
def logits(root: Path) -> list[dict[str, Any]]:
    return run_on_ranks(write_and_read, str(root), world_size=2, timeout_s=300)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", READ)
def test_logits_under_another_layout_are_those_of_transformers(
    root: Path, logits: list[dict[str, Any]], name: str, layout: str
):
    assert logit_error([rank[f"{name} {layout}"] for rank in logits], root / "hf" / name) < 1e-5
