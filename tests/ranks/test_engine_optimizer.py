"""Checkpoints of an optimizer: training goes on from one as if it had never stopped, with Adam and with SGD."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tropd.config.sections import Layout, OptimizerConfig
from megatron_tropd.convert.hf import read_architecture
from megatron_tropd.engine.checkpoint import load_checkpoint, save_checkpoint
from megatron_tropd.engine.model import Model, build_model
from megatron_tropd.engine.optimizer import Optimization, optimize
from megatron_tropd.engine.patches.parallel_state import use_parallel_state
from megatron_tropd.parallel.groups import GroupBuilder, initialize_distributed
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
        model = build_model(architecture, groups, dtype=torch.float32, device=device, initialize=False)
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


def resumed_otherwise(root: str) -> dict[str, dict[str, set[float]]]:
    """Settings of all groups of parameters after a checkpoint of others was loaded and the fifth of 8 updates set."""
    device = initialize_distributed()
    groups = GroupBuilder().build(Layout())
    architecture = read_architecture(Path(root) / "model")

    def fresh(kind: str, *, steps: int, **settings: Any) -> tuple[Model, Optimization]:
        model = build_model(architecture, groups, dtype=torch.float32, device=device, initialize=False)
        return model, optimize(model, OptimizerConfig(**KINDS[kind], **settings), steps=steps)

    found = {}
    for kind in KINDS:
        of_adam = kind == "adam"
        then = {"beta1": 0.8, "beta2": 0.9, "eps": 1e-6} if of_adam else {}
        now = {"beta1": 0.7, "beta2": 0.95, "eps": 1e-7} if of_adam else {}
        old = fresh(kind, lr=1e-2, steps=4, weight_decay=0.0, **then)
        old[1].set_update(3)
        for parameter in old[0].chunks[0].parameters():
            parameter.main_grad.fill_(0.5)
        with use_parallel_state(groups):
            old[1].optimizer.step()
        checkpoint = save_checkpoint(Path(root) / f"other {kind}", *old, step=4, state={})
        settings = {"lr": 4e-3, "min_lr": 1e-3, "schedule": "linear", "weight_decay": 0.1}
        new = fresh(kind, steps=8, **now, **settings)
        load_checkpoint(checkpoint, *new)
        new[1].set_update(4)
        every = new[1].optimizer.param_groups
        found[kind] = {
            name: {value for group in every for value in _values(group.get(name))}
            for name in ("lr", "weight_decay", "betas", "eps")
        }
    return found


def _values(value: Any) -> tuple[float, ...]:
    return () if value is None else tuple(value) if isinstance(value, tuple | list) else (value,)


@pytest.fixture(scope="module")
def otherwise(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, set[float]]]:
    root = tmp_path_factory.mktemp("otherwise")
    save_family(root / "model", "llama3")
    result: dict[str, dict[str, set[float]]] = run_on_ranks(resumed_otherwise, str(root), world_size=1)[0]
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_goes_on_has_its_own_learning_rate_schedule_decay_betas_and_eps(kind, otherwise):
    # the fifth of eight updates, where the ninth would be at min_lr: 5/9 of the way from 4e-3 to 1e-3
    assert list(otherwise[kind]["lr"]) == [pytest.approx(4e-3 - 5 / 9 * 3e-3, rel=1e-12)]
    assert otherwise[kind]["weight_decay"] == {0.0, 0.1}  # norms have none
    if kind == "adam":
        assert otherwise[kind]["betas"] == {0.7, 0.95} and otherwise[kind]["eps"] == {1e-7}


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


# --------------------------------------------------------------------------- weight decay


def decayed(root: str) -> dict[str, list[set[float]]]:
    """What all weights are that began as 1, matrices and norms by themselves, after each of two updates of SGD."""
    device, groups = initialize_distributed(), GroupBuilder().build(Layout())
    architecture = read_architecture(Path(root) / "model")
    found: dict[str, list[set[float]]] = {"matrices": [], "norms": []}
    model = build_model(architecture, groups, dtype=torch.float32, device=device, initialize=False)
    for parameter in model.chunks[0].parameters():
        parameter.data.fill_(1.0)
    settings = OptimizerConfig(name="sgd", momentum=0.9, lr=0.1, weight_decay=0.5, clip_grad=0.0)
    optimization = optimize(model, settings, steps=4)
    for update, gradient in enumerate((0.5, 0.2)):
        for parameter in model.chunks[0].parameters():
            parameter.main_grad.fill_(gradient)
        optimization.set_update(update)
        with use_parallel_state(groups):
            optimization.optimizer.step()
        for name, dimensions in (("matrices", 2), ("norms", 1)):
            weights = [p for p in model.chunks[0].parameters() if p.dim() == dimensions]
            found[name].append({round(float(value), 5) for p in weights for value in p.detach().unique()})
    return found


def test_the_decay_of_sgd_is_beside_its_momentum_and_spares_norms(tmp_path):
    save_family(tmp_path / "model", "qwen3")
    [found] = run_on_ranks(decayed, str(tmp_path), world_size=1)
    # by hand: the momentum is 0.5, then 0.9 * 0.5 + 0.2 = 0.65; matrices shrink by 0.1 * 0.5 of what they are
    assert found["matrices"] == [{0.9}, {0.79}]  # 0.95 - 0.05; 0.9 * 0.95 - 0.065
    assert found["norms"] == [{0.95}, {0.885}]
