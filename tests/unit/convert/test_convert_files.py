"""Converting between Hugging Face and Megatron: the cuts by hand, hostile directories, and an atomic writer."""

from __future__ import annotations

import copy
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_tropd.convert.hf import HFWeights, check_weights, read_architecture
from megatron_tropd.convert.writer import HFWriter
from megatron_tropd.errors import CheckpointError
from megatron_tropd.models.registry import architecture_of
from megatron_tropd.models.rules import RULES, Shape, TensorShard, fill, join, joined_rows
from megatron_tropd.types import Architecture
from tests.support.distributed import run_on_ranks
from tests.support.tiny_models import STUDENT, save_qwen3

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
Q_PROJ, EMBED = "model.layers.1.self_attn.q_proj.weight", "model.embed_tokens.weight"

# six query heads share three key heads; a head has one row, so that rows are heads
SMALL = Architecture(
    family="Qwen3ForCausalLM",
    num_layers=2,
    hidden_size=5,
    ffn_size=6,
    num_heads=6,
    num_kv_heads=3,
    head_dim=1,
    vocab_size=7,
    max_positions=16,
    rope_theta=1e4,
    norm_eps=1e-6,
    tied_embeddings=False,
    qk_norm=True,
)


def rows(*labels: float) -> Tensor:
    """One row per label, all alike."""
    return torch.tensor(labels)[:, None].expand(-1, SMALL.hidden_size).contiguous()


def cuts(rule: str, parts: list[Tensor], size: int, padded_vocab: int = 0) -> list[Tensor]:
    """Every rank's parameter; the HF tensors arrive one at a time, the last first."""
    shards, shapes = [], shapes_of(parts)
    for rank in range(size):
        cut = TensorShard(SMALL, rank, size, padded_vocab)
        shards.append(torch.full(RULES[rule].shard_shape(shapes, cut), torch.nan))
        for part in reversed(range(len(parts))):
            fill(rule, shards[-1], {part: parts[part]}, shapes, cut)
    return shards


def shapes_of(parts: list[Tensor]) -> list[Shape]:
    return [tuple(part.shape) for part in parts]


# --------------------------------------------------------------------------- the cuts, by hand


def test_query_key_and_value_heads_are_interleaved_group_by_group():
    q, k, v = rows(1, 2, 3, 4, 5, 6), rows(10, 20, 30), rows(100, 200, 300)
    (whole,) = cuts("qkv", [q, k, v], 1)
    assert whole[:, 0].tolist() == [1, 2, 10, 100, 3, 4, 20, 200, 5, 6, 30, 300]
    shards = cuts("qkv", [q, k, v], 3)
    assert [shard[:, 0].tolist() for shard in shards] == [[1, 2, 10, 100], [3, 4, 20, 200], [5, 6, 30, 300]]


def test_gate_and_up_are_stacked_on_every_rank():
    gate, up = rows(1, 2, 3, 4, 5, 6), rows(10, 20, 30, 40, 50, 60)
    shards = cuts("stacked_rows", [gate, up], 2)
    assert [shard[:, 0].tolist() for shard in shards] == [[1, 2, 3, 10, 20, 30], [4, 5, 6, 40, 50, 60]]


