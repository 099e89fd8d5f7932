"""Core attention that runs on CPU and GPU without Transformer Engine, by a plan of which tokens see which.

A plan travels to every layer in Megatron's ``packed_seq_params`` argument. Queries, keys and values arrive with
rotary embedding already applied at the plan's positions, so packing, prefill and cached decoding differ only in
``Plan.attend``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor


class Plan(Protocol):
    """Which tokens attend to which, for one forward pass."""

    @property
    def qkv_format(self) -> str:
        """Return anything but "thd", which Megatron would treat itself."""
        ...

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Compute causal attention of one layer, ``[s, b, heads, d]`` each and back; there may be fewer key heads."""
        ...


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Compute causal attention over ``[n, heads, l, d]`` each; grouped key heads are shared by consecutive query
    heads.
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        return _causal_products(query, key, value, scale)
    grouped = query.size(1) != key.size(1)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=grouped)


def _causal_products(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Compute the same by plain products: bf16 SDPA on CPU takes four times as long (57 ms against 14 ms at l=90,
    d=32).
    """
    n, kv_heads, length, dim = key.shape
    q = query.reshape(n, kv_heads, -1, dim)
    scores = (q @ key.transpose(-1, -2)).view(n, kv_heads, -1, length, length) * scale
    mask = torch.full((length, length), -math.inf, dtype=scores.dtype).triu_(1)
    weights = (scores + mask).softmax(-1).view(n, kv_heads, -1, length)
    return (weights @ value).view_as(query)


# Sequences are attended in groups of similar length: one padded call per group instead of one call per sequence.
_GROUP_FILL = 0.7


@dataclass(frozen=True, slots=True)
class _Group:
    gather_NL: Tensor  # stream position of every (sequence, step); padding repeats the sequence's last token
    real_NL: Tensor  # bool
    restore: Tensor  # stream positions of the real steps, row by row


@dataclass(frozen=True, slots=True)
class PackedPlan:
    """Sequences laid end to end; each attends causally to itself only.

    Padding to the group's longest sequence stands *after* each sequence, so the causal mask alone hides it.
    """

    groups: tuple[_Group, ...]
    qkv_format: str = "packed"

    @staticmethod
    def build(cu_seqlens: npt.NDArray[np.int32], device: torch.device) -> PackedPlan:
        starts, lengths = cu_seqlens[:-1].astype(np.int64), np.diff(cu_seqlens).astype(np.int64)
        return PackedPlan(groups_of(starts, lengths, device))

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        if len(self.groups) == 1 and self.groups[0].gather_NL.size(0) == 1:
            return _one_sequence(query, key, value, scale)
        outputs = attend_groups(self.groups, query, key, value, scale)
        merged = torch.empty_like(query)
        return merged.index_copy(0, torch.cat([group.restore for group in self.groups]), torch.cat(outputs))


def groups_of(
    starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], device: torch.device
) -> tuple[_Group, ...]:
    """Group sequences of similar length, given by where they start and how long they are."""
    order = np.argsort(-lengths, kind="stable")
    groups = []
    first = 0
    while first < len(order):
        longest = lengths[order[first]]
        count = int(np.searchsorted(-lengths[order[first:]], -_GROUP_FILL * longest, side="right"))
        rows = order[first : first + max(count, 1)]
        groups.append(_group(starts[rows], lengths[rows], device))
        first += len(rows)
    return tuple(groups)


def attend_groups(groups: tuple[_Group, ...], query: Tensor, key: Tensor, value: Tensor, scale: float) -> list[Tensor]:
    """Return ``[n, 1, heads, d]`` of each group's real steps, in the order of its ``restore``."""
    return [_attend_group(group, query, key, value, scale) for group in groups]


def _attend_group(group: _Group, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    # [T, 1, h, d] -> [n, h, L, d]
    q, k, v = (x.squeeze(1)[group.gather_NL].transpose(1, 2) for x in (query, key, value))
    out = causal_attention(q, k, v, scale).transpose(1, 2)
    return out[group.real_NL].unsqueeze(1)


def _one_sequence(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    return causal_attention(q, k, v, scale).permute(2, 0, 1, 3)


def _group(starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64], device: torch.device) -> _Group:
    step = np.arange(lengths[0])
    real = step < lengths[:, None]
    gather = starts[:, None] + np.minimum(step, lengths[:, None] - 1)
    return _Group(
        torch.from_numpy(gather).to(device),
        torch.from_numpy(real).to(device),
        torch.from_numpy(gather[real]).to(device),
    )


class PlannedAttention(MegatronModule):
    """``core_attention`` for Megatron's SelfAttention: scales, and lets the plan attend. No dropout."""

    def __init__(
        self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str, **options: Any
    ) -> None:
        super().__init__(config=config)
        del attn_mask_type, attention_type
        softmax_scale = options.get("softmax_scale")
        self.scale = softmax_scale if softmax_scale is not None else 1.0 / math.sqrt(config.kv_channels)
        self.layer_number = layer_number
        self.last_plan: Plan | None = None  # of this layer's pass under way, for the experts that follow it
        # without it, sharded_state_dict reads Megatron's global state
        self.tp_group = options["pg_collection"].tp

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Tensor:
        """Attend: ``[s, b, heads, d]`` each -> ``[s, b, heads * d]``; needs a Plan as ``packed_seq_params``."""
        plan: Plan = options["packed_seq_params"]
        self.last_plan = plan
        out = plan.attend(self.layer_number, query, key, value, self.scale)
        return out.reshape(*out.shape[:2], -1)


class RMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight takes part in sequence parallelism (Megatron's torch wrapper refuses it)."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **options: Any) -> None:
        del options
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
