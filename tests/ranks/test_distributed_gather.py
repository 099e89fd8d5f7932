"""A distributed optimizer's checkpoint is gathered on one rank of a model's replicas, in its host memory alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_tropd.config.sections import Layout, OptimizerConfig
from megatron_tropd.convert.hf import read_architecture
from megatron_tropd.engine.checkpoint import load_checkpoint, save_checkpoint
from megatron_tropd.engine.model import Model, build_model
from megatron_tropd.engine.optimizer import Optimization, optimize
from megatron_tropd.engine.patches.parallel_state import use_parallel_state
from megatron_tropd.parallel.groups import GroupBuilder, initialize_distributed
from tests.support.distributed import run_on_ranks
from tests.support.tiny_families import save_family


def gathered(root: str) -> dict[str, Any]:
    """On two replicas: whether training goes on from a checkpoint, and how often whole states were gathered where."""
    device, groups = initialize_distributed(), GroupBuilder().build(Layout())
    architecture = read_architecture(Path(root) / "model")

    def fresh() -> tuple[Model, Optimization]:
        model = build_model(architecture, groups, dtype=torch.float32, device=device, initialize=False)
        for parameter in model.chunks[0].parameters():
            parameter.data.fill_(1.0)
        settings = OptimizerConfig(lr=1e-2, weight_decay=0.0, clip_grad=0.0, distributed=True)
        return model, optimize(model, settings, steps=4)

    def step(model: Model, optimization: Optimization, gradient: float) -> None:
        for parameter in model.chunks[0].parameters():
            parameter.main_grad.fill_(gradient)
        optimization.set_update(0)
        with use_parallel_state(groups):
            optimization.optimizer.prepare_grads()
            optimization.apply(0.0)
        optimization.end_step()

    everywhere: list[int] = []
    all_gather = dist.all_gather

    def counted(tensors: list[torch.Tensor], *args: Any, **kwargs: Any) -> Any:
        everywhere.append(sum(tensor.numel() for tensor in tensors))
        return all_gather(tensors, *args, **kwargs)

    whole, resumed = fresh(), fresh()
    step(*whole, gradient=0.5)
    dist.all_gather = counted
    checkpoint = save_checkpoint(Path(root) / "checkpoints", *whole, step=1, state={})
    dist.all_gather = all_gather
    step(*whole, gradient=-0.2)
    load_checkpoint(checkpoint, *resumed)
    step(*resumed, gradient=-0.2)
    pairs = list(zip(whole[0].chunks[0].parameters(), resumed[0].chunks[0].parameters(), strict=True))
    return {
        "same": all(a.equal(b) and not bool((a == 1.0).all()) for a, b in pairs),
        "on every rank": sum(everywhere),
        "parameters": sum(a.numel() for a, _ in pairs),
    }


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    root = tmp_path_factory.mktemp("gathered")
    save_family(root / "model", "llama3")
    return run_on_ranks(gathered, str(root), world_size=2)


def test_training_goes_on_from_states_that_were_gathered_on_one_rank(found: list[dict[str, Any]]):
    assert [rank["same"] for rank in found] == [True, True]


def test_no_rank_but_one_holds_whole_states_while_they_are_saved(found: list[dict[str, Any]]):
    # three numbers per parameter would be gathered on both
    assert all(rank["on every rank"] < rank["parameters"] for rank in found), found
