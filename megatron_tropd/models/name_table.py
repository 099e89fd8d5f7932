"""What each tensor of a Hugging Face checkpoint becomes in Megatron: one name table per model family.

A row is one Megatron parameter, the HF tensors it is made of with their shapes, and the rule (``convert.rules``) that
cuts and joins them under tensor parallelism. ``entries`` fills in the numbers of layers and experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_tropd.models.rules import Shape
from megatron_tropd.types import Architecture


@dataclass(frozen=True, slots=True)
class Entry:
    """One Megatron parameter. Layers and experts are counted over the whole model, in Megatron's names too."""

    megatron: str
    hf: tuple[str, ...]
    shapes: tuple[Shape, ...]  # of the HF tensors
    rule: str  # key of convert.rules.RULES
    layer: int | None = None
    expert: int | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A line of a table: ``{i}`` stands for the layer and ``{e}`` for the expert; see ``_sizes`` for the letters."""

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


def _sizes(architecture: Architecture) -> dict[str, int]:
    return {
        "V": architecture.vocab_size,
        "D": architecture.hidden_size,
        "H": architecture.head_dim,
        "Q": architecture.num_heads * architecture.head_dim,
        "K": architecture.num_kv_heads * architecture.head_dim,
        "F": architecture.ffn_size,
        "E": architecture.num_experts,
    }


EMBEDDING = Row("embedding.word_embeddings.weight", {"model.embed_tokens.weight": "VD"}, "vocabulary")
FINAL_NORM = Row("decoder.final_layernorm.weight", {"model.norm.weight": "D"}, "whole")
OUTPUT = Row("output_layer.weight", {"lm_head.weight": "VD"}, "vocabulary")
_TIED_OUTPUT = Row(OUTPUT.megatron, EMBEDDING.hf, OUTPUT.rule)


def _layer(megatron: str, hf: Mapping[str, str], rule: str) -> Row:
    return Row("decoder.layers.{i}." + megatron, {"model.layers.{i}." + name: dims for name, dims in hf.items()}, rule)


_ATTENTION = (
    _layer("input_layernorm.weight", {"input_layernorm.weight": "D"}, "whole"),
    _layer(
        "self_attention.linear_qkv.weight",
        {"self_attn.q_proj.weight": "QD", "self_attn.k_proj.weight": "KD", "self_attn.v_proj.weight": "KD"},
        "qkv",
    ),
    _layer("self_attention.linear_proj.weight", {"self_attn.o_proj.weight": "DQ"}, "columns"),
    _layer("pre_mlp_layernorm.weight", {"post_attention_layernorm.weight": "D"}, "whole"),
)
_QKV_BIAS = (
    _layer(
        "self_attention.linear_qkv.bias",
        {"self_attn.q_proj.bias": "Q", "self_attn.k_proj.bias": "K", "self_attn.v_proj.bias": "K"},
        "qkv",
    ),
)
_QK_NORM = (
    _layer("self_attention.q_layernorm.weight", {"self_attn.q_norm.weight": "H"}, "whole"),
    _layer("self_attention.k_layernorm.weight", {"self_attn.k_norm.weight": "H"}, "whole"),
)
_DENSE_MLP = (
    _layer("mlp.linear_fc1.weight", {"mlp.gate_proj.weight": "FD", "mlp.up_proj.weight": "FD"}, "stacked_rows"),
    _layer("mlp.linear_fc2.weight", {"mlp.down_proj.weight": "DF"}, "columns"),
)


def _experts(router: str, expert: str, gate: str, up: str, down: str) -> tuple[Row, ...]:
    """The mixture of experts of a layer, by the family's names for the router, an expert and its three matrices."""
    fc1 = {f"{expert}.{gate}.weight": "FD", f"{expert}.{up}.weight": "FD"}
    return (
        _layer("mlp.router.weight", {f"{router}.weight": "ED"}, "whole"),
        _layer("mlp.experts.local_experts.{e}.linear_fc1.weight", fc1, "stacked_rows"),
        _layer("mlp.experts.local_experts.{e}.linear_fc2.weight", {f"{expert}.{down}.weight": "DF"}, "columns"),
    )


_LLAMA = _ATTENTION + _DENSE_MLP
# the rows of one layer, by the name of the architecture in config.json
FAMILIES: dict[str, tuple[Row, ...]] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA + _QKV_BIAS,
    "Qwen3ForCausalLM": _LLAMA + _QK_NORM,
    "Qwen3MoeForCausalLM": _ATTENTION
    + _QK_NORM
    + _experts("mlp.gate", "mlp.experts.{e}", "gate_proj", "up_proj", "down_proj"),
    "MixtralForCausalLM": _ATTENTION
    + _experts("block_sparse_moe.gate", "block_sparse_moe.experts.{e}", "w1", "w3", "w2"),
}


def layer_entries(architecture: Architecture, layer: int) -> list[Entry]:
    """The table of one layer, experts in turn."""
    sizes, table = _sizes(architecture), []
    rows = FAMILIES[architecture.family]
    table += [row.entry(sizes, layer) for row in rows if "{e}" not in row.megatron]
    for expert in range(architecture.num_experts):
        table += [row.entry(sizes, layer, expert) for row in rows if "{e}" in row.megatron]
    return table


def embedding_entry(architecture: Architecture) -> Entry:
    """The input embedding."""
    return EMBEDDING.entry(_sizes(architecture))


def output_entry(architecture: Architecture) -> Entry:
    """The output layer, which a tied model makes of its embedding."""
    return (_TIED_OUTPUT if architecture.tied_embeddings else OUTPUT).entry(_sizes(architecture))


def entries(architecture: Architecture, layers: range, *, embedding: bool, output: bool) -> list[Entry]:
    """The table of one model chunk, with all experts.

    ``embedding`` and ``output``: whether the chunk holds the first and the last end of the model. A tied model's last
    stage, when it is not also the first, keeps its own copy of the embedding under the output layer's name.
    """
    table = [embedding_entry(architecture)] if embedding else []
    for layer in layers:
        table += layer_entries(architecture, layer)
    if output:
        table.append(FINAL_NORM.entry(_sizes(architecture)))
        if not (architecture.tied_embeddings and embedding):
            table.append(output_entry(architecture))
    return table


def hf_shapes(architecture: Architecture) -> dict[str, Shape]:
    """Every tensor of the model's checkpoint by name, in the order in which the table walks them."""
    table = entries(architecture, range(architecture.num_layers), embedding=True, output=True)
    return {name: shape for entry in table for name, shape in zip(entry.hf, entry.shapes, strict=True)}
