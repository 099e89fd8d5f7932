"""Checkpoints of an optimizer: training goes on from one as if it had never stopped, with Adam and with SGD."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tropd.convert.hf import read_architecture
from megatron_tropd.engine.checkpoint import load_checkpoint, save_checkpoint
from megatron_tropd.engine.model import Model, build_model
from megatron_tropd.engine.optimizer import Optimization, OptimizerSettings, optimize
from megatron_tropd.engine.patches.parallel_state import use_parallel_state
from megatron_tropd.parallel.groups import GroupBuilder, Layout, initialize_distributed
from tests.support.distributed import run_on_ranks
from tests.support.tiny_families import save_family

KINDS: dict[str, dict[str, Any]] = {
    "adam": {"name": "adam"},
    "sgd": {"name": "sgd", "momentum": 0.0},
    "momentum": {"name": "sgd", "momentum": 0.9},
}


def continued(root: str) -> dict[str, bool]:
    """By optimizer, whether the second step is the same from a checkpoint as without one."""
    found, device, groups = {}, initialize_distributed(), GroupBuilder().build(Layout())

    def fresh(kind: str) -> tuple[Model, Optimization]:
        architecture = read_architecture(Path(root) / "model")
        model = build_model(architecture, groups, dtype=torch.float32, device=device, initialise=False)
        for parameter in model.chunks[0].parameters():
            parameter.data.fill_(1.0)
        settings = OptimizerSettings(lr=1e-2, weight_decay=0.0, clip_grad=0.0, total_updates=4, **KINDS[kind])
        return model, optimize(model, settings)

    def step(model: Model, optimization: Optimization, gradient: float) -> None:
        for parameter in model.chunks[0].parameters():
            parameter.main_grad.fill_(gradient)
        optimization.set_update(0)
        with use_parallel_state(groups):
            optimization.optimizer.step()

    for kind in KINDS:
        whole, resumed = fresh(kind), fresh(kind)
        step(*whole, gradient=0.5)
        checkpoint = save_checkpoint(Path(root) / kind, *whole, step=1, state={})
        step(*whole, gradient=-0.2)
        load_checkpoint(checkpoint, *resumed)
        step(*resumed, gradient=-0.2)
        pairs = zip(whole[0].chunks[0].parameters(), resumed[0].chunks[0].parameters(), strict=True)
        found[kind] = all(a.equal(b) and not bool((a == 1.0).all()) for a, b in pairs)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bool]:
    root = tmp_path_factory.mktemp("optimizers")
    save_family(root / "model", "llama3")
    result: dict[str, bool] = run_on_ranks(continued, str(root), world_size=1)[0]
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_after_a_checkpoint_is_that_of_an_unbroken_training(kind, found):
    assert found[kind]