def test_a_vocabulary_is_padded_with_zeros_at_its_end():
    shards = cuts("vocabulary", [rows(1, 2, 3, 4, 5, 6, 7)], 3, padded_vocab=12)
    assert [shard[:, 0].tolist() for shard in shards] == [[1, 2, 3, 4], [5, 6, 7, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize("step", [1, 2, 100])
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("rule", RULES)
def test_a_few_rows_of_all_ranks_at_a_time_are_the_whole(rule, size, step):
    shapes, parts = parts_for(rule)
    shards = cuts(rule, parts, size, padded_vocab=9)
    whole = [torch.full(shape, torch.nan) for shape in shapes]
    for first in range(0, len(shards[0]), step):
        pieces = [shard[first : first + step] for shard in shards]
        for part, row, rows in joined_rows(rule, pieces, first, shapes, TensorShard(SMALL, 0, size, 9)):
            assert bool(whole[part][row : row + len(rows)].isnan().all())  # every row comes once
            whole[part][row : row + len(rows)] = rows
    assert all(a.equal(b) for a, b in zip(whole, parts, strict=True))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("rule", RULES)
def test_joining_is_the_inverse_of_cutting(rule, size):
    shapes, parts = parts_for(rule)
    shards = cuts(rule, parts, size, padded_vocab=9)
    joined = join(rule, shards, shapes, TensorShard(SMALL, 0, size, 9))
    assert all(a.equal(b) for a, b in zip(joined, parts, strict=True))


def parts_for(rule: str) -> tuple[list[Shape], list[Tensor]]:
    """Shapes that three ranks can share, and random tensors of them."""
    generator = torch.Generator().manual_seed(0)
    table: dict[str, list[Shape]] = {
        "whole": [(5,)],
        "columns": [(5, 6)],
        "stacked_rows": [(6, 5), (6, 5)],
        "vocabulary": [(7, 5)],
        "qkv": [(6, 5), (3, 5), (3, 5)],
    }
    shapes = table[rule]
    return shapes, [torch.randn(shape, generator=generator) for shape in shapes]


def test_a_large_tensor_is_cut_in_strips(monkeypatch):
    parts = [torch.randn(12, 6), torch.randn(12, 6)]
    whole = cuts("stacked_rows", parts, 3)
    monkeypatch.setattr("megatron_tropd.models.rules._STRIP_BYTES", 60)  # two rows of 24 bytes
    assert all(a.equal(b) for a, b in zip(cuts("stacked_rows", parts, 3), whole, strict=True))


# --------------------------------------------------------------------------- reading


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen3(tmp_path_factory.mktemp("healthy") / "model", STUDENT, seed=1)


@pytest.fixture
def broken(healthy: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    shutil.copytree(healthy, tmp_path / "model")
    return tmp_path / "model"


def test_sizes_are_read_from_config_json(healthy):
    assert read_architecture(healthy) == Architecture(
        family="Qwen3ForCausalLM",
        num_layers=3,
        hidden_size=52,
        ffn_size=70,
        num_heads=4,
        num_kv_heads=2,
        head_dim=14,
        vocab_size=97,
        max_positions=96,
        rope_theta=3000.0,
        norm_eps=1e-6,
        tied_embeddings=False,
        qk_norm=True,
    )


def test_a_slice_is_the_slice_of_the_whole(healthy):
    weights = HFWeights(healthy)
    with safe_open(healthy / SINGLE, framework="pt") as file:
        assert weights[Q_PROJ][3:9, 5:].equal(file.get_tensor(Q_PROJ)[3:9, 5:])


CONFIG_DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "another architecture": ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM"),
    "no architecture": ({"architectures": None}, "missing"),
    "an architecture that is no list": ({"architectures": {"a": 1}}, "not supported"),
    "rope scaling": ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "yarn"),
    "old rope scaling": ({"rope_parameters": None, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
    "rope by kind of layer": ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
    "layers of another kind": ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
    "partial rotary": ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    "an old partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    "llama3 RoPE without its lengths": ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    "biases": ({"attention_bias": True}, "attention_bias"),
    "another activation": ({"hidden_act": "gelu"}, "gelu"),
    "quantized": ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
    "no head size": ({"head_dim": ...}, "head_dim"),
    "a size that is no number": ({"hidden_size": "wide"}, "wide"),
    "a size that is a table": ({"rope_parameters": [1]}, "wrong kind"),
}


@pytest.mark.parametrize(("change", "named"), CONFIG_DAMAGE.values(), ids=CONFIG_DAMAGE.keys())
def test_an_unusable_config_is_refused_by_name(change, named, healthy):
    config = json.loads((healthy / "config.json").read_text()) | change
    config = {key: value for key, value in config.items() if value is not ...}
    with pytest.raises(CheckpointError, match=named):
        architecture_of(config)


ROPE_TABLES: list[Any] = [
    None,
    {"rope_type": "default", "rope_theta": 5e5},
    {"rope_type": "linear", "factor": 4.0},
    {"type": "linear", "factor": 2.0, "rope_theta": 7e4},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5},
]


@pytest.mark.parametrize("beside", [{}, {"rope_theta": 2e4}, {"original_max_position_embeddings": 48}], ids=repr)
@pytest.mark.filterwarnings("ignore:config.json has both rope_scaling and rope_parameters")
def test_rope_is_read_from_where_transformers_reads_it(beside, healthy):
    from transformers import LlamaConfig

    plain = json.loads((healthy / "config.json").read_text()) | {"architectures": ["LlamaForCausalLM"]}
    del plain["rope_parameters"]
    for new, old in itertools.product(ROPE_TABLES, ROPE_TABLES):
        tables = {"rope_parameters": new, "rope_scaling": old}
        config = plain | beside | {key: dict(value) for key, value in tables.items() if value is not None}
        truth = LlamaConfig.from_dict(copy.deepcopy(config)).rope_parameters
        found = architecture_of(config)
        assert found.rope_theta == truth["rope_theta"], (beside, tables)
        assert (found.rope_scaling or {"type": "default"})["type"] == truth["rope_type"], (beside, tables)
        for name, value in (found.rope_scaling or {}).items():
            assert name == "type" or value == truth[name], (beside, tables)


def test_a_yarn_beside_another_table_is_refused_and_a_base_that_does_not_count_is_said(healthy):
    config = json.loads((healthy / "config.json").read_text())  # whose rope_parameters have a base of 3000
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    with pytest.raises(CheckpointError, match="RoPE of type 'yarn'"):
        architecture_of(config | {"rope_scaling": yarn})
    with pytest.warns(UserWarning, match=r"rope_theta=10000, and rope_theta=3000.0 of the latter does not"):
        assert architecture_of(config | {"rope_scaling": {"type": "linear", "factor": 2.0}}).rope_theta == 1e4


OF_FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "Gemma 2": ({"architectures": ["Gemma2ForCausalLM"]}, "caps its logits"),
    "Gemma 3": ({"architectures": ["Gemma3ForCausalLM"]}, "sliding and global"),
    "Llama with biases": ({"architectures": ["LlamaForCausalLM"], "attention_bias": True}, "attention_bias"),
    "Llama with biases in its MLP": ({"architectures": ["LlamaForCausalLM"], "mlp_bias": True}, "mlp_bias"),
    "some dense layers": ({"architectures": ["Qwen3MoeForCausalLM"], "mlp_only_layers": [0]}, "mlp_only_layers"),
    "every other layer dense": ({"architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 2}, "sparse_step"),
    "more experts chosen than there are": (
        {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 5},
        "num_experts_per_tok",
    ),
    "one expert of weight 1": (
        {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts_per_tok": 1},
        "router",
    ),
    "two counts of experts": (
        {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4, "num_experts": 8, "num_experts_per_tok": 2},
        "num_local_experts=4 and num_experts=8",
    ),
    "no count of experts": ({"architectures": ["MixtralForCausalLM"], "num_experts_per_tok": 1}, "num_local_experts"),
}


@pytest.mark.parametrize(("change", "named"), OF_FAMILIES.values(), ids=OF_FAMILIES.keys())
def test_what_a_family_has_and_we_do_not_is_refused_by_name(change, named, healthy):
    with pytest.raises(CheckpointError, match=named):
        architecture_of(json.loads((healthy / "config.json").read_text()) | change)


# what their publishers wrote into config.json, as far as it matters here
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Llama-2-7b-hf": (
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "max_position_embeddings": 4096,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
        {"num_kv_heads": 32, "head_dim": 128, "rope_theta": 1e4, "rope_scaling": None, "tied_embeddings": False},
    ),
    "Llama-3.2-1B": (
        {
            "architectures": ["LlamaForCausalLM"],
            "attention_bias": False,
            "head_dim": 64,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "num_attention_heads": 32,
            "num_hidden_layers": 16,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 32.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "tie_word_embeddings": True,
            "vocab_size": 128256,
        },
        {
            "head_dim": 64,
            "rope_theta": 5e5,
            "tied_embeddings": True,
            "rope_scaling": {
                "type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192.0,
            },
        },
    ),
    "Mistral-7B-v0.1": (
        {
            "architectures": ["MistralForCausalLM"],
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "sliding_window": 4096,
            "vocab_size": 32000,
        },
        {"sliding_window": 4096, "max_positions": 4096, "num_kv_heads": 8},
    ),
    "DeepSeek-R1-Distill-Qwen-1.5B": (
        {
            "architectures": ["Qwen2ForCausalLM"],
            "hidden_act": "silu",
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "max_position_embeddings": 131072,
            "max_window_layers": 21,
            "model_type": "qwen2",
            "num_attention_heads": 12,
            "num_hidden_layers": 28,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-06,
            "rope_theta": 10000,
            "sliding_window": 4096,
            "tie_word_embeddings": False,
            "use_mrope": False,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        {"qkv_bias": True, "sliding_window": None, "max_positions": 131072, "head_dim": 128},
    ),
    "Qwen3-30B-A3B": (
        {
            "architectures": ["Qwen3MoeForCausalLM"],
            "attention_bias": False,
            "decoder_sparse_step": 1,
            "head_dim": 128,
            "hidden_act": "silu",
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "max_position_embeddings": 40960,
            "max_window_layers": 48,
            "mlp_only_layers": [],
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "num_hidden_layers": 48,
            "num_key_value_heads": 4,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "use_sliding_window": False,
            "vocab_size": 151936,
        },
        {"num_experts": 128, "experts_per_token": 8, "ffn_size": 768, "normalize_experts": True, "head_dim": 128},
    ),
    "Mixtral-8x7B-v0.1": (
        {
            "architectures": ["MixtralForCausalLM"],
            "hidden_act": "silu",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_experts_per_tok": 2,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "rms_norm_eps": 1e-05,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "vocab_size": 32000,
        },
        {
            "num_experts": 8,
            "experts_per_token": 2,
            "ffn_size": 14336,
            "sliding_window": None,
            "normalize_experts": True,
        },
    ),
}


@pytest.mark.parametrize(("config", "expected"), PUBLISHED.values(), ids=PUBLISHED.keys())
def test_published_configs_are_understood(config, expected):
    architecture = architecture_of(config)
    assert {name: getattr(architecture, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("change", "longest"),
    [
        ({"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 3}, 96),  # no layer is windowed
        ({"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 2}, 32),
        ({"use_sliding_window": True, "sliding_window": 200, "max_window_layers": 0}, 96),
        ({"use_sliding_window": False, "sliding_window": 32, "max_window_layers": 0}, 96),
        ({"layer_types": ["sliding_attention"] + 2 * ["full_attention"], "sliding_window": 32}, 32),
    ],
)
def test_a_sliding_window_bounds_the_sequences_a_model_takes(change, longest, healthy):
    config = {**json.loads((healthy / "config.json").read_text()), "layer_types": None, **change}
    architecture = architecture_of(config)
    assert architecture.max_positions == longest
    assert architecture.sliding_window == (32 if longest == 32 else None)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[1, 2]"], ids=["torn", "no text", "a list"])
def test_a_config_that_is_no_table_is_refused(content, broken):
    (broken / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        read_architecture(broken)


def test_a_path_without_a_model_is_refused(broken, tmp_path):
    for path in (tmp_path / "nowhere", broken / "config.json"):
        with pytest.raises(CheckpointError, match="Hugging Face model directory"):
            read_architecture(path)


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(directory / SINGLE)
    change(tensors)
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})


def split_in_two(directory: Path) -> dict[str, str]:
    """The weights as two shards and an index; returns the weight map."""
    tensors = load_file(directory / SINGLE)
    names = sorted(tensors)
    rank_split = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in rank_split.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    (directory / SINGLE).unlink()
    weight_map = {name: file for file, part in rank_split.items() for name in part}
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def truncate(directory: Path) -> None:
    content = (directory / SINGLE).read_bytes()
    (directory / SINGLE).write_bytes(content[: len(content) * 2 // 3])


def only_pickles(directory: Path) -> None:
    (directory / SINGLE).unlink()
    torch.save({}, directory / "pytorch_model.bin")


def lose_a_shard(directory: Path) -> None:
    (directory / split_in_two(directory)[Q_PROJ]).unlink()


def lie_about_a_shard(directory: Path) -> None:
    weight_map = split_in_two(directory)
    other = next(file for file in weight_map.values() if file != weight_map[Q_PROJ])
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map | {Q_PROJ: other}}))


def index_without_a_map(directory: Path) -> None:
    split_in_two(directory)
    (directory / INDEX).write_text("[]")


def resized(name: str, *, rows: int = 0, columns: int = 0) -> Callable[[Path], None]:
    """That much more, or less, of one tensor."""

    def change(tensors: dict[str, Tensor]) -> None:
        old = tensors[name]
        new = torch.ones(old.size(0) + rows, *(size + columns for size in old.shape[1:]))
        new[: old.size(0), ...] = old[: new.size(0), : new.size(1)] if columns < 0 else new[: old.size(0), ...]
        tensors[name] = new

    return lambda directory: rewrite(directory, change)


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors[Q_PROJ]


def add(name: str) -> Callable[[Path], None]:
    return lambda directory: rewrite(directory, lambda tensors: tensors.update({name: torch.zeros(56)}))


def quantize(tensors: dict[str, Tensor]) -> None:
    tensors[Q_PROJ] = tensors[Q_PROJ].to(torch.int8)


def point_outside(directory: Path) -> None:
    weight_map = split_in_two(directory)
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map | {Q_PROJ: "../" + weight_map[Q_PROJ]}}))


def tie(directory: Path) -> None:
    """The config promises one matrix at both ends, the weights have two different ones."""
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))


GATE, O_PROJ, NORM = (
    f"model.layers.0.{name}.weight" for name in ("mlp.gate_proj", "self_attn.o_proj", "input_layernorm")
)
WEIGHT_DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a torn file": (truncate, "torn"),
    "no safetensors at all": (lambda d: (d / SINGLE).write_bytes(b"not this"), "torn"),
    "no weights": (lambda d: (d / SINGLE).unlink(), "no weights"),
    "only pickles": (only_pickles, "pytorch_model.bin"),
    "a missing shard": (lose_a_shard, "model-0000"),
    "an index that lies": (lie_about_a_shard, Q_PROJ),
    "an index without a map": (index_without_a_map, "weight_map"),
    "a missing tensor": (lambda d: rewrite(d, drop), Q_PROJ),
    "integers": (lambda d: rewrite(d, quantize), "I8"),
    "a layer too many": (add("model.layers.3.input_layernorm.weight"), "model.layers.3"),
    "a bias": (add("model.layers.0.self_attn.q_proj.bias"), "q_proj.bias"),
    "too few tokens": (resized(EMBED, rows=-1), EMBED),
    "too many tokens": (resized(EMBED, rows=1), EMBED),
    "too many heads": (resized(Q_PROJ, rows=14), Q_PROJ),
    "a wider gate": (resized(GATE, rows=2), GATE),
    "a narrower output": (resized(O_PROJ, columns=-2), O_PROJ),
    "a wider model": (resized(Q_PROJ, columns=2), Q_PROJ),
    "a longer norm": (resized(NORM, rows=1), NORM),
    "a shard outside": (point_outside, "weight_map"),
    "two output layers": (tie, "tie_word_embeddings"),
}


