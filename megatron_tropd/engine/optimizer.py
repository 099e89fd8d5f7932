"""Megatron's DDP wrapper, optimizer and learning-rate schedule around one model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_tropd.config.sections import OptimizerConfig
from megatron_tropd.engine.model import Model
from megatron_tropd.engine.offload import OffloadedTensors, OffloadStats
from megatron_tropd.engine.overlap import Overlap
from megatron_tropd.engine.patches.compiler import building_optimizers
from megatron_tropd.engine.patches.cuda_calls import cuda_names_mean_cpu
from megatron_tropd.engine.patches.optimizer_states import load_without_steps
from megatron_tropd.engine.patches.parallel_state import use_parallel_state

# a norm this large is never reached: clipping off, gradient norm still measured
_NO_CLIPPING = 1e30
_GROUP_STATE = ("params", "step")  # of a group of parameters: what is state, not settings


@dataclass(frozen=True, slots=True)
class Optimization:
    """The trainable side of a model."""

    wrapped: list[DistributedDataParallel]
    optimizer: Any
    scheduler: OptimizerParamScheduler
    states: OffloadedTensors  # the optimizer's, and its fp32 weights where they are not the model's own
    gradients: OffloadedTensors
    offload: bool = False
    overlap: Overlap | None = None

    def training(self) -> AbstractContextManager[None]:
        """Prepare for the forward and backward of an update, or of a probe."""
        return nullcontext() if self.overlap is None else self.overlap.training()

    def init_optimizer_state(self) -> None:
        """Give a distributed torch Adam the states it has after a step: Megatron loads into nothing less."""
        for part in filter(_is_distributed_torch, _parts(self.optimizer)):
            for parameter in (p for group in part.optimizer.param_groups for p in group["params"]):
                zeros = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                part.optimizer.state[parameter] = part.optimizer.state[parameter] or {**zeros, "step": torch.zeros(())}

    def load(self, state: dict[str, Any]) -> None:
        """Take the states from the optimizer's part of a checkpoint; the settings stay those of this run.

        A checkpoint holds learning rate, weight decay, betas and eps of every group of parameters as well, and Megatron
        would put them in place of those that the optimizer was made with.
        """
        own = [[dict(group) for group in part.optimizer.param_groups] for part in _parts(self.optimizer)]
        self.optimizer.load_state_dict(state)
        for part, groups in zip(_parts(self.optimizer), own, strict=True):
            for group, settings in zip(part.optimizer.param_groups, groups, strict=True):
                group.update({name: value for name, value in settings.items() if name not in _GROUP_STATE})
        for part in _parts(self.optimizer):
            # Megatron may give all parameters one `step`, which each of them would then advance
            for own in (own for own in part.optimizer.state.values() if isinstance(own.get("step"), Tensor)):
                own["step"] = own["step"].clone()

    def end_step(self) -> None:
        """Complete what is under way after the updates of a step. Collective.

        With ``optimizer.offload`` states and gradients then leave the device. States are there only within an update;
        gradients come back, as zeros, when there are new ones to sum.
        """
        if self.overlap is not None:
            self.overlap.finish_gathers()
        if self.offload:
            self.states.offload()
            self.gradients.offload()

    def apply(self, grad_norm: float) -> None:
        """Clip the gradients, of which ``prepare_grads`` has been called and the norm is known, and update.
        Collective.

        Megatron's own ``step`` would copy the gradients and take their norm another time.
        """
        with cuda_names_mean_cpu():  # clipping asks gradients for the name of CUDA's fp32
            for part in _parts(self.optimizer):
                if parameters := part.get_parameters():
                    clip_grad_by_total_norm_fp32(parameters, max_norm=part.config.clip_grad, total_norm=grad_norm)
        self.optimizer.step_with_ready_grads()

    def set_update(self, update: int) -> float:
        """Set learning rate and weight decay for the ``update``-th update (from 0); return the learning rate.

        The rate is that of ``update + 1``: the first update of a warm-up must not be at rate 0.
        """
        self.scheduler.num_steps = update + 1
        self.scheduler.step(0)
        return float(max(group["lr"] for group in self.optimizer.param_groups))


def _give_momentum(optimizer: torch.optim.Optimizer, config: MegatronOptimizerConfig | None = None) -> None:
    """Make the state that SGD has after a step, for a checkpoint to be loaded into."""
    for group in optimizer.param_groups:
        for parameter in group["params"] if group["momentum"] else ():
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def _parts(optimizer: Any) -> list[Any]:
    """List Megatron's optimizers that have parameters: another one for experts."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in chained if not getattr(part, "is_stub_optimizer", False)]


