"""A checkpoint of Megatron is read as the model it is, or refused by name; nothing that it holds is run."""

from __future__ import annotations

import collections
import io
import logging
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_tropd.config.sections import StudentConfig
from megatron_tropd.convert.hf import HFWeights, check_weights, fingerprint_of
from megatron_tropd.convert.megatron.weights import _cached_table, _say_once
from megatron_tropd.convert.source import (
    open_weights,
    source_architecture,
    source_files,
    source_fingerprint,
    source_tokenizer,
)
from megatron_tropd.errors import CheckpointError
from megatron_tropd.types import ModelSource
from tests.support.tiny_families import save_family
from tests.support.torch_dist import llama_tensors, save_megatron

ARGS = {"num_layers": 2, "hidden_size": 44, "ffn_hidden_size": 58, "num_attention_heads": 4, "kv_channels": 18}
ARGS |= {"num_query_groups": 2, "group_query_attention": True, "rotary_base": 500, "norm_epsilon": 1e-5}
ARGS |= {"untie_embeddings_and_output_weights": True, "normalization": "RMSNorm", "swiglu": True}
ARGS |= {"use_rope_scaling": True, "rope_scaling_factor": 8.0, "qk_layernorm": False, "add_bias_linear": False}


@pytest.fixture(scope="module")
def hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("hf") / "llama3", "llama3")


