"""Runs tiny models with adapters under any layout and hands back what can be compared with `peft`.

``run_cases`` runs on every rank of ``run_on_ranks``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.config.sections import Layout, OptimizerConfig
from megatron_tropd.convert.hf import read_architecture
from megatron_tropd.convert.peft import PeftAdapter, write_peft
from megatron_tropd.engine.adapters import adapter_tensors, add_adapters, load_adapters, updates_of
from megatron_tropd.engine.model import Model
from megatron_tropd.engine.optimizer import Optimization, optimize
from megatron_tropd.engine.step import Trainer
from megatron_tropd.engine.weights import hf_tensors
from megatron_tropd.methods import build_method
from megatron_tropd.models.adapters import adapter_shapes
from megatron_tropd.parallel.groups import GroupBuilder, initialize_distributed
from megatron_tropd.setup.build import load_model
from megatron_tropd.types import AdapterSpec, single_turn
from tests.support.family_cases import export, items_of, local_logits
from tests.support.tiny_models import grouped_rollouts

STEP = OptimizerConfig(lr=3e-3, eps=1e-4, clip_grad=0.0, weight_decay=0.01)
RANK, ALPHA = 5, 7.0


@dataclass(frozen=True, kw_only=True)
class Case:
    family: str
    layout: dict[str, Any] = field(default_factory=dict)
    recompute: str = "none"
    prefix: str = ""  # of its name
    shared: bool = False  # whether what sequences begin with alike is computed once

    @property
    def name(self) -> str:
        axes = "-".join(f"{axis[:2]}{size:d}" for axis, size in self.layout.items())
        more = [self.recompute] * (self.recompute != "none") + ["shared"] * self.shared
        return self.prefix + "-".join([self.family, axes or "replicas", *more])


def logits_of(model: Model) -> dict[str, Tensor]:
    """As ``local_logits``; none under context parallelism, which leaves a rank stretches of sequences."""
    return local_logits(model) if model.groups.layout.context == 1 else {}


def run_cases(cases: Sequence[Case], dropped: Sequence[Case], root: str) -> dict[str, dict[str, Any]]:
    """Every case: logits, gradients, and matrices, logits and exports after a step; and those with dropout."""
    device, builder = initialize_distributed(), GroupBuilder()
    found = {case.name: _run(case, Path(root), builder, device) for case in cases}
    return found | {f"dropped-{case.name}": _dropped(case, Path(root), builder, device) for case in dropped}


def adapted(case: Case, root: Path, builder: GroupBuilder, device: torch.device) -> Model:
    """The case's model with the adapter that `peft` saved for it."""
    groups = builder.build(Layout(**case.layout))
    model = load_model(root / case.family, groups, dtype=torch.float32, device=device, recompute=case.recompute)
    adapter = PeftAdapter(root / f"{case.family}-adapter", read_architecture(root / case.family))
    model = add_adapters(model, adapter.spec, seed=3)
    load_adapters(model, adapter)
    return model


def _run(case: Case, root: Path, builder: GroupBuilder, device: torch.device) -> dict[str, Any]:
    source, target = root / case.family, root / "exported" / case.name
    model = adapted(case, root, builder, device)
    groups = model.groups
    weights = {n: p.detach().clone() for c in model.chunks for n, p in c.named_parameters() if not p.requires_grad}
    found: dict[str, Any] = {
        "logits": logits_of(model),
        "base": logits_of(model.frozen_base()),
        "shard": groups.tensor_rank if groups.is_last_stage else -1,
        "first": groups.replica == 0 and groups.context_rank == 0,
    }
    export_adapter(model, source, target / "adapter-before")
    found["unmerged"] = {name: tensor.clone() for name, tensor in hf_tensors(model.frozen_base())}
    optimization = optimize(model, STEP, steps=1)
    found["trained_elements"] = trained_elements(optimization)
    trainer, items = Trainer(model, optimization, build_method("sft")), items_of(model)
    found["loss"] = trainer.probe(items).loss
    found["gradients"] = local_matrices(model, gradients=True)
    found["grad_norm"] = trainer.step(items, update=0).grad_norm
    found["stepped"] = local_matrices(model)
    found["trained"] = logits_of(model)
    export_adapter(model, source, target / "adapter-after")
    export(model, source, target / "merged")
    after = {n: p for c in model.chunks for n, p in c.named_parameters() if not p.requires_grad}
    found["base_untouched"] = all(after[name].equal(weight) for name, weight in weights.items())
    return found


