"""``tropd convert``: from any layout to any other and back, bit for bit; resumed when killed; nothing unpickled."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_tropd.commands import convert as conversion
from megatron_tropd.commands.convert import ConversionPlan, hf_to_megatron, megatron_to_hf
from megatron_tropd.config.sections import Layout, OptimizerConfig
from megatron_tropd.convert.hf import HFWeights, read_architecture
from megatron_tropd.convert.writer import HFWriter
from megatron_tropd.engine.checkpoint import _sharded_state, load_checkpoint, load_model_weights, save_checkpoint
from megatron_tropd.engine.metadata import _TableReader, check_metadata
from megatron_tropd.engine.model import build_model
from megatron_tropd.engine.optimizer import optimize
from megatron_tropd.engine.patches.parallel_state import use_parallel_state
from megatron_tropd.engine.weights import hf_rows, load_weights
from megatron_tropd.errors import CheckpointError, ConfigError
from megatron_tropd.parallel.groups import GroupBuilder, initialize_distributed
from tests.support.distributed import run_on_ranks
from tests.support.run_inputs import commands
from tests.support.tiny_families import save_family

DEMO = Path(__file__).resolve().parents[2] / "examples" / "demo"
ALONE, TP2, PP2, EP2 = Layout(), Layout(tensor=2), Layout(pipeline=2), Layout(expert=2)
# name -> family, layout it is read in, layout it is written in
ROUTES = {
    "llama3-tp2-pp2": ("llama3", TP2, PP2),
    "qwen2-tied-pp2-tp2": ("qwen2-tied", PP2, TP2),
    "mixtral-ep2-tp2": ("mixtral", EP2, TP2),
    "qwen3-moe-raw-pp2-ep2": ("qwen3-moe-raw", PP2, EP2),
}


def convert_all(root: str) -> dict[str, Any]:
    """On every rank: all routes, a broken checkpoint, a conversion that is killed, and bytes read."""
    folder, said = Path(root), {}
    for name, (family, reading, writing) in ROUTES.items():
        hf_to_megatron(folder / family, folder / name, ConversionPlan(layout=reading))
        megatron_to_hf(folder / name, folder / f"{name}-back", ConversionPlan(layout=writing))
    before = (folder / "llama3-tp2-pp2" / "complete.json").stat().st_mtime_ns
    hf_to_megatron(folder / "llama3", folder / "llama3-tp2-pp2", ConversionPlan(layout=TP2))
    said["untouched"] = (folder / "llama3-tp2-pp2" / "complete.json").stat().st_mtime_ns == before
    said["other source"] = _error(
        lambda: hf_to_megatron(folder / "mistral", folder / "llama3-tp2-pp2", ConversionPlan(layout=TP2))
    )
    said["resumed"] = _killed_and_resumed(folder)
    said["verified in bf16"] = _error(
        lambda: hf_to_megatron(DEMO / "teacher", folder / "demo16", replace(_verifying(TP2), dtype="bf16"))
    )
    said["beyond fp16"] = _error(lambda: hf_to_megatron(folder / "far", folder / "far16", _in_fp16()))
    said["over something"] = _error(lambda: megatron_to_hf(folder / "demo16", folder / "kept", _verifying(ALONE)))
    said["verified"] = _error(lambda: hf_to_megatron(DEMO / "teacher", folder / "demo", _verifying(TP2)))
    said["wrong config"] = _error(
        lambda: megatron_to_hf(
            folder / "llama3-tp2-pp2", folder / "never", ConversionPlan(layout=TP2), like=folder / "mistral"
        )
    )
    said["harmful"] = _harmful(folder)
    said["peak"] = [_export_peak(folder / "llama3", layout) for layout in (TP2, PP2)]
    said["read"] = [_bytes_read(folder / "llama3", layout) for layout in (ALONE, TP2, PP2)]
    return said


def _verifying(layout: Layout) -> ConversionPlan:
    row = json.loads((DEMO / "data" / "heldout.jsonl").read_text().splitlines()[0])
    return ConversionPlan(layout=layout, texts=(row["prompt"],))


def _in_fp16() -> ConversionPlan:
    return ConversionPlan(layout=TP2, dtype="fp16")


def _error(convert: Any) -> str:
    try:
        convert()
    except (CheckpointError, ConfigError) as error:
        return str(error)
    return ""


def _killed_and_resumed(folder: Path) -> list[int]:
    """How many tensors are written by a conversion that dies half way, and by the one after it."""
    written, counts = HFWriter.write_rows, []

    def small_files(*args: Any, **options: Any) -> HFWriter:
        return HFWriter(*args, max_file_bytes=30_000, **options)

    for limit in (10, 1000):
        count = 0

        def counting(self: HFWriter, *args: Any, limit: int = limit) -> None:
            nonlocal count
            if count == limit:
                raise KeyboardInterrupt
            count += 1
            written(self, *args)

        HFWriter.write_rows, conversion.HFWriter = counting, small_files  # type: ignore[method-assign,assignment,misc]
        try:
            megatron_to_hf(folder / "llama3-tp2-pp2", folder / "resumed", ConversionPlan(layout=ALONE))
        except KeyboardInterrupt:
            dist.barrier()  # the other rank, which writes nothing, waits at the end of its conversion
            assert not (folder / "resumed").exists()
        finally:
            HFWriter.write_rows, conversion.HFWriter = written, HFWriter  # type: ignore[method-assign,misc]
        counts.append(count)
        dist.barrier()
    return counts


def _bytes_read(source: Path, layout: Layout) -> tuple[int, int]:
    """Bytes this rank asks the kernel for while it fills its parameters, and the bytes that these hold."""
    groups = GroupBuilder().build(layout)
    model = build_model(
        read_architecture(source), groups, dtype=torch.float32, device=initialize_distributed(), initialize=False
    )
    weights = HFWeights(source)
    before = _read_so_far()
    load_weights(model, weights)
    return _read_so_far() - before, sum(p.nbytes for chunk in model.chunks for p in chunk.parameters())


def _harmful(folder: Path) -> dict[str, str]:
    """What is said of checkpoints that hold a harmful pickle: as a tensor, as the state of a module, in ``common.pt``.

    Each makes a directory when it is unpickled.
    """
    groups, device = GroupBuilder().build(ALONE), initialize_distributed()
    architecture = read_architecture(folder / "llama3")
    model = build_model(architecture, groups, dtype=torch.float32, device=device, initialize=False)
    optimization = optimize(model, OptimizerConfig(lr=1e-3), steps=1)
    with use_parallel_state(groups):
        _sharded_state(model, optimization, loading=True)  # gives it the state of one that has taken a step
    training = save_checkpoint(folder / "training", model, optimization, step=1, state={})
    said = {}
    for kind, source in (("tensor", folder / "llama3-tp2-pp2"), ("module", training), ("common", training)):
        target = folder / f"with-harmful-{kind}"
        if dist.get_rank() == 0:
            shutil.copytree(source, target)
            _spoil(target, kind)
        dist.barrier()

        def load(path: Path = target, kind: str = kind) -> None:
            if kind == "tensor":
                load_model_weights(path, model)
            else:
                load_checkpoint(path, model, optimization)

        said[kind] = _error(load)
        dist.barrier()
    return said


def _spoil(checkpoint: Path, kind: str) -> None:
    """Puts a harmful pickle into a checkpoint that is otherwise as it should be, and says so in its list of files."""
    content = io.BytesIO()
    torch.save(Harmful(checkpoint.parent / "harm"), content)
    name = "common.pt" if kind == "common" else "spoilt.distcp"
    (checkpoint / name).write_bytes(content.getvalue())
    if kind != "common":
        with (checkpoint / ".metadata").open("rb") as file:
            table = _TableReader(file).load()  # data alone, in tests too
        objects = [name for name, entry in table.state_dict_metadata.items() if isinstance(entry, BytesStorageMetadata)]
        victim = objects[0] if kind == "module" else "embedding.word_embeddings.weight"
        assert kind == "tensor" or "_extra_state" in victim
        table.state_dict_metadata[victim] = BytesStorageMetadata()
        for index in [index for index in table.storage_data if index.fqn == victim]:
            del table.storage_data[index]
        table.storage_data[MetadataIndex(victim)] = _StorageInfo(name, 0, len(content.getvalue()))
        (checkpoint / ".metadata").write_bytes(pickle.dumps(table))
    listed = json.loads((checkpoint / "complete.json").read_text())
    for ours in ("format", "checksum"):  # as versions before 0.2 wrote it: nothing else would be looked at
        listed.pop(ours, None)
    listed["files"] |= {name: (checkpoint / name).stat().st_size for name in (name, ".metadata")}
    (checkpoint / "complete.json").write_text(json.dumps(listed))


def _export_peak(source: Path, layout: Layout) -> float:
    """MB that drawing every row of a model takes above the model; one of its tensors has 160 MB."""
    architecture = replace(read_architecture(source), vocab_size=(160 << 20) // 4 // 64, tied_embeddings=True)
    groups, device = GroupBuilder().build(layout), initialize_distributed()
    model = build_model(architecture, groups, dtype=torch.float32, device=device, initialize=False)
    for chunk in model.chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(1.0)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before, rows = _memory("VmRSS"), 0
    for name, _, found in hf_rows(model):
        rows += len(found) if name == "model.embed_tokens.weight" else 0
        assert bool((found == 1.0).all())
    assert rows == architecture.vocab_size
    return (_memory("VmHWM") - before) / 1e6


def _memory(key: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key + ":"))


def _read_so_far() -> int:
    with open("/proc/self/io") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("rchar"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("conversion")
    for family in ("llama3", "qwen2-tied", "mixtral", "qwen3-moe-raw", "mistral"):
        save_family(root / family, family)
        shutil.copy(DEMO / "teacher" / "tokenizer.json", root / family)
    far = shutil.copytree(root / "llama3", root / "far")
    tensors = load_file(far / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1e8  # beyond 65,504
    save_file(tensors, far / "model.safetensors")
    (root / "kept").mkdir()
    (root / "kept" / "precious.txt").write_text("mine")
    return root


@pytest.fixture(scope="module")
def said(root: Path) -> list[dict[str, Any]]:
    return run_on_ranks(convert_all, str(root), world_size=2, timeout_s=400)


def same_weights(a: Path, b: Path) -> bool:
    found, expected = ({k: v for f in path.glob("*.safetensors") for k, v in load_file(f).items()} for path in (a, b))
    return found.keys() == expected.keys() and all(found[k].equal(expected[k]) for k in expected)


@pytest.mark.parametrize("name", ROUTES)
def test_a_model_comes_back_bit_for_bit_with_config_and_tokenizer(name, said, root):
    family, back = root / ROUTES[name][0], root / f"{name}-back"
    assert same_weights(back, family)
    for companion in ("config.json", "tokenizer.json"):
        assert (back / companion).read_bytes() == (family / companion).read_bytes()


def test_a_finished_conversion_is_left_alone_and_another_source_refused(said):
    assert all(rank["untouched"] and "made of something else" in rank["other source"] for rank in said)


def test_a_killed_export_goes_on_after_its_last_whole_file(said, root):
    first, second = said[0]["resumed"]
    total = len(load_file(root / "llama3" / "model.safetensors"))
    assert first == 10 and total - 10 <= second < total
    assert same_weights(root / "resumed", root / "llama3")


def test_converted_logits_are_compared_with_transformers(said):
    assert all(rank["verified"] == "" for rank in said)


def test_logits_are_compared_in_the_dtype_of_the_result_too(said):
    assert all(rank["verified in bf16"] == "" for rank in said)


def test_weights_that_overflow_in_the_dtype_asked_for_are_refused_and_nothing_written(said, root):
    assert all("weights beyond the largest number of torch.float16" in rank["beyond fp16"] for rank in said)
    assert not (root / "far16").exists()


def test_a_target_that_holds_anything_else_is_left_as_it_is(said, root):
    assert all("holds what this program did not write (precious.txt)" in rank["over something"] for rank in said)
    assert (root / "kept" / "precious.txt").read_text() == "mine"


def test_a_config_of_another_model_is_refused_and_nothing_written(said, root):
    assert all("does not hold the model of config.json" in rank["wrong config"] for rank in said)
    assert not [path for path in root.iterdir() if path.name.startswith("never")]


def test_every_rank_reads_the_bytes_of_its_own_shard(said):
    for rank in said:
        for read, held in rank["read"]:
            assert 0 < read <= held + 4096  # /proc itself is read too; the padding of a vocabulary is not


def test_an_export_holds_a_bounded_part_of_a_tensor_of_any_size(said):
    assert all(peak < 80 for rank in said for peak in rank["peak"]), [rank["peak"] for rank in said]


def test_an_object_that_is_more_than_numbers_is_refused_before_it_can_do_anything(said, root):
    for rank in said:
        assert "does not hold the model of config.json" in rank["harmful"]["tensor"]  # refused before it is looked at
        assert "_extra_state" in rank["harmful"]["module"] and "not loaded" in rank["harmful"]["module"]
        assert "common.pt is a pickle of more" in rank["harmful"]["common"]
    assert not (root / "harm").exists()


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "table", [pickle.dumps(Harmful(Path("harm"))), b"", b"no pickle"], ids=["harmful", "empty", "no pickle"]
)
def test_a_table_that_is_not_one_is_refused_before_it_can_do_anything(table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(table)
    with pytest.raises(CheckpointError, match="not loaded"):
        check_metadata(tmp_path)
    assert not (tmp_path / "harm").exists()


# --------------------------------------------------------------------------- inputs that cannot be used


def torn(directory: Path) -> None:
    os.truncate(directory / "model.safetensors", 5000)


def of_other_shapes(directory: Path) -> None:
    _change_config(directory, hidden_size=56)


def without_a_shard(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    shards = {f"part-{number}.safetensors": list(tensors)[number::2] for number in range(2)}
    for file, names in shards.items():
        save_file({name: tensors[name] for name in names}, directory / file)
    weight_map = {name: file for file, names in shards.items() for name in names}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "model.safetensors").unlink()
    (directory / "part-1.safetensors").unlink()


def of_no_known_kind(directory: Path) -> None:
    _change_config(directory, architectures=["GPTNeoXForCausalLM"])


def pickled(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    torch.save(Harmful(directory / "harm"), directory / "pytorch_model.bin")


def _change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_a_nan(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, directory / "model.safetensors")


def of_a_pointer(directory: Path) -> None:
    (directory / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


HOSTILE = [
    (with_a_nan, "holds weights that are infinite or not a number (they are in decoder.final_layernorm.weight)"),
    (of_a_pointer, "model.safetensors is a Git LFS pointer"),
    (torn, "model.safetensors is torn or not safetensors"),
    (of_other_shapes, "but the model of config.json needs"),
    (without_a_shard, "names part-1.safetensors, which is not there. Copy the shard too."),
    (of_no_known_kind, "architecture ['GPTNeoXForCausalLM'] is not supported"),
    (pickled, "has only pickled weights (pytorch_model.bin), which are never loaded"),
]


@pytest.mark.parametrize(("spoil", "message"), HOSTILE, ids=lambda case: getattr(case, "__name__", ""))
def test_a_source_that_cannot_be_used_is_one_error_and_leaves_nothing(spoil, message, tmp_path):
    source = save_family(tmp_path / "source", "llama3")
    shutil.copy(DEMO / "teacher" / "tokenizer.json", source)
    spoil(source)
    before = {path.name for path in source.iterdir()}
    outcome = commands().run("convert", "hf-to-megatron", source, tmp_path / "target")
    assert outcome.status == 2
    assert message in " ".join(outcome.output.split()) and outcome.output.count("Error: ") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert {path.name for path in source.iterdir()} == before
