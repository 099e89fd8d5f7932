"""Let the distributed optimizer load states over torch's Adam, whose ``step`` Megatron leaves out and then requires."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def load_without_steps(part: Any) -> None:
    """Fill in, for each parameter that is loaded, what the loaded states lack. ``part``: a ``DistributedOptimizer``."""
    fill = part._set_main_param_and_optimizer_states

    def fill_but_step(parameter: Tensor, tensors: dict[str, Tensor]) -> None:
        fill(parameter, {**part._get_main_param_and_optimizer_states(parameter), **tensors})

    part._set_main_param_and_optimizer_states = fill_but_step
