"""Planned bytes of weights, gradients and optimizer states are those that Megatron-Core allocates, rank by rank."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_tropd.config.sections import Layout, OptimizerConfig
from megatron_tropd.engine.adapters import add_adapters
from megatron_tropd.engine.model import build_model
from megatron_tropd.engine.optimizer import optimize
from megatron_tropd.engine.patches.parallel_state import use_parallel_state
from megatron_tropd.parallel.groups import GroupBuilder
from megatron_tropd.planning.parameters import frozen_states, total_parameters, trained_states
from megatron_tropd.types import AdapterSpec, Architecture
from tests.support.distributed import run_on_ranks

# no size is a multiple of the buffers' alignment, and no two are equal
DENSE = Architecture(
    family="Qwen3ForCausalLM",
    num_layers=5,
    hidden_size=36,
    ffn_size=50,
    num_heads=4,
    num_kv_heads=2,
    head_dim=10,
    vocab_size=97,
    max_positions=32,
    rope_theta=1e4,
    norm_eps=1e-6,
    tied_embeddings=False,
    qk_norm=True,
)
BIASED = replace(DENSE, family="Qwen2ForCausalLM", qk_norm=False, qkv_bias=True, tied_embeddings=True)
EXPERTS = replace(DENSE, family="Qwen3MoeForCausalLM", num_experts=4, experts_per_token=2, ffn_size=22)

LORA = AdapterSpec(rank=3, alpha=6.0, dropout=0.0, targets=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"))
ATTENTION = AdapterSpec(rank=5, alpha=5.0, dropout=0.0, targets=("q_proj", "o_proj"))

# (architecture, layout, bf16, distributed optimizer, optimizer, what alone is trained): four ranks, what the layout
# leaves is data-parallel
Case = tuple[Architecture, Layout, bool, bool, str, AdapterSpec | None]
FULL: list[tuple[Architecture, Layout, bool, bool, str]] = [
    (DENSE, Layout(), False, False, "adam"),
    (DENSE, Layout(tensor=2), True, True, "adam"),
    (DENSE, Layout(tensor=2, sequence=True, pipeline=2), True, False, "adam"),
    (replace(DENSE, num_layers=7), Layout(pipeline=4), False, False, "sgd"),
    (BIASED, Layout(pipeline=2), True, True, "adam"),
    (BIASED, Layout(), False, True, "adam"),
    (replace(DENSE, num_layers=4), Layout(pipeline=2, virtual_pipeline=2), True, True, "adam"),
    (EXPERTS, Layout(expert=2), True, True, "adam"),
    (EXPERTS, Layout(tensor=2, sequence=True, expert=2), False, False, "adam"),
    (EXPERTS, Layout(), True, False, "adam"),
    (DENSE, Layout(context=2), True, True, "adam"),
]
CASES: list[Case] = [
    *((*case, None) for case in FULL),
    (DENSE, Layout(), False, False, "adam", LORA),
    (DENSE, Layout(tensor=2, sequence=True, pipeline=2), True, False, "adam", LORA),
    (BIASED, Layout(tensor=2), True, True, "adam", LORA),
    (BIASED, Layout(pipeline=2), False, True, "adam", LORA),
    (EXPERTS, Layout(expert=2), True, True, "adam", ATTENTION),
]


def held_by_megatron(cases: list[Any]) -> list[dict[str, int]]:
    """On the ranks: bytes of every kind, after an update."""
    builder, found = GroupBuilder(), []
    for architecture, layout, bf16, distributed, name, adapters in cases:
        groups = builder.build(layout)
        dtype = torch.bfloat16 if bf16 else torch.float32
        model = build_model(architecture, groups, dtype=dtype, device=torch.device("cpu"))
        frozen = sum(p.numel() * p.element_size() for chunk in model.chunks for p in chunk.parameters())
        if adapters is not None:
            model = add_adapters(model, adapters, seed=0)
        settings = OptimizerConfig(lr=1e-3, name=name, distributed=distributed)
        optimization = optimize(model, settings, steps=1)
        with use_parallel_state(groups):
            optimization.optimizer.step()
        storages = {p.untyped_storage().data_ptr(): p for chunk in model.chunks for p in chunk.parameters()}
        parts = getattr(optimization.optimizer, "chained_optimizers", [optimization.optimizer])
        buffers = [b for ddp in optimization.wrapped for b in (*ddp.buffers, *ddp.expert_parallel_buffers)]
        found.append(
            {
                "frozen": frozen,
                "weights": sum(p.untyped_storage().nbytes() for p in storages.values()),
                "gradients": sum(buffer.grad_data.numel() * buffer.grad_data.element_size() for buffer in buffers),
                "optimizer": sum(bytes_of_states(o, set(storages)) for o in parts),
                "stage": groups.stage,
                "data_ranks": dist.get_world_size(groups.pg.dp_cp),
            }
        )
    return found


def bytes_of_states(optimizer: Any, weights: set[int]) -> int:
    """Moments, and the fp32 copies of lower-precision weights: what lies in none of the ``weights``' storages."""
    if optimizer.optimizer is None:  # no experts on this stage
        return 0
    kept = [t for state in optimizer.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
    copies = [p for group in optimizer.optimizer.param_groups for p in group["params"] if p.dtype == torch.float32]
    fresh = [p for p in copies if p.untyped_storage().data_ptr() not in weights]
    # a count of steps per parameter is one number
    return sum(t.numel() * t.element_size() for t in (*kept, *fresh) if t.dim())


@pytest.mark.slow
def test_planned_states_are_what_megatron_allocates():
    every = run_on_ranks(held_by_megatron, CASES, world_size=4, timeout_s=240)
    for number, (architecture, layout, bf16, distributed, name, adapters) in enumerate(CASES):
        itemsize, here = 2 if bf16 else 4, [rank[number] for rank in every]
        for rank in here:
            planned = trained_states(
                architecture,
                layout,
                data_ranks=rank["data_ranks"],
                itemsize=itemsize,
                moments=0 if name == "sgd" else 2,
                distributed=distributed,
                stage=rank["stage"],
                adapters=adapters,
            )
            assert (planned.weights, planned.gradients) == (rank["weights"], rank["gradients"]), (number, rank)
            if distributed:
                # padding has no state: it is in the share of the last ranks
                assert planned.optimizer - rank["optimizer"] >= 0, (number, rank, planned)
            else:
                assert planned.optimizer == rank["optimizer"], (number, rank, planned)
        assert frozen_states(architecture, layout, itemsize=itemsize).weights == max(rank["frozen"] for rank in here)
        if distributed:
            filled = 0.9 if adapters is None else 0.7  # small matrices leave more padding
            assert any(
                rank["optimizer"] > filled * trained_states(
                    architecture, layout, data_ranks=rank["data_ranks"], itemsize=itemsize,
                    distributed=True, stage=rank["stage"], adapters=adapters,
                ).optimizer
                for rank in here
            )  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "published"),
    [
        # config.json of Qwen3-8B, Qwen2.5-1.5B and Qwen3-30B-A3B, and the totals their model cards give
        ((36, 4096, 12288, 32, 8, 128, 151936, False, True, False, 0, 0), 8.19e9),
        ((28, 1536, 8960, 12, 2, 128, 151936, True, False, True, 0, 0), 1.54e9),
        ((48, 2048, 768, 32, 4, 128, 151936, False, True, False, 128, 8), 30.5e9),
    ],
    ids=["qwen3-8b", "qwen2.5-1.5b", "qwen3-30b-a3b"],
)
def test_published_models_have_their_published_number_of_parameters(sizes: tuple[Any, ...], published: float):
    names = (
        *("num_layers", "hidden_size", "ffn_size", "num_heads", "num_kv_heads", "head_dim", "vocab_size"),
        *("tied_embeddings", "qk_norm", "qkv_bias", "num_experts", "experts_per_token"),
    )
    architecture = replace(DENSE, **dict(zip(names, sizes, strict=True)))
    assert total_parameters(architecture) == pytest.approx(published, rel=0.005)
