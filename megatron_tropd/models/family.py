"""Model families: the reader of a ``config.json``, and the rows of one layer.

A row is one Megatron parameter, the Hugging Face tensors it is made of with their shapes, and the rule
(``models.rules``) that cuts and joins them under tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_tropd.models.rules import Shape
from megatron_tropd.types import Architecture


@dataclass(frozen=True, slots=True)
class Entry:
    """One Megatron parameter. Layers and experts are counted over the whole model, in Megatron's names too."""

    megatron: str
    hf: tuple[str, ...]
    shapes: tuple[Shape, ...]  # of the HF tensors
    rule: str  # key of models.rules.RULES
    layer: int | None = None
    expert: int | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table: ``{i}`` is the layer, ``{e}`` the expert; ``name_table`` has the letters."""

    megatron: str
    hf: Mapping[str, str]  # HF name -> the letters of its dimensions
    rule: str

    def entry(self, sizes: Mapping[str, int], layer: int | None = None, expert: int | None = None) -> Entry:
        return Entry(
            self.megatron.format(i=layer, e=expert),
            tuple(name.format(i=layer, e=expert) for name in self.hf),
            tuple(tuple(sizes[letter] for letter in letters) for letters in self.hf.values()),
            self.rule,
            layer,
            expert,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family of models, by the name of its architecture in ``config.json``."""

    name: str
    read: Callable[[Mapping[str, Any]], Architecture]  # raises CheckpointError for options that are not carried
    layer: tuple[Row, ...]  # the rows of one layer


def layer_row(megatron: str, hf: Mapping[str, str], rule: str) -> Row:
    return Row("decoder.layers.{i}." + megatron, {"model.layers.{i}." + name: dims for name, dims in hf.items()}, rule)


ATTENTION = (
    layer_row("input_layernorm.weight", {"input_layernorm.weight": "D"}, "whole"),
    layer_row(
        "self_attention.linear_qkv.weight",
        {"self_attn.q_proj.weight": "QD", "self_attn.k_proj.weight": "KD", "self_attn.v_proj.weight": "KD"},
        "qkv",
    ),
    layer_row("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": "DQ"}, "columns"),
    layer_row("pre_mlp_layernorm.weight", {"post_attention_layernorm.weight": "D"}, "whole"),
)
QKV_BIAS = (
    layer_row(
        "self_attention.linear_qkv.bias",
        {"self_attn.q_proj.bias": "Q", "self_attn.k_proj.bias": "K", "self_attn.v_proj.bias": "K"},
        "qkv",
    ),
)
QK_NORM = (
    layer_row("self_attention.q_layernorm.weight", {"self_attn.q_norm.weight": "H"}, "whole"),
    layer_row("self_attention.k_layernorm.weight", {"self_attn.k_norm.weight": "H"}, "whole"),
)
DENSE_MLP = (
    layer_row("mlp.linear_fc1.weight", {"mlp.gate_proj.weight": "FD", "mlp.up_proj.weight": "FD"}, "stacked_rows"),
    layer_row("mlp.linear_fc2.weight", {"mlp.down_proj.weight": "DF"}, "columns"),
)


def expert_rows(router: str, expert: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """Return the rows of a layer's mixture of experts, by the family's names for the router, an expert and its three
    matrices.
    """
    fc1 = {f"{expert}.{gate}.weight": "FD", f"{expert}.{up}.weight": "FD"}
    return (
        layer_row("mlp.router.weight", {f"{router}.weight": "ED"}, "whole"),
        layer_row("mlp.experts.local_experts.{e}.linear_fc1.weight", fc1, "stacked_rows"),
        layer_row("mlp.experts.local_experts.{e}.linear_fc2.weight", {f"{expert}.{down}.weight": "DF"}, "columns"),
    )