def load_each(directories: list[str]) -> list[str]:
    """On a rank: what loading each directory says, and that nothing but CheckpointError ever comes of it."""
    from megatron_tropd.config.sections import Layout
    from megatron_tropd.parallel.groups import GroupBuilder, initialize_distributed
    from megatron_tropd.setup.build import load_model

    device = initialize_distributed()
    groups = GroupBuilder().build(Layout())
    said = []
    for directory in directories:
        try:
            load_model(directory, groups, dtype=torch.float32, device=device)
            said.append("loaded")
        except CheckpointError as error:
            said.append(str(error))
    return said


def test_every_unusable_checkpoint_is_refused_by_name(healthy, tmp_path):
    directories = [healthy]
    for number, (damage, _) in enumerate(WEIGHT_DAMAGE.values()):
        directories.append(tmp_path / str(number))
        shutil.copytree(healthy, directories[-1])
        damage(directories[-1])
    loaded, *messages = run_on_ranks(load_each, [str(d) for d in directories], world_size=1)[0]
    assert loaded == "loaded"
    silent = {
        name: message
        for (name, (_, named)), message, directory in zip(WEIGHT_DAMAGE.items(), messages, directories[1:], strict=True)
        if named not in message or str(directory) not in message or "\n" in message.strip()
    }
    assert silent == {}