@pytest.fixture(scope="module")
def pristine(hf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_megatron(tmp_path_factory.mktemp("megatron") / "mlm", hf, **ARGS)


@pytest.fixture
def megatron(pristine: Path, tmp_path: Path) -> Path:
    return shutil.copytree(pristine, tmp_path / "mlm")


def checkpoint_of(megatron: Path) -> Path:
    return megatron / "iter_0000100"


def refused(megatron: Path, hf: Path | None) -> str:
    with pytest.raises(CheckpointError) as error:
        check_weights(open_weights(ModelSource(megatron, hf)), source_architecture(ModelSource(megatron, hf)))
    assert "elete" not in str(error.value)  # it is not ours
    return str(error.value)


# --------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("named", ["root", "iteration"])
def test_every_tensor_is_read_bit_for_bit_whole_and_in_part(hf: Path, pristine: Path, named: str):
    weights = open_weights(ModelSource(pristine if named == "root" else checkpoint_of(pristine), hf))
    truth = load_file(hf / "model.safetensors")
    assert set(weights) == set(truth)
    for name, tensor in truth.items():
        assert weights[name][:].equal(tensor), name
        rows, columns = slice(3, 19), slice(5, 13)
        assert weights[name][rows].equal(tensor[rows]), name
        if tensor.dim() == 2:
            assert weights[name][rows, columns].equal(tensor[rows, columns]), name
            assert weights[name][5:5].shape == tensor[5:5].shape


def test_it_has_the_fingerprint_of_the_same_model_from_hugging_face(hf: Path, pristine: Path):
    assert source_fingerprint(ModelSource(pristine, hf)) == fingerprint_of(HFWeights(hf))


def test_a_tensor_that_was_saved_as_a_view_is_read_too(hf: Path, tmp_path: Path):
    tensors = llama_tensors(hf)
    key = "decoder.layers.mlp.linear_fc2.weight"
    tensors[key] = tensors[key].transpose(1, 2).contiguous().transpose(1, 2)
    assert not tensors[key].is_contiguous()
    weights = open_weights(ModelSource(save_megatron(tmp_path / "mlm", hf, tensors=tensors, **ARGS), hf))
    name = "model.layers.1.mlp.down_proj.weight"
    assert weights[name][7:11, 3:9].equal(load_file(hf / "model.safetensors")[name][7:11, 3:9])


def test_what_is_left_out_is_said_once_with_its_count(hf: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    tensors = llama_tensors(hf) | {
        "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc2.weight": torch.ones(3),
        "chained_0.optimizer.state.fp32_param.x": torch.ones(3),
        "decoder.layers.self_attention.linear_qkv._extra_state/shard_0_2": io.BytesIO(),
        "rng_state/shard_0_1": io.BytesIO(),
    }
    source = ModelSource(save_megatron(tmp_path / "mlm", hf, tensors=tensors, **ARGS, act=torch.nn.functional.gelu), hf)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            open_weights(source)
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("megatron_tropd")]
    for words in (
        "Megatron-LM, iteration 100",
        "2 tensors of the optimizer",
        "1 objects of kind _extra_state",
        "1 objects of kind gen",
        "27 rows of the vocab",
    ):
        assert words in said
    assert "gelu, not built" in said


# --------------------------------------------------------------------------- config and tokenizer


def test_config_and_tokenizer_are_those_of_like_or_the_checkpoints_own(hf: Path, megatron: Path):
    assert source_files(ModelSource(megatron, hf)) == hf
    assert "student.like=DIR" in refused(megatron, None)
    own = checkpoint_of(megatron) / "tokenizer"
    own.mkdir()
    (own / "tokenizer.json").write_text("{}")
    assert source_files(ModelSource(megatron, hf)) == hf
    assert source_tokenizer(ModelSource(megatron, hf)) == own
    shutil.copytree(hf, megatron / "hf")
    assert source_files(ModelSource(megatron)) == megatron / "hf"
    assert source_architecture(megatron).num_layers == 2


def test_like_is_refused_beside_a_hugging_face_directory(hf: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match="Take `like` out"):
        source_files(ModelSource(hf, tmp_path))


def test_a_section_of_the_configuration_is_a_source():
    assert StudentConfig(model="a", like="b").source == ModelSource(Path("a"), Path("b"))


@pytest.mark.parametrize(
    ("field", "value", "config_key"),
    [
        ("num_attention_heads", 8, "num_attention_heads"),
        ("rotary_base", 10_000, "rope_theta"),
        ("norm_epsilon", 1e-6, "rms_norm_eps"),
        ("normalization", "LayerNorm", "architectures"),
        ("untie_embeddings_and_output_weights", False, "tie_word_embeddings"),
        ("num_query_groups", 4, "num_key_value_heads"),
        ("kv_channels", 11, "head_dim"),
        ("ffn_hidden_size", 60, "intermediate_size"),
        ("qk_layernorm", True, "architectures"),
        ("swiglu", False, "hidden_act"),
        ("use_rope_scaling", False, "rope_scaling"),
        ("rope_scaling_factor", 4.0, "rope_scaling"),
        ("num_experts", 8, "num_experts"),
        ("rotary_percent", 0.5, "partial_rotary_factor"),
        ("mtp_num_layers", 1, "architectures"),
        ("padded_vocab_size", 64, "vocab_size"),
    ],
)
def test_a_field_that_disagrees_with_the_config_is_refused_with_both_values(
    hf: Path, megatron: Path, field: str, value: Any, config_key: str
):
    from argparse import Namespace

    torch.save({"args": Namespace(**ARGS | {field: value}), "iteration": 100}, checkpoint_of(megatron) / "common.pt")
    said = refused(megatron, hf)
    assert f"{field} = {value!r}" in said and f"({config_key})" in said and "wants" in said


def test_run_config_counts_where_it_is_there(hf: Path, megatron: Path):
    text = "model:\n  num_attention_heads: 8\n  act: !!python/name:os.system\n  layernorm_epsilon: 1e-05\n"
    (checkpoint_of(megatron) / "run_config.yaml").write_text(text)
    said = refused(megatron, hf)
    assert "run_config.yaml has" in said and "num_attention_heads = 8" in said and "epsilon" not in said


def test_more_layers_than_the_config_has_are_refused(hf: Path, tmp_path: Path):
    larger = save_family(tmp_path / "larger", "llama3", sizes={"num_hidden_layers": 3})
    assert "has 3 layers" in refused(save_megatron(tmp_path / "mlm", larger), hf)


def test_tensors_without_a_place_and_missing_ones_are_named(hf: Path, tmp_path: Path):
    tensors = llama_tensors(hf)
    bias = "decoder.layers.self_attention.linear_qkv.bias"
    more = tensors | {bias: torch.ones(2, 5)}
    assert f"has {bias!r}" in refused(save_megatron(tmp_path / "more", hf, tensors=more), hf)
    del tensors["decoder.final_layernorm.weight"]
    assert "final_layernorm" in refused(save_megatron(tmp_path / "fewer", hf, tensors=tensors), hf)


# --------------------------------------------------------------------------- not whole, not carried


def test_a_missing_shard_is_named(hf: Path, megatron: Path):
    (checkpoint_of(megatron) / "__0_0.distcp").unlink()
    assert "lacks __0_0.distcp" in refused(megatron, hf)


def test_a_shard_that_is_cut_short_is_named(hf: Path, megatron: Path):
    shard = checkpoint_of(megatron) / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-900])
    assert "cut short" in refused(megatron, hf)


