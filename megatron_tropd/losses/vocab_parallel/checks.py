"""Refusals of input that the vocabulary-parallel losses cannot work with."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_tropd.errors import ConfigError, DataError


def check_ids(ids_TK: Tensor, *, num_tokens: int, vocab_size: int) -> Tensor | None:
    """Refuse bad ids on a CPU; on an accelerator say, without waiting, which are good."""
    if ids_TK.dim() != 2 or ids_TK.shape[0] != num_tokens or ids_TK.dtype not in (torch.int64, torch.int32):
        raise DataError(
            f"ids must be int64 [{num_tokens}, K], got {ids_TK.dtype} {list(ids_TK.shape)}: one row per hidden state."
        )
    if ids_TK.device.type != "cpu":
        return (ids_TK >= 0) & (ids_TK < vocab_size)
    lowest, highest = (int(id_) for id_ in ids_TK.aminmax()) if ids_TK.numel() else (0, 0)
    if lowest < 0 or highest >= vocab_size:
        raise DataError(
            f"token id {lowest if lowest < 0 else highest} is outside the vocabulary [0, {vocab_size}). "
            "Mask the position or map the id before scoring it."
        )
    return None


def check_projection(hidden_TD: Tensor, weight_vD: Tensor, *, who: str = "") -> None:
    """Refuse what cannot be multiplied."""
    if hidden_TD.dim() != 2 or weight_vD.dim() != 2 or hidden_TD.shape[1] != weight_vD.shape[1]:
        raise ConfigError(
            f"{who}hidden {list(hidden_TD.shape)} and {who}weight {list(weight_vD.shape)} must be "
            "[tokens, hidden size] and [vocabulary shard, hidden size] with one hidden size."
        )
    if hidden_TD.dtype != weight_vD.dtype or not hidden_TD.is_floating_point():
        raise ConfigError(
            f"{who}hidden is {hidden_TD.dtype} and {who}weight is {weight_vD.dtype}: cast both to one float dtype."
        )


def check_temperature(temperature: float) -> None:
    """Refuse what logits cannot be divided by."""
    if not (temperature > 0.0 and math.isfinite(temperature)):
        raise ConfigError(f"temperature must be positive and finite, got {temperature}.")
