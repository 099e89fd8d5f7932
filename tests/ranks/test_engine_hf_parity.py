"""A Hugging Face checkpoint in Megatron is the same model: logits, weights bit for bit, and the exported directory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from megatron_tropd.config.sections import Layout
from megatron_tropd.data.packing import pack
from megatron_tropd.engine.context import valid_positions
from megatron_tropd.engine.forward import run_packs
from megatron_tropd.engine.model import Model
from megatron_tropd.engine.weights import hf_tensors, load_stream
from megatron_tropd.parallel.groups import GroupBuilder, initialize_distributed
from megatron_tropd.setup.build import load_model
from megatron_tropd.types import Pack, single_turn
from tests.support.distributed import run_on_ranks
from tests.support.family_cases import export
from tests.support.tiny_models import STUDENT, TEACHER, load_hf, random_rollouts, save_qwen3

FILE_BYTES = 30_000
# every prediction of a sequence is asked for, so the response starts at its second token
ROLLOUTS = [
    replace(r, region_L=single_turn(prompt=1, continuation=len(r.token_ids) - 1))
    for r in random_rollouts(0, vocab_size=STUDENT["vocab_size"])
]


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    model: str
    ranks: int = 1
    layout: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"


CASES = [
    Case(name="tp1", model="untied"),
    Case(name="tp1-tied", model="tied"),
    Case(name="tp1-bf16", model="bf16", dtype="bfloat16"),
    Case(name="tp2", model="untied", ranks=2, layout={"tensor": 2}),
    Case(name="tp2-sp-tied", model="tied", ranks=2, layout={"tensor": 2, "sequence": True}),
    Case(name="pp2-uneven", model="untied", ranks=2, layout={"pipeline": 2}),
    Case(name="pp2-uneven-tied", model="tied", ranks=2, layout={"pipeline": 2}),
    Case(name="pp2-other-sizes", model="other", ranks=2, layout={"pipeline": 2}),
    Case(name="tp2-bf16", model="bf16", ranks=2, layout={"tensor": 2}, dtype="bfloat16"),
]


def answers(cases: list[Case], root: str) -> dict[str, dict[str, Any]]:
    """On every rank: this rank's columns of the logits of every case, and the model exported once."""
    device, builder = initialize_distributed(), GroupBuilder()
    found: dict[str, dict[str, Any]] = {}
    for case in cases:
        groups = builder.build(Layout(**case.layout))
        directory = Path(root) / case.model
        model = load_model(directory, groups, dtype=getattr(torch, case.dtype), device=device)
        found[case.name] = {
            "logits": _local_logits(model),
            "shard": groups.tensor_rank if groups.is_last_stage else -1,
            "restored": _survives_a_stream(model),
        }
        export(model, directory, Path(root) / "exported" / case.name, max_file_bytes=FILE_BYTES)
    return found


def _local_logits(model: Model) -> dict[str, Tensor]:
    """``"sequence"`` -> ``[L - 1, v]`` on the last stage."""
    packs = pack(ROLLOUTS, max_tokens=64, multiple_of=4)[0]

    def last_stage(number: int, hidden_ND: Tensor, weight_vD: Tensor) -> tuple[Pack, Tensor]:
        return packs[number], F.linear(hidden_ND, weight_vD)

    found = {}
    for one, logits_Nv in run_packs(model, packs, last_stage):
        sequence_N = one.sequence_T[valid_positions(one)]
        for sequence in one.sequence_ids.tolist():
            found[str(sequence)] = logits_Nv[torch.from_numpy(sequence_N == sequence)]
    return found


def _survives_a_stream(model: Model) -> bool:
    """Published into the emptied model, in another order than its own, the weights are what they were."""
    published = [(name, tensor.clone()) for name, tensor in hf_tensors(model)]
    before = [parameter.detach().clone() for chunk in model.chunks for parameter in chunk.parameters()]
    for chunk in model.chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(7.0)
    load_stream(model, [("an.unknown.name", torch.ones(1)), *reversed(published)])
    after = [parameter for chunk in model.chunks for parameter in chunk.parameters()]
    return all(a.equal(b) for a, b in zip(after, before, strict=True))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("parity")
    save_qwen3(root / "untied", STUDENT, seed=1)
    save_qwen3(root / "tied", STUDENT, tied=True, seed=2)
    save_qwen3(root / "other", TEACHER, seed=3)
    save_qwen3(root / "bf16", STUDENT, seed=4, dtype=torch.bfloat16)
    return root


@pytest.fixture(scope="module")
def found(root: Path) -> Callable[[Case], list[dict[str, Any]]]:
    @cache  # a failure too: it would be the same for every case of that size
    def together(ranks: int) -> list[dict[str, Any]] | Exception:
        cases = [c for c in CASES if c.ranks == ranks]
        try:
            return run_on_ranks(answers, cases, str(root), world_size=ranks)
        except Exception as error:
            return error

    def of(case: Case) -> list[dict[str, Any]]:
        found = together(case.ranks)
        if isinstance(found, Exception):
            raise found
        return [rank[case.name] for rank in found]

    return of


def hf_logits(directory: Path, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    model = load_hf(directory, dtype)
    with torch.no_grad():
        return {str(r.sequence_id): model(torch.from_numpy(r.token_ids)[None]).logits[0, :-1].float() for r in ROLLOUTS}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_of_packed_streams_are_those_of_transformers(case, found, root):
    shards = sorted((r for r in found(case) if r["shard"] >= 0), key=lambda r: r["shard"])
    expected = hf_logits(root / case.model)
    assert shards[0]["logits"].keys() == expected.keys()
    for sequence, truth in expected.items():
        padded = torch.cat([shard["logits"][sequence] for shard in shards], dim=-1).float()
        logits = padded[:, : truth.size(-1)]
        error = (logits - truth).abs().max() / truth.abs().max()
        assert error < (1e-5 if case.dtype == "float32" else 6e-2), sequence
        assert (logits.argmax(-1) == truth.argmax(-1)).all() or case.dtype != "float32"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_was_imported_is_exported_bit_for_bit(case, found, root):
    found(case)
    directory = root / "exported" / case.name
    files = sorted(directory.glob("*.safetensors"))
    exported: dict[str, Tensor] = {}
    for file in files:
        tensors = load_file(file)
        assert not exported.keys() & tensors.keys()
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= FILE_BYTES
        exported |= tensors
    original = load_file(root / case.model / "model.safetensors")
    assert exported.keys() == original.keys()
    for name, tensor in original.items():
        assert exported[name].dtype == tensor.dtype and exported[name].equal(tensor), name
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in original.values())
    assert len(files) == len(set(index["weight_map"].values())) >= 5


@pytest.mark.parametrize("case", [c for c in CASES if c.ranks == 2], ids=lambda case: case.name)
def test_the_exported_directory_is_the_same_model_to_transformers(case, found, root):
    found(case)
    before = hf_logits(root / case.model)
    after = hf_logits(root / "exported" / case.name)
    assert all(after[sequence].equal(before[sequence]) for sequence in before)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_published_weights_fill_a_model_in_any_order(case, found):
    assert all(rank["restored"] for rank in found(case))
