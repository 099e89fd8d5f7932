"""Let Megatron-Core run where there is no CUDA; inert where there is.

Megatron-Core names CUDA in a handful of places (``device="cuda"`` literals, ``torch.cuda.current_device()``,
``tensor.type()`` strings). On a machine without CUDA these contexts answer for it with the CPU, through
``torch.overrides``, only while they are active: while models are built, saved and loaded. A mode wraps every call (24 %
of decoding), so what a step names is patched by itself.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def install() -> None:
    """Patch, process-wide: two ``torch.cuda`` functions, RNG of recompute, literals of a step, dispatch to experts.

    Recompute saves and restores the CUDA RNG state; this package trains without dropout, so there is nothing to save.
    """
    if torch.cuda.is_available():
        return
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *args, **kwargs: None
    from megatron.core.optimizer import clip_grads
    from megatron.core.optimizer import optimizer as mcore_optimizer
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.tensor_parallel import mappings
    from megatron.core.tensor_parallel import random as mcore_random

    clip_grads.l2_norm_impl = _norm_in_fp64
    # the literals of a training step, so that no mode need wrap its every call
    schedules.torch = _TorchOnCpu()
    mcore_optimizer.get_grad_norm_fp32 = _answering_for_cuda(clip_grads.get_grad_norm_fp32)
    mcore_optimizer.clip_grad_by_total_norm_fp32 = _answering_for_cuda(clip_grads.clip_grad_by_total_norm_fp32)
    mcore_random._get_cuda_rng_state = lambda *args, **kwargs: None
    mcore_random._set_cuda_rng_state = lambda *args, **kwargs: None
    from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher

    MoEAlltoAllTokenDispatcher.cuda_dtoh_stream = _CPU  # anything but None, for which a CUDA stream would be made
    MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize = _splits_as_lists
    if mappings._gather_along_first_dim is not _gather_uneven:
        _even["gather"] = mappings._gather_along_first_dim
        _even["reduce_scatter"] = mappings._reduce_scatter_along_first_dim
        mappings._gather_along_first_dim = _gather_uneven
        mappings._reduce_scatter_along_first_dim = _reduce_scatter_uneven


def _norm_in_fp64(
    chunk_size: int, overflow: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool, *args: Any
) -> tuple[Tensor, None]:
    """Return the norm of all tensors, summed in fp64: torch sums the squares of a large CPU tensor in fp32."""
    norms = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensors in tensor_lists for tensor in tensors]
    return torch.linalg.vector_norm(torch.stack(norms)).float().reshape(1), None


def _splits_as_lists(dispatcher: Any, point: str, tokens_per_expert: Any = None) -> Any:
    """Return the splits as lists: what Megatron's token dispatcher copies from the device is already on the CPU."""
    if point == dispatcher.cuda_dtoh_point:
        for name in ("input_splits", "output_splits"):
            splits = getattr(dispatcher, name)
            if isinstance(splits, torch.Tensor):
                setattr(dispatcher, name, splits.tolist())
    return tokens_per_expert


# gloo gathers and scatters equal parts only; tensor ranks of a mixture of experts hold unequal ones
_even: dict[str, Callable[..., Tensor]] = {}


def _gather_uneven(
    input_: Tensor, group: dist.ProcessGroup, output_split_sizes: list[int] | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    if output_split_sizes is None or group.size() == 1:
        return _even["gather"](input_, group, output_split_sizes, *args, **kwargs)
    output = input_.new_empty(sum(output_split_sizes), *input_.shape[1:])
    everywhere = torch.cat([input_] * group.size())
    dist.all_to_all_single(output, everywhere, output_split_sizes, [len(input_)] * group.size(), group=group)
    return output


def _reduce_scatter_uneven(
    input_: Tensor, group: dist.ProcessGroup, input_split_sizes: list[int] | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    if input_split_sizes is None or group.size() == 1:
        return _even["reduce_scatter"](input_, group, input_split_sizes, *args, **kwargs)
    mine, ranks = input_split_sizes[group.rank()], group.size()
    parts = input_.new_empty(ranks * mine, *input_.shape[1:])
    dist.all_to_all_single(parts, input_.contiguous(), [mine] * ranks, input_split_sizes, group=group)
    return parts.view(ranks, mine, *input_.shape[1:]).sum(0)


def _names_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _CudaNamesMeanCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # the optimizer compares type() with the names of CUDA tensor types
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        if func is torch.Tensor.to and len(args) > 1 and _names_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        return func(*args, **kwargs)


class _TorchOnCpu:
    """``torch`` for a module that makes its tensors with ``torch.zeros(..., device="cuda")``."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def zeros(*size: Any, device: Any = None, **options: Any) -> Tensor:
        return torch.zeros(*size, device=_CPU if _names_cuda(device) else device, **options)


def _answering_for_cuda(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def answering(*args: Any, **kwargs: Any) -> Any:
        with cuda_names_mean_cpu():
            return function(*args, **kwargs)

    return answering


@contextlib.contextmanager
def cuda_names_mean_cpu() -> Iterator[None]:
    """Let Megatron-Core's CUDA literals mean the CPU within the block (nothing happens where CUDA exists)."""
    if torch.cuda.is_available():
        yield
        return
    with _CudaNamesMeanCpu():
        yield
