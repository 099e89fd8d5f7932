"""Frequencies of rotary position embeddings, by type."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from megatron_tropd.types import Architecture

Options = Mapping[str, float | str]


def rotary_frequencies(architecture: Architecture) -> Tensor:
    """Return ``[head_dim / 2]`` fp32: radians per position, fastest first."""
    exponents = torch.arange(0, architecture.head_dim, 2, dtype=torch.float32) / architecture.head_dim
    frequencies = 1.0 / architecture.rope_theta**exponents
    scaling = architecture.rope_scaling
    return frequencies if scaling is None else _SCALINGS[str(scaling["type"])](frequencies, scaling)


def _linear(frequencies: Tensor, options: Options) -> Tensor:
    """Scale positions by 1 / factor."""
    return frequencies / float(options["factor"])


def _llama3(frequencies: Tensor, options: Options) -> Tensor:
    """Slow down slow rotations by ``factor``, keep fast ones, blend those between (Llama 3.1).

    A rotation is slow when it turns less than ``low_freq_factor`` times over the positions of pre-training, fast when
    more than ``high_freq_factor`` times.
    """
    low, high = float(options["low_freq_factor"]), float(options["high_freq_factor"])
    turns = float(options["original_max_position_embeddings"]) * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - kept) * frequencies / float(options["factor"]) + kept * frequencies


_SCALINGS: dict[str, Callable[[Tensor, Options], Tensor]] = {"linear": _linear, "llama3": _llama3}
