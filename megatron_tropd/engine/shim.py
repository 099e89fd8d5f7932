"""Lets Megatron-Core run where there is no CUDA; inert where there is.

Megatron-Core names CUDA in a handful of places (``device="cuda"`` literals, ``torch.cuda.current_device()``,
``tensor.type()`` strings). On a machine without CUDA these contexts answer for it with the CPU, through
``torch.overrides``, only while they are active.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def install() -> None:
    """Process-wide part of the shim: two ``torch.cuda`` functions, and the CUDA RNG of activation recompute.

    Recompute saves and restores the CUDA RNG state; this package trains without dropout, so there is nothing to save.
    """
    if torch.cuda.is_available():
        return
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *args, **kwargs: None
    from megatron.core.tensor_parallel import random as mcore_random

    mcore_random._get_cuda_rng_state = lambda *args, **kwargs: None
    mcore_random._set_cuda_rng_state = lambda *args, **kwargs: None


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


@contextlib.contextmanager
def cuda_names_mean_cpu() -> Iterator[None]:
    """Context in which Megatron-Core's CUDA literals mean the CPU (nothing happens where CUDA exists)."""
    if torch.cuda.is_available():
        yield
        return
    with _CudaNamesMeanCpu():
        yield
