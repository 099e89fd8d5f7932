"""Bytes that autograd keeps of a forward pass: every distinct storage handed to it, parameters aside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from megatron_tropd.config.sections import Layout, OptimizerConfig
from megatron_tropd.engine.forward import run_packs
from megatron_tropd.engine.model import build_model
from megatron_tropd.engine.optimizer import optimize
from megatron_tropd.parallel.groups import GroupBuilder
from megatron_tropd.types import Architecture, Pack, Region

Case = tuple[Architecture, Layout, str, str, Sequence[int]]  # model, layout, dtype, recompute, lengths in the pack


def packed(lengths: Sequence[int]) -> Pack:
    """Sequences of these lengths, one token of which is learned from."""
    tokens = sum(lengths)
    region_T = np.full(tokens, Region.PROMPT, np.uint8)
    region_T[-2] = Region.CONTINUATION
    ids_T = np.arange(tokens) % 7
    return Pack(
        token_T=ids_T,
        target_T=ids_T,
        position_T=np.concatenate([np.arange(length) for length in lengths]),
        region_T=region_T,
        sequence_T=np.repeat(np.arange(len(lengths)), lengths),
        cu_seqlens=np.cumsum([0, *lengths], dtype=np.int32),
        sequence_ids=np.arange(len(lengths)),
        num_valid=1,
    )


def kept(cases: Sequence[Case]) -> list[int]:
    """On the ranks: bytes kept between forward and backward of one pack, for every case; 0 before the last stage."""
    builder = GroupBuilder()
    return [_kept(builder, *case) for case in cases]


def _kept(
    builder: GroupBuilder, a: Architecture, layout: Layout, dtype: str, recompute: str, lengths: Sequence[int]
) -> int:
    model = build_model(
        a, builder.build(layout), dtype=getattr(torch, dtype), device=torch.device("cpu"), recompute=recompute
    )
    optimization = optimize(model, OptimizerConfig(lr=1e-3), steps=1)
    own = {p.untyped_storage().data_ptr() for chunk in model.chunks for p in chunk.parameters()}
    held: dict[int, tuple[int, Any]] = {}

    def pack_hook(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            held.setdefault(storage.data_ptr(), (storage.nbytes(), x))  # alive, or its address would be given again
        return x

    found = []

    def last_stage(number: int, hidden_ND: torch.Tensor, weight_vD: torch.Tensor) -> Any:
        found.append(sum(size for size, _ in held.values()))
        return hidden_ND.sum(), None

    with torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda x: x):
        run_packs(model, [packed(lengths)], last_stage, wrapped=optimization.wrapped, backward=True)
    return found[0] if found else 0
