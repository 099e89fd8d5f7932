"""What `student.lora` resolves to, and what of it is refused, each in one sentence that says what to write instead."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megatron_tropd.config.loading import parse_config
from megatron_tropd.config.sections import Layout, StudentConfig
from megatron_tropd.convert.peft import PeftAdapter, write_peft
from megatron_tropd.errors import CheckpointError, ConfigError, StorageError
from megatron_tropd.models.adapters import adapter_shapes
from megatron_tropd.setup.adapters import adapter_spec, base_serves
from megatron_tropd.types import AdapterSpec, Architecture

DENSE = Architecture(
    family="LlamaForCausalLM",
    num_layers=2,
    hidden_size=12,
    ffn_size=14,
    num_heads=4,
    num_kv_heads=2,
    head_dim=3,
    vocab_size=17,
    max_positions=32,
    rope_theta=1e4,
    norm_eps=1e-6,
    tied_embeddings=False,
)
EXPERTS = Architecture(**{**{name: getattr(DENSE, name) for name in DENSE.__slots__}, "family": "Qwen3MoeForCausalLM",
                          "num_experts": 4, "experts_per_token": 2})  # fmt: skip
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
SPEC = AdapterSpec(rank=3, alpha=5.0, dropout=0.0, targets=("q_proj", "o_proj"))


def student(**lora: Any) -> StudentConfig:
    return StudentConfig(model=Path("model"), lora=lora)


def saved(directory: Path, spec: AdapterSpec = SPEC, **settings: Any) -> Path:
    tensors = {name: torch.randn(shape) for name, shape in adapter_shapes(DENSE, spec).items()}
    write_peft(directory, tensors, spec, base="model")
    config = directory / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    return directory


def test_without_keys_every_matrix_of_attention_and_mlp_has_one():
    assert adapter_spec(student(), DENSE) == AdapterSpec(rank=16, alpha=32, dropout=0, targets=ATTENTION + MLP)
    assert adapter_spec(student(), EXPERTS) == AdapterSpec(rank=16, alpha=32, dropout=0, targets=ATTENTION)
    assert adapter_spec(StudentConfig(model=Path("model")), DENSE) is None


def test_targets_are_in_the_models_order_and_the_scale_is_alpha_by_rank():
    spec = adapter_spec(student(rank=4, alpha=6, dropout=0.1, targets=["up_proj", "q_proj"]), DENSE)
    assert spec is not None and spec.targets == ("q_proj", "up_proj") and spec.scale == 1.5


@pytest.mark.parametrize(
    ("targets", "architecture", "said"),
    [
        (["lm_head"], DENSE, "lm_head', which is no matrix of a layer .* stay frozen. Choose among q_proj, k_proj"),
        (["mlp.q_proj"], DENSE, "no matrix of a layer"),
        (["q_proj", "up_proj"], EXPERTS, "up_proj', a matrix of experts, .*target_parameters.* q_proj, k_proj"),
    ],
)
def test_what_can_have_no_adapter_is_refused(targets: list[str], architecture: Architecture, said: str):
    with pytest.raises(ConfigError, match=said):
        adapter_spec(student(targets=targets), architecture)


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"dora": True}, "dora = true is not supported"),
        ({"targets": []}, "names no matrix"),
        ({"targets": ["q_proj", "q_proj"]}, "names a matrix twice"),
        ({"rank": 0}, "student.lora.rank"),
        ({"dropout": 1.0}, "student.lora.dropout"),
        ({"ranks": 4}, "student.lora.ranks"),
    ],
)
def test_keys_that_cannot_be_are_refused(lora: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        parse_config(tree(lora=lora))


def tree(*, lora: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    base = {"run_dir": "run", "student": {"model": "model"}, "teacher": {"model": "teacher"}, "data": {"prompts": "p"}}
    base["student"] = {"model": "model", "lora": lora}
    return {**base, "rollout": {"max_new_tokens": 8}, **more}


def test_an_adapter_is_exported_only_where_there_is_one():
    with pytest.raises(ConfigError, match=r"export.adapter = 'out' has nothing to write"):
        parse_config(tree(lora=None, export={"adapter": "out"}))
    assert parse_config(tree(lora={}, export={"adapter": "out"})).student.lora is not None


def test_the_base_serves_where_model_and_layout_are_the_students(tmp_path: Path):
    config = parse_config(tree(lora={}))
    assert base_serves(config, Path("model"), Layout())
    assert base_serves(config, Path("other/../model"), Layout())
    assert not base_serves(config, Path("model"), Layout(tensor=2))
    assert not base_serves(config, Path("teacher"), Layout())
    assert not base_serves(parse_config(tree(lora=None)), Path("model"), Layout())


# --------------------------------------------------------------------------- adapters on disk


def test_an_adapter_says_rank_alpha_and_targets_itself(tmp_path: Path):
    path = saved(tmp_path / "adapter")
    assert adapter_spec(student(path=path, dropout=0.2), DENSE) == AdapterSpec(
        rank=3, alpha=5.0, dropout=0.2, targets=("q_proj", "o_proj")
    )
    assert adapter_spec(student(path=path, rank=3, alpha=5, targets=["o_proj", "q_proj"]), DENSE) is not None
    for key, value in (("rank", 4), ("alpha", 6), ("targets", ["q_proj"])):
        with pytest.raises(ConfigError, match=rf"student.lora.{key} = .*, but the adapter at .* has"):
            adapter_spec(student(path=path, **{key: value}), DENSE)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, "use_dora = True, which is not supported"),
        ({"use_rslora": True}, "use_rslora = True"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3'"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"a_setting_to_come": 1}, "a_setting_to_come"),
        ({"r": None}, "no r and lora_alpha"),
        ({"r": 4}, "has shape"),
    ],
)
def test_more_than_plain_lora_is_refused_by_its_name(tmp_path: Path, settings: dict[str, Any], said: str):
    with pytest.raises(CheckpointError, match=said):
        PeftAdapter(saved(tmp_path / "adapter", **settings), DENSE)


def test_harmless_settings_are_read_past(tmp_path: Path):
    harmless = {"target_modules": "all-linear", "lora_dropout": 0.5, "peft_version": "9", "rank_pattern": {}}
    assert PeftAdapter(saved(tmp_path / "adapter", **harmless), DENSE).spec == SPEC


def test_an_adapter_of_another_model_is_refused(tmp_path: Path):
    path = saved(tmp_path / "adapter")
    tensors = {name: torch.randn(shape) for name, shape in adapter_shapes(DENSE, SPEC).items()}
    first = next(iter(tensors))
    save_file({name: x for name, x in tensors.items() if name != first}, path / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="adapters of a part of the layers"):
        PeftAdapter(path, DENSE)
    save_file(
        tensors | {"base_model.model.lm_head.lora_A.weight": torch.ones(3, 2)}, path / "adapter_model.safetensors"
    )
    with pytest.raises(CheckpointError, match=r"lm_head.* has no place"):
        PeftAdapter(path, DENSE)
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="pickled adapters are never loaded"):
        PeftAdapter(path, DENSE)
    with pytest.raises(CheckpointError, match=r"has no adapter_config\.json"):
        PeftAdapter(tmp_path, DENSE)


def test_what_was_written_comes_back_to_the_bit_and_foreign_files_are_left(tmp_path: Path):
    tensors = {name: torch.randn(shape) for name, shape in adapter_shapes(DENSE, SPEC).items()}
    for _ in range(2):  # one of ours is replaced
        write_peft(tmp_path / "adapter", tensors, SPEC, base="model")
    found = PeftAdapter(tmp_path / "adapter", DENSE)
    assert all(found[name][:].equal(tensor) for name, tensor in tensors.items()) and len(found) == len(tensors)
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"notes\.txt"):
        write_peft(tmp_path / "adapter", tensors, SPEC, base="model")
    assert (tmp_path / "adapter" / "notes.txt").read_text() == "mine"
