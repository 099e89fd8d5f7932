"""Megatron's DDP wrapper, optimizer and learning-rate schedule around one model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_tropd.engine.model import Model
from megatron_tropd.engine.view import megatron_sees

# a norm this large is never reached: clipping off, gradient norm still measured
_NO_CLIPPING = 1e30


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerSettings:
    """Optimizer and schedule of one run (``optimizer.*`` of the config)."""

    lr: float
    total_updates: int
    name: str = "adam"
    schedule: str = "constant"
    warmup_updates: int = 0
    min_lr: float = 0.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_grad: float = 1.0
    momentum: float = 0.0
    distributed: bool = False  # shard optimizer states over data-parallel ranks


@dataclass(frozen=True, slots=True)
class Optimization:
    """The trainable side of a model."""

    wrapped: list[DistributedDataParallel]
    optimizer: Any
    scheduler: OptimizerParamScheduler

    def set_update(self, update: int) -> float:
        """Sets learning rate and weight decay for the ``update``-th update (from 0); returns the learning rate.

        The rate is that of ``update + 1``: the first update of a warm-up must not be at rate 0.
        """
        self.scheduler.num_steps = update + 1
        self.scheduler.step(0)
        return float(max(group["lr"] for group in self.optimizer.param_groups))


def _give_momentum(optimizer: torch.optim.Optimizer, config: OptimizerConfig | None = None) -> None:
    """Makes the state that SGD has after a step, for a checkpoint to be loaded into."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def optimize(model: Model, settings: OptimizerSettings) -> Optimization:
    """Wraps the model's chunks for training. Collective over the world."""
    bf16 = model.dtype == torch.bfloat16
    config = OptimizerConfig(
        optimizer=settings.name,
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        sgd_momentum=settings.momentum,
        clip_grad=settings.clip_grad or _NO_CLIPPING,
        bf16=bf16,
        params_dtype=model.dtype,
        use_distributed_optimizer=settings.distributed,
    )
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=settings.distributed)
    with megatron_sees(model.groups):
        wrapped = [
            DistributedDataParallel(
                model.config, ddp, chunk, pg_collection=model.groups.pg, disable_bucketing=number > 0
            )
            for number, chunk in enumerate(model.chunks)
        ]
        optimizer = get_megatron_optimizer(
            config, wrapped, use_gloo_process_groups=False, pg_collection=model.groups.pg
        )
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.init_state_fn is None:  # Megatron gives SGD none, and cannot load its state without
            part.init_state_fn = _give_momentum
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=settings.warmup_updates,
        # one more than there are updates, so that the last one is not at the rate of the end
        lr_decay_steps=max(settings.total_updates, settings.warmup_updates + 1) + 1,
        lr_decay_style=settings.schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    return Optimization(wrapped, optimizer, scheduler)