def test_a_checkpoint_in_shards_is_the_one_in_a_single_file(healthy, broken):
    split_in_two(broken)
    shards, single = HFWeights(broken), HFWeights(healthy)
    assert shards.keys() == single.keys()
    assert all(shards[name][:].equal(single[name][:]) for name in single)


def test_a_tied_model_may_carry_its_output_layer_twice(tmp_path):
    directory = save_qwen3(tmp_path / "model", STUDENT, tied=True)
    rewrite(directory, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBED].clone()}))
    check_weights(HFWeights(directory), read_architecture(directory))


def test_a_file_that_is_cut_short_while_it_is_read_is_an_error(broken):
    weights = HFWeights(broken)
    weights[Q_PROJ][:2]
    truncate(broken)
    with pytest.raises(CheckpointError, match="became shorter"):
        weights["model.norm.weight"][:]
        weights[Q_PROJ][:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(7,), (5, 3), (4, 3, 2), (0, 3)], ids=str)
def test_any_slice_of_any_tensor_reads_what_the_library_reads(shape, dtype, tmp_path):
    tensor = torch.randn(shape, dtype=torch.float64).to(dtype)
    save_file({"before": torch.randn(3, dtype=dtype), "it": tensor}, tmp_path / SINGLE)
    lazy = HFWeights(tmp_path)["it"]
    assert (lazy.shape, lazy.dtype) == (shape, dtype)
    for rows in (slice(None), slice(1, 3), slice(2, 2)):
        assert lazy[rows].equal(tensor[rows])
        if len(shape) == 2:
            for columns in (slice(None), slice(1, 3), slice(0, 1)):
                assert lazy[rows, columns].equal(tensor[rows, columns])