def _dropped(case: Case, root: Path, builder: GroupBuilder, device: torch.device) -> dict[str, Any]:
    """Gradients of two updates in which inputs of adapters are dropped, and of a probe, in which none are."""
    groups = builder.build(Layout(**case.layout))
    model = load_model(root / case.family, groups, dtype=torch.float32, device=device, recompute=case.recompute)
    targets = ("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
    spec = AdapterSpec(rank=RANK, alpha=ALPHA, dropout=0.3, targets=targets)
    model = add_adapters(model, spec, seed=11)
    generator = torch.Generator().manual_seed(5)
    shapes = adapter_shapes(model.architecture, spec)
    load_adapters(model, {key: 0.15 * torch.randn(shape, generator=generator) for key, shape in shapes.items()})
    rollouts = [
        replace(
            one,
            region_L=single_turn(prompt=1, prefix=len(one.token_ids) - 1),
            sampling_logprob=np.empty(0, np.float32),
            model_logprob=np.empty(0, np.float32),
        )
        for one in grouped_rollouts(0, vocab_size=model.architecture.vocab_size)
    ]
    optimization = optimize(model, OptimizerConfig(name="sgd", lr=1e-30, clip_grad=0.0), steps=2)
    trainer = Trainer(model, optimization, build_method("sft"))
    items = items_of(model, rollouts, share=case.shared)
    found: dict[str, Any] = {"first": groups.replica == 0 and groups.context_rank == 0}
    found["loss"] = trainer.probe(items).loss
    found["none dropped"] = local_matrices(model, gradients=True)
    for update in (0, 1):
        found[f"loss {update}"] = trainer.step(items, update=update).loss
        found[f"update {update}"] = local_matrices(model, gradients=True)
    return found


def trained_elements(optimization: Optimization) -> dict[str, int]:
    """Elements of the gradients' buffers, and of what the optimizer updates."""
    parts = getattr(optimization.optimizer, "chained_optimizers", [optimization.optimizer])
    buffers = [b for ddp in optimization.wrapped for b in (*ddp.buffers, *ddp.expert_parallel_buffers)]
    held = [p for part in parts if part.optimizer for group in part.optimizer.param_groups for p in group["params"]]
    return {"gradients": sum(b.numel for b in buffers), "optimizer": sum(p.numel() for p in held)}


def local_matrices(model: Model, *, gradients: bool = False) -> dict[str, dict[str, Any]]:
    """This rank's part of every matrix by `peft`'s name, and the axis it is cut along (-1: none)."""
    found: dict[str, dict[str, Any]] = {}
    for update in updates_of(model):
        for part in update.linear.adapted:
            for name in ("A", "B"):
                parameter, axis = update.matrix(part, name), update.cut_axis(name)
                value = parameter.main_grad if gradients else parameter.detach()
                found[part.key(f"lora_{name}")] = {"part": value.clone(), "axis": -1 if axis is None else axis}
    return found


def whole_matrices(ranks: Sequence[dict[str, Any]], key: str) -> dict[str, Tensor]:
    """Put the parts of all ranks of the first replica together; what they have alike must be alike to the bit."""
    parts: dict[str, list[Tensor]] = {}
    axes: dict[str, int] = {}
    for rank in ranks:
        for name, matrix in rank[key].items() if rank["first"] else ():
            parts.setdefault(name, []).append(matrix["part"])
            axes[name] = matrix["axis"]
    whole = {}
    for name, found in parts.items():
        alike = axes[name] < 0
        assert not alike or all(part.equal(found[0]) for part in found), f"tensor ranks differ in {name}"
        whole[name] = found[0] if alike else torch.cat(found, dim=axes[name])
    return whole


def export_adapter(model: Model, source: Path, target: Path) -> None:
    assert model.adapters is not None
    tensors = dict(adapter_tensors(model))
    if dist.get_rank() == 0:
        write_peft(target, tensors, model.adapters.spec, base=str(source))
    dist.barrier()