def test_a_tracker_that_names_nothing_there_is_answered_with_what_is(hf: Path, megatron: Path):
    (megatron / "latest_checkpointed_iteration.txt").write_text("200")
    assert "iter_0000200, which is not there (iter_0000100)" in refused(megatron, hf)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda at: (at / "mp_rank_00").mkdir(), ("format torch,", "tools/checkpoint/convert.py")),
        (lambda at: (at / "metadata.json").unlink(), ("format fsdp_dtensor", "convert_checkpoints_fsdp.py")),
        (
            lambda at: (at / "metadata.json").write_text('{"sharded_backend": "zarr"}'),
            ("format zarr", "--ckpt-convert-format torch_dist"),
        ),
        (lambda at: (at / ".metadata").unlink(), (".metadata, its table of tensors, is missing", "left as it is")),
    ],
    ids=["torch", "fsdp_dtensor", "zarr", "no table"],
)
def test_formats_that_are_not_carried_are_named_with_who_converts_them(
    hf: Path, megatron: Path, make: Callable[[Path], None], words: tuple[str, ...]
):
    make(checkpoint_of(megatron))
    said = refused(megatron, hf)
    assert all(word in said for word in words), said


# --------------------------------------------------------------------------- hostile files


class Payload:
    """Runs a command when it is unpickled as Python does."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


def places(found: Any) -> int:
    """How many places of a table an object may stand at: one per value, key by key."""
    return len(list(walk(found)))


def walk(found: Any) -> Any:
    """Every container that holds a value, with the way to put another there."""
    seen: set[int] = set()
    stack = [found]
    while stack:
        one = stack.pop()
        if id(one) in seen or isinstance(one, str | int | float | bool | bytes | None.__class__ | torch.dtype):
            continue
        seen.add(id(one))
        if isinstance(one, dict):
            for key, value in list(one.items()):
                yield (one.__setitem__, key, value)
                stack.append(value)
                stack.append(key)
        elif isinstance(one, list):
            for number, value in enumerate(one):
                yield (one.__setitem__, number, value)
                stack.append(value)
        elif hasattr(one, "__dict__"):
            for key, value in list(vars(one).items()):
                yield (lambda name, new, one=one: object.__setattr__(one, name, new), key, value)
                stack.append(value)


def test_a_payload_in_any_place_of_the_table_is_named_or_passed_over_and_never_run(
    hf: Path, megatron: Path, tmp_path: Path
):
    table, mark = checkpoint_of(megatron) / ".metadata", tmp_path / "ran"
    found = pickle.loads(table.read_bytes())
    outcomes: collections.Counter[str] = collections.Counter()
    for put, key, value in list(walk(found)):
        put(key, Payload(mark))
        try:
            table.write_bytes(pickle.dumps(found))
        except Exception:  # a class of the table that cannot even be written so
            put(key, value)
            continue
        put(key, value)
        assert pickle.loads(table.read_bytes()) is not None and mark.exists()  # it is a payload
        mark.unlink()
        _cached_table.cache_clear()
        try:
            open_weights(ModelSource(megatron, hf))
            outcomes["passed over"] += 1
        except CheckpointError as error:
            assert (
                "touch" in str(error) or "getattr" in str(error) or "not there" in str(error) or "lacks" in str(error)
            ), error
            outcomes["named"] += 1
        assert not mark.exists(), key
    assert outcomes["named"] > 50 and outcomes["passed over"] > 5


@pytest.mark.parametrize("place", ["args", "args.x", "beside", "in a list", "a key", "whole"])
def test_a_payload_in_common_pt_is_named_and_never_run(
    hf: Path, megatron: Path, tmp_path: Path, place: str, caplog: pytest.LogCaptureFixture
):
    from argparse import Namespace

    payload = Payload(tmp_path / "ran")
    common: Any = {
        "args": {"args": payload},
        "args.x": {"args": Namespace(**ARGS, x=payload)},
        "beside": {"args": Namespace(**ARGS), "x": payload},
        "in a list": {"args": Namespace(**ARGS, x=[{"y": payload}])},
        "a key": {payload: 1},
        "whole": payload,
    }[place]
    torch.save(common, checkpoint_of(megatron) / "common.pt")
    _say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        open_weights(ModelSource(megatron, hf))
    assert "getattr" in caplog.text and "not built" in caplog.text
    assert not (tmp_path / "ran").exists()


def test_a_payload_within_a_tensors_own_file_is_not_run(hf: Path, megatron: Path, tmp_path: Path):
    table, file = checkpoint_of(megatron) / ".metadata", checkpoint_of(megatron) / "__0_0.distcp"
    found = pickle.loads(table.read_bytes())
    buffer = io.BytesIO()
    torch.save(Payload(tmp_path / "ran"), buffer)
    for index, info in found.storage_data.items():
        if index.fqn == "decoder.final_layernorm.weight":
            info.offset, info.length = file.stat().st_size, len(buffer.getvalue())
    file.write_bytes(file.read_bytes() + buffer.getvalue())
    table.write_bytes(pickle.dumps(found))
    weights = open_weights(ModelSource(megatron, hf))
    with pytest.raises(CheckpointError, match=r"no tensor that torch\.save writes|was run"):
        weights["model.norm.weight"][:]
    assert not (tmp_path / "ran").exists()


def test_a_table_that_points_outside_its_directory_is_refused(hf: Path, megatron: Path):
    table = checkpoint_of(megatron) / ".metadata"
    found = pickle.loads(table.read_bytes())
    next(iter(found.storage_data.values())).relative_path = "../../../etc/passwd"
    table.write_bytes(pickle.dumps(found))
    assert "no file beside it" in refused(megatron, hf)


@pytest.mark.parametrize("content", [b"", b"\x80", b"cos\nsystem\n(S'true'\ntR.", b"not a pickle", b"N.", b"]."])
def test_a_torn_table_is_named(hf: Path, megatron: Path, content: bytes):
    (checkpoint_of(megatron) / ".metadata").write_bytes(content)
    assert ".metadata" in refused(megatron, hf)


def test_a_common_pt_whose_pickle_is_compressed_is_refused(hf: Path, megatron: Path):
    with zipfile.ZipFile(checkpoint_of(megatron) / "common.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("common/data.pkl", pickle.dumps({"zeros": "0" * 100_000}))
    assert "compressed" in refused(megatron, hf)


def test_arguments_that_lie_among_the_tensors_are_compared_too(hf: Path, tmp_path: Path):
    from argparse import Namespace

    held = io.BytesIO()  # as newer megatron-core does instead of common.pt
    torch.save([{"args": Namespace(**ARGS | {"kv_channels": 11}), "x": Payload(tmp_path / "ran")}], held)
    root = save_megatron(tmp_path / "mlm", hf, tensors=llama_tensors(hf) | {"common_state/shard_0_1": held})
    (checkpoint_of(root) / "common.pt").unlink()
    assert "kv_channels = 11, where config.json wants 18" in refused(root, hf)
    assert not (tmp_path / "ran").exists()