# --------------------------------------------------------------------------- writing


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(6, 10, generator=generator, dtype=dtype)
    return [
        ("rows", shared[:3]),  # two views of one storage
        ("more.rows", shared[3:]),
        ("transposed", torch.randn(4, 7, generator=generator, dtype=dtype).t()),
        ("large", torch.randn(50, 10, generator=generator, dtype=dtype)),
        ("vector", torch.randn(9, generator=generator, dtype=dtype)),
    ]


SHAPES = {name: tuple(tensor.shape) for name, tensor in tensors(0)}


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def writer_of(target: Path, source: Path, max_file_bytes: int = 400, **options: Any) -> HFWriter:
    options = {"dtype": torch.float32} | options
    return HFWriter(target, companions_from=source, tensors=SHAPES, max_file_bytes=max_file_bytes, **options)


def write(target: Path, source: Path, seed: int = 0, max_file_bytes: int = 400) -> Path:
    writer = writer_of(target, source, max_file_bytes)
    writer.write(tensors(seed))
    return writer.finish()


@pytest.mark.parametrize("max_file_bytes", [1, 250, 400, 10**6])
def test_what_is_written_is_read_back(max_file_bytes, healthy, tmp_path):
    (healthy / "tokenizer.json").write_text("{}")
    target = write(tmp_path / "out", healthy, max_file_bytes=max_file_bytes)
    found: dict[str, Tensor] = {}
    for file in sorted(target.glob("*.safetensors")):
        part = load_file(file)  # the library's own reader
        assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= max_file_bytes
        found |= part
    assert found.keys() == SHAPES.keys()
    assert all(found[name].equal(tensor) for name, tensor in tensors(0))
    for companion in ("config.json", "tokenizer.json"):
        assert (target / companion).read_bytes() == (healthy / companion).read_bytes()
    assert (target / INDEX).exists() == (max_file_bytes < 10**6)
    assert (target / SINGLE).exists() == (max_file_bytes >= 10**6)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensors_are_written_in_the_writers_dtype_and_config_json_says_so(dtype, healthy, tmp_path):
    writer = writer_of(tmp_path / "out", healthy, 10**6, dtype=dtype)
    writer.write(reversed(tensors(0)))
    found = load_file(writer.finish() / SINGLE)
    assert all(found[name].equal(tensor.to(dtype)) for name, tensor in tensors(0))
    before, after = (json.loads((path / "config.json").read_text()) for path in (healthy, tmp_path / "out"))
    assert after == before | {"dtype": str(dtype).removeprefix("torch.")}


