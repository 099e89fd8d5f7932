"""Adapters are written whole or not at all, and over nothing of a user's."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_tropd.convert.peft import CONFIG, TENSORS, write_peft
from megatron_tropd.errors import StorageError
from megatron_tropd.types import AdapterSpec

SPEC = AdapterSpec(rank=2, alpha=4.0, dropout=0.0, targets=("q_proj",))
NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def write(target: Path, value: float = 1.0) -> Path:
    return write_peft(target, {NAME: torch.full((2, 3), value)}, SPEC, base="base")


def test_a_directory_with_anything_of_the_users_is_left(tmp_path: Path):
    target = tmp_path / "adapter"
    assert write(target) == target and {CONFIG, TENSORS} < {path.name for path in target.iterdir()}
    old = (target / TENSORS).read_bytes()
    write(target, 2.0)  # its own is replaced
    assert (target / TENSORS).read_bytes() != old and [*tmp_path.iterdir()] == [target]
    (target / "notes.txt").write_text("mine")
    old = (target / TENSORS).read_bytes()
    with pytest.raises(StorageError, match="left as it is"):
        write(target, 3.0)
    assert (target / TENSORS).read_bytes() == old and (target / "notes.txt").read_text() == "mine"
    other = tmp_path / "other"
    other.mkdir()
    (other / TENSORS).write_bytes(b"a user's")
    with pytest.raises(StorageError, match="left as it is"):
        write(other)
    assert [path.name for path in other.iterdir()] == [TENSORS] and (other / TENSORS).read_bytes() == b"a user's"
