"""Run a model's layers as plain functions over its weights, for passes that need no gradient.

Megatron's modules compute the same: ``tests/ranks/test_sampler_functions.py`` compares the two for every family. On one
new token per sequence their checks, copies and wrappers cost more than the products do. Experts are the exception: a
mixture's MLP is Megatron's own module, which sends tokens to their experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig
from torch import Tensor

from megatron_tropd.engine.model import Model


class Attention(Protocol):
    """Say which rows see which, for one pass."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Attend in one layer: ``[R, key heads, heads of a group, d]`` -> ``[R, heads * d]``.

        Queries and keys are rotated; keys and values are ``[R, key heads, d]``.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Layer:
    attention_norm_D: Tensor
    qkv: Tensor  # [key heads * (heads of a group + 2) * d, D], this rank's
    qkv_bias: Tensor | None
    qk_norm: Tensor | None  # [heads of a group + 1, d]: of a group's queries, then of its key
    projection: Tensor
    scale: float  # of attention scores
    mlp_norm_D: Tensor
    mlp: Callable[[Tensor], Tensor]


class FunctionalModel:
    """The layers of a one-stage model, read from its weights when this is made: make it anew after an update."""

    def __init__(self, model: Model, *, positions: int) -> None:
        """Take the weights; ``positions``: how many there are, from 0, for which the rotary table is made."""
        model.finish_pending_gathers()
        chunk, config, layout = model.chunks[0], model.config, model.groups.layout
        self.group, self.device = model.groups.tp, model.device
        self.key_heads = config.num_query_groups // layout.tensor
        self.shared_by = config.num_attention_heads // config.num_query_groups  # query heads per key head
        self.head_dim, self._eps = config.kv_channels, config.layernorm_epsilon
        self._embedding = chunk.embedding.word_embeddings.weight
        self._first_id = model.groups.tensor_rank * len(self._embedding)
        self._final_norm = chunk.decoder.final_layernorm.weight
        self._layers = [self._layer(layer, config) for layer in chunk.decoder.layers]
        self._cos, self._sin = rotary_table(chunk.rotary_pos_emb.inv_freq, positions, model.dtype)

    def _layer(self, layer: Any, config: TransformerConfig) -> _Layer:
        attention, normed = layer.self_attention, None
        if config.qk_layernorm:
            of_query, of_key = attention.q_layernorm.weight, attention.k_layernorm.weight
            normed = torch.stack([of_query] * self.shared_by + [of_key])
        return _Layer(
            attention_norm_D=layer.input_layernorm.weight,
            qkv=attention.linear_qkv.weight,
            qkv_bias=attention.linear_qkv.bias,
            qk_norm=normed,
            projection=attention.linear_proj.weight,
            scale=attention.core_attention.scale,
            mlp_norm_D=layer.pre_mlp_layernorm.weight,
            mlp=_expert_mlp(layer.mlp)
            if config.num_moe_experts
            else _dense_mlp(layer.mlp.linear_fc1.weight, layer.mlp.linear_fc2.weight, self.group),
        )

    def hidden(self, token_R: Tensor, position_R: Tensor, attention: Attention) -> Tensor:
        """Return ``[R, D]`` final hidden states (normed) of rows, whole on every tensor rank."""
        cos, sin = (table[position_R] for table in (self._cos, self._sin))  # [R, 1, 1, d]
        x = self._embed(token_R)
        for number, layer in enumerate(self._layers):
            qk, value = self._qkv(rms_norm(x, layer.attention_norm_D, self._eps), layer)
            qk = rotate(qk, cos, sin)
            out = attention.attend(number, qk[:, :, :-1], qk[:, :, -1], value, layer.scale)
            x = x + _sum_over(F.linear(out, layer.projection), self.group)
            x = x + layer.mlp(rms_norm(x, layer.mlp_norm_D, self._eps))
        return rms_norm(x, self._final_norm, self._eps)

    def _qkv(self, x: Tensor, layer: _Layer) -> tuple[Tensor, Tensor]:
        """Return queries and key of every group together, normed where the family does, and its value."""
        flat = F.linear(x, layer.qkv)
        if layer.qkv_bias is not None:
            flat = flat + layer.qkv_bias  # as Megatron does: in bf16 a fused sum is rounded once less
        qkv = flat.view(len(x), self.key_heads, self.shared_by + 2, self.head_dim)
        qk, value = qkv[:, :, :-1], qkv[:, :, -1]
        return (qk if layer.qk_norm is None else rms_norm(qk, layer.qk_norm, self._eps)), value

    def _embed(self, token_R: Tensor) -> Tensor:
        if self.group is None:
            return F.embedding(token_R, self._embedding)
        local = token_R - self._first_id
        elsewhere = (local < 0) | (local >= len(self._embedding))
        rows = F.embedding(local.masked_fill(elsewhere, 0), self._embedding)
        return _sum_over(rows.masked_fill(elsewhere[:, None], 0.0), self.group)


def _dense_mlp(fc1: Tensor, fc2: Tensor, group: dist.ProcessGroup | None) -> Callable[[Tensor], Tensor]:
    def mlp(x: Tensor) -> Tensor:
        gate, up = F.linear(x, fc1).chunk(2, dim=-1)
        return _sum_over(F.linear(F.silu(gate) * up, fc2), group)

    return mlp


def _expert_mlp(module: Callable[[Tensor], tuple[Tensor, Any]]) -> Callable[[Tensor], Tensor]:
    return lambda x: module(x[:, None])[0][:, 0]


def _sum_over(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Add up a row-parallel product's parts, in place."""
    if group is not None:
        dist.all_reduce(x, group=group)
    return x


def rotary_table(inv_freq: Tensor, positions: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and signed sine ``[positions, 1, 1, d]`` for ``rotate``."""
    angles = torch.outer(torch.arange(positions, device=inv_freq.device, dtype=inv_freq.dtype), inv_freq)
    cos, sin = angles.cos(), angles.sin()
    both = torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)
    cos, sin = (table[:, None, None].to(dtype) for table in both)
    return cos, sin


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves of the last dimension, with the bits of Megatron's rotary embedding (the sine is signed)."""
    return x * cos + x.roll(x.size(-1) // 2, -1) * sin


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize over the last dimension, with the bits of torch's own; ``weight`` may differ along others."""
    wide = x.float()
    scale = wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    return wide.mul(scale).mul_(weight).to(x.dtype)
