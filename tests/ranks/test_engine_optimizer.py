"""Checkpoints of an optimizer: training goes on from one as if it had never stopped, with Adam and with SGD."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tropd.config.sections import OptimizerConfig
from megatron_tropd.convert.hf import read_architecture
from megatron_tropd.engine.checkpoint import load_checkpoint, save_checkpoint
from megatron_tropd.engine.model import Model, build_model
from megatron_tropd.engine.optimizer import Optimization, optimize
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
        settings = OptimizerConfig(lr=1e-2, weight_decay=0.0, clip_grad=0.0, **KINDS[kind])
        return model, optimize(model, settings, steps=4)

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


def learning_rates(root: str) -> list[float]:
    """Of every update of four steps of two minibatches each, the first step warming up."""
    device, groups = initialize_distributed(), GroupBuilder().build(Layout())
    model = build_model(read_architecture(Path(root) / "model"), groups, dtype=torch.float32, device=device)
    settings = OptimizerConfig(name="sgd", lr=0.7, schedule="linear", warmup_steps=1)
    optimization = optimize(model, settings, steps=4, minibatches=2)
    return [optimization.set_update(update) for update in range(8)]


def test_a_warm_up_of_steps_is_one_of_all_their_updates(tmp_path: Path):
    save_family(tmp_path / "model", "llama3")
    found = run_on_ranks(learning_rates, str(tmp_path), world_size=1)[0]
    # by hand: two updates up to 0.7, then seven equal parts down, of which the last is never reached
    assert found == pytest.approx([0.35, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_after_a_checkpoint_is_that_of_an_unbroken_training(kind, found):
    assert found[kind]
