"""Converting between Hugging Face and Megatron: the cuts by hand, hostile directories, and an atomic writer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import run_on_ranks
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import STUDENT, save_qwen3
from torch import Tensor

from megatron_tropd.convert.families import architecture_of, entries
from megatron_tropd.convert.hf import HFWeights, HFWriter, read_architecture
from megatron_tropd.convert.rules import RULES, Cut
from megatron_tropd.errors import CheckpointError
from megatron_tropd.types import Architecture

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
    return [RULES[rule].cut(parts, Cut(SMALL, rank, size, padded_vocab)) for rank in range(size)]


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


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("rule", RULES)
def test_joining_is_the_inverse_of_cutting(rule, size):
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "whole": [(5,)],
        "columns": [(5, 6)],
        "stacked_rows": [(6, 5), (6, 5)],
        "vocabulary": [(7, 5)],
        "qkv": [(6, 5), (3, 5), (3, 5)],
    }[rule]
    parts = [torch.randn(shape, generator=generator) for shape in shapes]
    shards = cuts(rule, parts, size, padded_vocab=9)
    cut = Cut(SMALL, 0, size, 9)
    assert all(a.equal(b) for a, b in zip(RULES[rule].join(shards, cut), parts, strict=True))
    assert RULES[rule].shapes(tuple(shards[0].shape), cut) == shapes


def test_every_tensor_of_a_transformers_model_has_one_entry(healthy):
    architecture = read_architecture(healthy)
    table = entries(architecture, range(architecture.num_layers), embedding=True, output=True)
    names = [name for entry in table for name in entry.hf]
    assert len(set(names)) == len(names)
    assert set(names) == set(HFWeights(healthy))


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
    "old rope scaling": ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    "rope by kind of layer": ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
    "sliding window": ({"use_sliding_window": True}, "use_sliding_window"),
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
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    (directory / SINGLE).unlink()
    weight_map = {name: file for file, part in halves.items() for name in part}
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
    "integers": (lambda d: rewrite(d, quantize), "int8"),
    "a layer too many": (add("model.layers.3.input_layernorm.weight"), "model.layers.3"),
    "a bias": (add("model.layers.0.self_attn.q_proj.bias"), "q_proj.bias"),
    "too few tokens": (resized(EMBED, rows=-1), EMBED),
    "too many tokens": (resized(EMBED, rows=1), EMBED),
    "too many heads": (resized(Q_PROJ, rows=14), Q_PROJ),
    "a wider gate": (resized(GATE, rows=2), GATE),
    "a narrower output": (resized(O_PROJ, columns=-2), O_PROJ),
    "a wider model": (resized(Q_PROJ, columns=2), Q_PROJ),
    "a longer norm": (resized(NORM, rows=1), NORM),
}


def load_each(directories: list[str]) -> list[str]:
    """On a rank: what loading each directory says, and that nothing but CheckpointError ever comes of it."""
    from megatron_tropd.build import load_model
    from megatron_tropd.parallel.groups import GroupBuilder, Layout, initialize_distributed

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
        for (name, (_, named)), message in zip(WEIGHT_DAMAGE.items(), messages, strict=True)
        if named not in message or "\n" in message.strip()
    }
    assert silent == {}


def test_a_checkpoint_in_shards_is_the_one_in_a_single_file(healthy, broken):
    split_in_two(broken)
    shards, single = HFWeights(broken), HFWeights(healthy)
    assert shards.keys() == single.keys()
    assert all(shards[name][:].equal(single[name][:]) for name in single)


# --------------------------------------------------------------------------- writing


def tensors(seed: int) -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(6, 10, generator=generator)
    return [
        ("rows", shared[:3]),  # two views of one storage
        ("more.rows", shared[3:]),
        ("transposed", torch.randn(4, 7, generator=generator).t()),
        ("large", torch.randn(50, 10, generator=generator)),
        ("bf16", torch.randn(9, generator=generator).bfloat16()),
    ]


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in directory.iterdir()}


def write(target: Path, source: Path, seed: int = 0, max_file_bytes: int = 400) -> Path:
    writer = HFWriter(target, companions_from=source, max_file_bytes=max_file_bytes)
    writer.write(tensors(seed))
    return writer.finish()


@pytest.mark.parametrize("max_file_bytes", [1, 250, 400, 10**6])
def test_what_is_written_is_read_back(max_file_bytes, healthy, tmp_path):
    (healthy / "tokenizer.json").write_text("{}")
    target = write(tmp_path / "out", healthy, max_file_bytes=max_file_bytes)
    weights = HFWeights(target)
    for name, tensor in tensors(0):
        assert weights[name][:].equal(tensor), name
    assert len(weights) == len(tensors(0))
    for companion in ("config.json", "tokenizer.json"):
        assert (target / companion).read_bytes() == (healthy / companion).read_bytes()
    assert (target / INDEX).exists() == (max_file_bytes < 10**6)
    assert (target / SINGLE).exists() == (max_file_bytes >= 10**6)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_writer_that_dies_leaves_nothing_and_spoils_nothing(healthy, tmp_path):
    target = tmp_path / "out"
    HFWriter(target, companions_from=healthy, max_file_bytes=100).write(tensors(0))
    assert not target.exists()

    write(target, healthy, seed=1)
    before = contents(target)
    dying = HFWriter(target, companions_from=healthy, max_file_bytes=100)
    dying.write(tensors(2)[:3])
    assert contents(target) == before


def test_a_finished_writer_replaces_all_that_was_there(healthy, tmp_path):
    target = tmp_path / "out"
    write(target, healthy, seed=1, max_file_bytes=1)
    HFWriter(target, companions_from=healthy, max_file_bytes=1).write(tensors(3))  # died: leaves its parts aside
    write(target, healthy, seed=2, max_file_bytes=10**6)
    assert sorted(p.name for p in target.glob("*.safetensors*")) == [SINGLE]
    assert HFWeights(target)["large"][:].equal(dict(tensors(2))["large"])
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
