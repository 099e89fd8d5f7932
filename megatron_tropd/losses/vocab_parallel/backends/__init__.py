"""Who computes a tile: plain torch, or Triton kernels on GPUs. Chosen once per call."""

from __future__ import annotations

from torch import Tensor

from megatron_tropd.losses.vocab_parallel.backends.protocol import Backend
from megatron_tropd.losses.vocab_parallel.backends.torch.backend import TorchBackend
from megatron_tropd.losses.vocab_parallel.backends.triton import kernels


def choose_backend(*hidden: Tensor, ids: int = 0, k: int = 0) -> Backend:
    """Choose who works on tensors of this kind, with so many listed ids and candidates per token.

    Raises:
        ConfigError: the switch ``MEGATRON_TROPD_KERNELS`` holds something else, or requests what cannot be had.
    """
    if not all(kernels.serve(x.device, x.dtype, ids=ids, k=k) for x in hidden):
        return TorchBackend()
    from megatron_tropd.losses.vocab_parallel.backends.triton.backend import TritonBackend

    return TritonBackend()
