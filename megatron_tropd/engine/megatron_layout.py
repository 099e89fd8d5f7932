"""Write a model as Megatron-LM or Megatron-Bridge would: stacked layers, Transformer Engine's names, a tracker file.

``--load DIR --finetune`` of Megatron-LM, and Bridge's loader, read it. A directory of this kind is written aside,
synced, and put in place in one rename; killed before that, nothing stands under its name, and writing starts over.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from megatron.core import dist_checkpointing

from megatron_tropd.convert.megatron.describe import run_config
from megatron_tropd.convert.megatron.locate import RUN_CONFIG, TRACKER, TRAIN_STATE
from megatron_tropd.engine.model import Model
from megatron_tropd.engine.patches.checkpoint_writer import write_in_process
from megatron_tropd.engine.patches.cuda_calls import cuda_names_mean_cpu
from megatron_tropd.engine.patches.parallel_state import use_parallel_state
from megatron_tropd.storage.owned import (
    MARKER,
    UNFINISHED,
    beside,
    discard_unfinished,
    mark_directory,
    replace_directory,
    settled,
    start_unfinished,
)
from megatron_tropd.storage.write_aside import storage_errors

LAYOUTS = ("megatron-lm", "bridge")
_RELEASE, _FIRST = "release", "iter_0000000"
# what a killed process may have left half-done; anything else is somebody's
_OURS = re.compile(
    rf"{re.escape(TRACKER)}|{re.escape(TRAIN_STATE)}|[^/]+/(__\d+_\d+\.distcp|\.metadata(\.tmp)?|common\.pt"
    rf"|metadata\.json|{re.escape(RUN_CONFIG)}|train_state\.pt)"
)
_DENSE_NORM, _OWN_NORM = ".mlp.linear_fc1.layer_norm_weight", ".pre_mlp_layernorm.weight"


def save_for_megatron(target: Path, model: Model, *, layout: str, companions: Mapping[str, Path]) -> None:
    """Write the model, or replace what this wrote there before. Collective.

    Args:
        layout: one of ``LAYOUTS``.
        companions: config and tokenizer files, for the directory ``tokenizer`` of the checkpoint.

    Raises:
        CheckpointError: the model has no description there. StorageError: it cannot be written, or something that is
            not of this program stands there.
    """
    target = settled(target)
    aside, name = beside(target, "partial"), _RELEASE if layout == "megatron-lm" else _FIRST
    described = _described(model, layout, target / name)
    if dist.get_rank() == 0:
        ours = {MARKER, *(f"{name}/tokenizer/{one}" for one in companions)}
        discard_unfinished(aside, lambda path: path in ours or _OURS.fullmatch(path) is not None)
        start_unfinished(aside, f"a checkpoint of the layout {layout}")
        with storage_errors(aside):
            (aside / name).mkdir()
    dist.barrier()
    with storage_errors(target), use_parallel_state(model.groups), cuda_names_mean_cpu():
        write_in_process()
        dist_checkpointing.save(_state(model), str(aside / name))
    dist.barrier()
    if dist.get_rank() == 0:
        with storage_errors(target):
            _write_beside(aside, aside / name, described, companions)
            mark_directory(aside, kind=f"Megatron checkpoint ({layout})", without=(UNFINISHED,))
            (aside / UNFINISHED).unlink()
            replace_directory(aside, target)
    dist.barrier()


def _described(model: Model, layout: str, place: Path) -> dict[str, Any] | None:
    """Return Bridge's description; also of a model for Megatron-LM, whose flags must be able to describe it."""
    dtype = str(model.dtype).removeprefix("torch.")
    found = run_config(model.architecture, dtype=dtype, tokenizer=place / "tokenizer")
    return found if layout == "bridge" else None


def _state(model: Model) -> dict[str, Any]:
    model.finish_pending_gathers()
    metadata = {"dp_cp_group": model.groups.pg.dp_cp}
    state: dict[str, Any] = {}
    for number, chunk in enumerate(model.chunks):
        sharded = chunk.sharded_state_dict(metadata=metadata)
        if model.architecture.num_experts:
            for part in sharded.values():  # a layer of experts has its norm beside it, under Transformer Engine too
                part.key = part.key.replace(_DENSE_NORM, _OWN_NORM)
        state["model" if len(model.chunks) == 1 else f"model{number}"] = sharded
    # plain values alone: whoever loads it with weights_only reads it
    return state | {"iteration": 0, "checkpoint_version": 3.0, "num_floating_point_operations_so_far": 0}


def _write_beside(
    root: Path, checkpoint: Path, described: dict[str, Any] | None, companions: Mapping[str, Path]
) -> None:
    for name, path in companions.items():
        (checkpoint / "tokenizer" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, checkpoint / "tokenizer" / name)
    (root / TRACKER).write_text(_RELEASE if described is None else "0")
    if described is None:
        return
    (checkpoint / RUN_CONFIG).write_text(yaml.safe_dump(described, sort_keys=False))
    counts = {"consumed_train_samples": 0, "skipped_train_samples": 0, "consumed_valid_samples": 0}
    flags = dict.fromkeys(("do_train", "do_valid", "do_test"), torch.tensor(False))
    whole = {name: torch.tensor(value) for name, value in {"step": 0, **counts}.items()}
    state = whole | {"floating_point_operations_so_far": torch.tensor(0.0, dtype=torch.float64)} | flags
    torch.save(state, root / TRAIN_STATE)
    torch.save(state, checkpoint / "train_state.pt")
