"""Distillation objectives by name: ``build_method("tropd", beta=0.001)``."""

from megatron_tropd.methods.base import Method
from megatron_tropd.methods.registry import PRESETS, build_method, method_of

__all__ = ["PRESETS", "Method", "build_method", "method_of"]
