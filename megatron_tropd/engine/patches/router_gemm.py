"""Define the name that megatron-core 0.16's router looks up, where Transformer Engine has not defined it."""

from __future__ import annotations

from megatron.core.transformer.moe import moe_utils


def define_te_general_gemm() -> None:
    """Say that there is no such kernel: megatron-core checks whether it is None, but defines it only with TE."""
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
