"""Trains a case with all that is idle in host memory, looks at the device meanwhile, and goes on from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tropd.engine.checkpoint import load_checkpoint, save_checkpoint
from megatron_tropd.engine.model import Model
from megatron_tropd.engine.offload import device_bytes
from megatron_tropd.engine.score import pack_alone, score_packs
from megatron_tropd.engine.weights import hf_tensors
from megatron_tropd.errors import EngineError
from megatron_tropd.parallel.groups import GroupBuilder
from megatron_tropd.report.stopwatch import Stopwatch
from megatron_tropd.setup.build import Run
from megatron_tropd.train.loop import score_and_pack
from megatron_tropd.train.rollout_queue import score_rollouts
from tests.support.layout_cases import VOCAB, Case, assemble, config_of
from tests.support.tiny_models import random_rollouts

STEPS, HALFWAY = 2, 1


def compare(cases: Sequence[Case], models: str, folder: str) -> dict[str, dict[str, Any]]:
    """On the ranks: each case as it is, with all offloads, and with all offloads from its own checkpoint on."""
    builder, found = GroupBuilder(), {}
    for number, case in enumerate(cases):
        moved, root = replace(case, offload=True), Path(folder) / str(number)
        plain = _train(assemble(config_of(case, Path(models)), builder), range(STEPS))
        run = assemble(config_of(moved, Path(models)), builder)
        run.trainer.end_step()
        first = _train(run, range(HALFWAY), resting=True)
        checkpoint = save_checkpoint(root, run.student, run.trainer.optimization, step=HALFWAY, state={})
        kept = _bytes_while_resting(run)
        rest = _train(run, range(HALFWAY, STEPS), resting=True)
        resumed = assemble(config_of(moved, Path(models)), builder)
        resumed.trainer.end_step()
        load_checkpoint(checkpoint, resumed.student, resumed.trainer.optimization)
        again = _train(resumed, range(HALFWAY, STEPS), resting=True)
        found[case.name] = {
            "steps": first["steps"] + rest["steps"] == plain["steps"],
            "weights": _same(rest["weights"], plain["weights"]),
            "resumed": again["steps"] == plain["steps"][HALFWAY * case.minibatches :]
            and _same(again["weights"], plain["weights"]),
            "bytes": first["bytes"] + rest["bytes"] + again["bytes"] + [kept],
            "refusals": _refusals(run),
            "moved": [run.world.offload_stats.to_host, run.world.offload_stats.to_device],
        }
    return found


def _train(run: Run, steps: range, *, resting: bool = False) -> dict[str, Any]:
    per_step, found = run.train.minibatches, []
    left: list[int] = []
    for step in steps:
        scored = score_rollouts(run, random_rollouts(step, vocab_size=VOCAB), watch=Stopwatch())
        minibatches = score_and_pack(run, scored, step=step, watch=Stopwatch())
        if resting:
            left.append(_bytes_while_resting(run))
        for number, packs in enumerate(minibatches):
            result = run.trainer.step(packs, update=step * per_step + number)
            found.append((result.loss, result.grad_norm, sorted(result.stats.items())))
            if resting:  # gradients may stay for the next minibatch
                left.append(device_bytes(frozen(run)) + device_bytes(states(run)))
        run.trainer.end_step()
        if resting:
            left.append(_bytes_while_resting(run))
    return {"steps": found, "weights": {n: t.clone() for n, t in hf_tensors(run.student)}, "bytes": left}


def _bytes_while_resting(run: Run) -> int:
    """Left on the device of what is idle between the updates."""
    return device_bytes(frozen(run)) + device_bytes(states(run)) + device_bytes(gradients(run))


def frozen(run: Run) -> Iterator[Tensor]:
    """Weights of the models that only grade."""
    for model in graders(run):
        for chunk in model.chunks:
            yield from chunk.parameters()


def graders(run: Run) -> list[Model]:
    """The teacher and, where there is one, the base model."""
    assert run.teacher_model is not None
    base = getattr(run.teacher, "_base", None)
    return [run.teacher_model, *([] if base is None else [base.model])]


def states(run: Run) -> Iterator[Tensor]:
    """Moments and fp32 weights of the student, without the weights that it computes with."""
    weights = {p.untyped_storage()._cdata for chunk in run.student.chunks for p in chunk.parameters()}
    optimizer = run.trainer.optimization.optimizer
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        for group in inner.param_groups:
            yield from (p for p in group["params"] if p.untyped_storage()._cdata not in weights)
        for state in inner.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def gradients(run: Run) -> Iterator[Tensor]:
    for chunk in run.student.chunks:
        yield from (p.main_grad for p in chunk.parameters())  # type: ignore[attr-defined]


def _same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def _refusals(run: Run) -> int:
    """How many of three uses of what is away were refused: weights read, a forward, an update."""
    teacher = run.teacher_model
    assert teacher is not None and run.trainer.optimization.states.away
    packs = pack_alone(random_rollouts(0, vocab_size=VOCAB)[0].token_ids, teacher.groups.layout)[0]
    refused = 0
    for use in (
        lambda: list(hf_tensors(teacher)),
        lambda: score_packs(teacher, packs, vocab_size=VOCAB),
        lambda: [part.optimizer.step() for part in _parts(run)],
    ):
        with pytest.raises(EngineError, match="while in host memory"):
            use()
        refused += 1
    return refused


def _parts(run: Run) -> list[Any]:
    optimizer = run.trainer.optimization.optimizer
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))