def test_a_writer_that_dies_leaves_nothing_and_spoils_nothing(healthy, tmp_path):
    target = tmp_path / "out"
    writer_of(target, healthy, 100).write(tensors(0))
    assert not target.exists()

    write(target, healthy, seed=1)
    before = contents(target)
    dying = writer_of(target, healthy, 100)
    dying.write(tensors(2)[:3])
    with pytest.raises(CheckpointError, match="'large' was never written"):
        dying.finish()
    assert contents(target) == before


def test_a_finished_writer_replaces_all_that_was_there(healthy, tmp_path):
    target = tmp_path / "out"
    write(target, healthy, seed=1, max_file_bytes=1)
    writer_of(target, healthy, 1).write(tensors(3))  # died: leaves its parts aside
    write(target, healthy, seed=2, max_file_bytes=10**6)
    assert sorted(p.name for p in target.glob("*.safetensors*")) == [SINGLE]
    assert HFWeights(target)["large"][:].equal(dict(tensors(2))["large"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_writer_of_the_same_source_goes_on_where_another_died(healthy, tmp_path):
    target = tmp_path / "out"
    writer_of(target, healthy, 250, resume_from="a").write(tensors(0)[:3])  # which fill two files
    again = writer_of(target, healthy, 250, resume_from="a")
    assert again.done == {"rows", "more.rows", "transposed"}
    again.write((name, tensor) for name, tensor in tensors(0) if name not in again.done)
    weights = HFWeights(again.finish())
    assert all(weights[name][:].equal(tensor) for name, tensor in tensors(0))


def test_what_a_writer_of_another_source_left_is_not_gone_on_with(healthy, tmp_path):
    target = tmp_path / "out"
    writer_of(target, healthy, 250, resume_from="a").write(tensors(0)[:3])
    assert writer_of(target, healthy, 250, resume_from="b").done == frozenset()
    writer_of(target, healthy, 250, resume_from="b").write(tensors(0)[:3])
    assert writer_of(target, healthy, 100, resume_from="b").done < {"rows", "more.rows", "transposed"}
    assert writer_of(target, healthy, 250).done == frozenset()


def test_a_file_of_the_right_size_that_begins_otherwise_is_not_gone_on_with(healthy, tmp_path):
    target = tmp_path / "out"
    writer_of(target, healthy, 250, resume_from="a").write(tensors(0)[:3])
    first = min((tmp_path / "out.partial").glob("model-*.safetensors"))
    first.write_bytes(bytes(first.stat().st_size))
    done = writer_of(target, healthy, 250, resume_from="a").done
    assert done and "rows" not in done


def test_half_a_file_is_not_gone_on_with(healthy, tmp_path):
    target = tmp_path / "out"
    writer_of(target, healthy, 250, resume_from="a").write(tensors(0)[:3])
    first = min((tmp_path / "out.partial").glob("model-*.safetensors"))
    os.truncate(first, first.stat().st_size - 1)
    again = writer_of(target, healthy, 250, resume_from="a")
    assert again.done and "rows" not in again.done
    again.write((name, tensor) for name, tensor in tensors(0) if name not in again.done)
    weights = HFWeights(again.finish())
    assert all(weights[name][:].equal(tensor) for name, tensor in tensors(0))


@pytest.mark.parametrize("max_file_bytes", [1, 10**6])
def test_rows_in_any_order_are_the_tensor(max_file_bytes, healthy, tmp_path):
    writer = writer_of(tmp_path / "out", healthy, max_file_bytes)
    pieces = [(n, first, t[first : first + 4]) for n, t in tensors(0) for first in range(0, len(t), 4)]
    for name, first, rows in reversed(pieces[1:]):
        writer.write_rows(name, first, rows)
    with pytest.raises(CheckpointError, match="'rows' was never written"):
        writer.finish()
    writer.write_rows(*pieces[0])
    weights = HFWeights(writer.finish())
    assert all(weights[name][:].equal(tensor) for name, tensor in tensors(0))


@pytest.mark.parametrize(
    ("first", "rows"), [(40, torch.ones(11, 10)), (0, torch.ones(5, 9))], ids=["beyond the end", "narrow"]
)
def test_rows_that_the_tensor_does_not_have_are_refused(first, rows, healthy, tmp_path):
    with pytest.raises(CheckpointError, match="requested to write large"):
        writer_of(tmp_path / "out", healthy).write_rows("large", first, rows)


def test_rows_that_come_twice_are_refused(healthy, tmp_path):
    writer = writer_of(tmp_path / "out", healthy)
    writer.write_rows("large", 0, torch.ones(30, 10))
    with pytest.raises(CheckpointError, match="came twice"):
        writer.write_rows("large", 0, torch.ones(30, 10))


@pytest.mark.parametrize("pair", [("stranger", torch.ones(1)), ("rows", torch.ones(2, 10))], ids=["name", "shape"])
def test_a_tensor_that_was_not_announced_is_refused(pair, healthy, tmp_path):
    with pytest.raises(CheckpointError, match=pair[0]):
        writer_of(tmp_path / "out", healthy).write([pair])
