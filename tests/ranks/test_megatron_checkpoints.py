"""Checkpoints that plain megatron-core wrote under one layout are the same model under two others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.support.distributed import run_on_ranks
from tests.support.megatron_reader import (
    LAYOUTS,
    different_tensors,
    loaded_by_megatron,
    logit_error,
    read_all,
    save_models,
    write_ours,
)
from tests.support.megatron_writer import BY_NAME, Written, write_all

# one for every way of writing that is read otherwise; docs/conversion.md has all, by tools/megatron_checkpoints.py
HERE = tuple(BY_NAME[n] for n in ("llama-tp2", "qwen2-pp2", "qwen3-nemo", "qwen3-moe-grouped", "mixtral-singleton"))
# layout that we write -> the model under which plain megatron-core loads it
OUT = {
    "bridge": Written(name="qwen2-pp2", family="qwen2-tied", tensor=2),
    "megatron-lm": Written(name="qwen3-moe-grouped", family="qwen3-moe-raw", expert=2),
}
READ = ("llama-tp2", "qwen2-pp2", "qwen3-moe-grouped")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("megatron")
    save_models(root, HERE)
    return root


def write_and_read(root: str) -> dict[str, Any]:
    write_all(root, HERE)
    found = read_all(READ, root)
    for layout, case in OUT.items():
        write_ours(root, layout, case)
    return found | {layout: loaded_by_megatron(root, layout, case) for layout, case in OUT.items()}


@pytest.mark.parametrize("case", HERE, ids=lambda case: case.name)
def test_every_tensor_is_that_of_the_model_bit_for_bit(root: Path, logits: list[dict[str, Any]], case: Written):
    assert different_tensors(case, root) == []


@pytest.fixture(scope="module")
def logits(root: Path) -> list[dict[str, Any]]:
    return run_on_ranks(write_and_read, str(root), world_size=2, timeout_s=500)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", READ)
def test_logits_under_another_layout_are_those_of_transformers(
    root: Path, logits: list[dict[str, Any]], name: str, layout: str
):
    assert logit_error([rank[f"{name} {layout}"] for rank in logits], root / "hf" / name) < 1e-5


@pytest.mark.parametrize("layout", OUT)
def test_what_we_write_is_loaded_strictly_by_plain_megatron_core_bit_for_bit(
    root: Path, logits: list[dict[str, Any]], layout: str
):
    assert [rank[layout] for rank in logits] == [[], []]
    case = OUT[layout]
    written = Written(name=f"ours-{layout}", family=case.family)
    (root / "hf" / written.name).symlink_to(root / "hf" / case.name)
    assert different_tensors(written, root) == []


def test_what_bridge_finds_beside_it_describes_the_model(root: Path, logits: list[dict[str, Any]]):
    place = root / "ours-bridge" / "iter_0000000"
    model = yaml.safe_load((place / "run_config.yaml").read_text())["model"]
    said = {
        name: model[name] for name in ("num_layers", "hidden_size", "num_query_groups", "add_qkv_bias", "vocab_size")
    }
    assert said == {"num_layers": 2, "hidden_size": 40, "num_query_groups": 2, "add_qkv_bias": True, "vocab_size": 101}
    assert model["share_embeddings_and_output_weights"] is True and model["rotary_base"] == 3000
    assert torch.load(root / "ours-bridge" / "latest_train_state.pt", weights_only=True)["step"] == 0
    assert (place / "tokenizer" / "config.json").is_file()
    assert (root / "ours-megatron-lm" / "latest_checkpointed_iteration.txt").read_text() == "release"
    common = torch.load(root / "ours-megatron-lm" / "release" / "common.pt", weights_only=True)
    assert common["iteration"] == 0 and common["checkpoint_version"] == 3.0