def _states(optimizer: Any, wrapped: Sequence[torch.nn.Module]) -> Iterator[Tensor]:
    """List the tensors that the optimizer keeps besides the model's weights, of which its parameters may be views."""
    weights = {p.untyped_storage().data_ptr() for module in wrapped for p in module.parameters()}
    for part in _parts(optimizer):
        inner = part.optimizer
        held = [parameter for group in inner.param_groups for parameter in group["params"]]
        held += [value for state in inner.state.values() for value in state.values() if isinstance(value, Tensor)]
        yield from (tensor for tensor in held if tensor.untyped_storage().data_ptr() not in weights)


def _gradients(wrapped: Sequence[DistributedDataParallel]) -> Iterator[Tensor]:
    for module in wrapped:
        yield from (buffer.grad_data for buffer in (*module.buffers, *module.expert_parallel_buffers))


def fuse_adam(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Let torch's AdamW, which Megatron takes for want of Transformer Engine and apex, update in one kernel on a GPU.

    By default its temporaries are as large as the states.
    """
    if device.type == "cuda" and isinstance(optimizer, torch.optim.AdamW):
        for group in optimizer.param_groups:
            group["fused"], group["foreach"] = True, False


def decouple_decay(optimizer: torch.optim.Optimizer) -> None:
    """Let torch's SGD shrink weights beside its step, as AdamW does.

    By itself it adds the decay to the gradient, and so to the momentum, in which it lasts for many updates.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    decays: list[float] = []

    @torch.no_grad()
    def shrink(*_: Any) -> None:
        decays[:] = [group["weight_decay"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1.0 - group["lr"] * group["weight_decay"])
            group["weight_decay"] = 0.0

    def restore(*_: Any) -> None:
        for group, decay in zip(optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay

    optimizer.register_step_pre_hook(shrink)
    optimizer.register_step_post_hook(restore)


def _is_distributed_torch(part: Any) -> bool:
    """Say whether it shards the states of torch's Adam, for want of Apex and Transformer Engine."""
    return isinstance(part, DistributedOptimizer) and isinstance(part.optimizer, torch.optim.AdamW)


def optimize(
    model: Model,
    settings: OptimizerConfig,
    *,
    steps: int,
    minibatches: int = 1,
    offload_stats: OffloadStats | None = None,
    bucket_elements: int | None = None,
) -> Optimization:
    """Wrap the model's chunks for training. Collective over the world.

    Args:
        steps: of the whole run, each of ``minibatches`` updates: the section counts steps, the schedule updates.
        offload_stats: what is to count the bytes that ``Optimization.end_step`` and its undoing move.
        bucket_elements: gradients that are reduced at once under overlap; None: Megatron's 40 million.
    """
    warmup_updates = settings.warmup_steps * minibatches
    bf16 = model.dtype == torch.bfloat16
    config = MegatronOptimizerConfig(
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
        overlap_param_gather=settings.overlap and settings.distributed,
    )
    gathers = settings.overlap and settings.distributed
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=model.dtype != torch.float64,  # at least: proofs are computed in fp64
        use_distributed_optimizer=settings.distributed,
        overlap_grad_reduce=settings.overlap,
        overlap_param_gather=gathers,
        align_param_gather=gathers and len(model.chunks) > 1,
        bucket_size=bucket_elements,
    )
    with use_parallel_state(model.groups), cuda_names_mean_cpu(), building_optimizers():
        wrapped = [
            DistributedDataParallel(
                model.config, ddp, chunk, pg_collection=model.groups.pg, disable_bucketing=number > 0
            )
            for number, chunk in enumerate(model.chunks)
        ]
        optimizer = get_megatron_optimizer(
            config, wrapped, use_gloo_process_groups=False, pg_collection=model.groups.pg
        )
    overlap = Overlap(wrapped, model.config) if settings.overlap else None
    if overlap is not None:
        model.pending.append(overlap.finish_gathers)
    states = OffloadedTensors(
        "an optimizer", lambda: _states(optimizer, wrapped), model.device, offload_stats=offload_stats
    )
    gradients = OffloadedTensors(
        "a buffer of gradients",
        lambda: _gradients(wrapped),
        model.device,
        contents="scratch",
        offload_stats=offload_stats,
    )
    for module in wrapped:
        module.register_forward_pre_hook(lambda *_: gradients.check())
    for part in _parts(optimizer):
        fuse_adam(part.optimizer, model.device)
        if isinstance(part, DistributedOptimizer):
            # gathers of checkpoints take host memory on one rank alone; the group has a gloo end for that
            part.data_parallel_group_gloo = part.data_parallel_group
        part.optimizer.register_step_pre_hook(lambda *_: states.check())
        decouple_decay(part.optimizer)
        if _is_distributed_torch(part):
            load_without_steps(part)
        if part.init_state_fn is None:  # Megatron gives SGD none, and cannot load its state without
            part.init_state_fn = _give_momentum
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=warmup_updates,
        # one more than there are updates, so that the last one is not at the rate of the end
        lr_decay_steps=max(steps * minibatches, warmup_updates + 1) + 1,
        lr_decay_style=settings.schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    return Optimization(wrapped, optimizer, scheduler, states, gradients, settings.offload, overlap)
