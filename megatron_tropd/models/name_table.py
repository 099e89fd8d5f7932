"""The Megatron parameter of each tensor of a Hugging Face checkpoint: the families' rows, filled in.

``entries`` fills in the numbers of layers and experts.
"""

from __future__ import annotations

from megatron_tropd.models.family import Entry, Row
from megatron_tropd.models.registry import FAMILIES
from megatron_tropd.models.rules import Shape
from megatron_tropd.types import Architecture


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


def layer_entries(architecture: Architecture, layer: int) -> list[Entry]:
    """Return the table of one layer, experts in turn."""
    sizes, table = _sizes(architecture), []
    rows = FAMILIES[architecture.family].layer
    table += [row.entry(sizes, layer) for row in rows if "{e}" not in row.megatron]
    for expert in range(architecture.num_experts):
        table += [row.entry(sizes, layer, expert) for row in rows if "{e}" in row.megatron]
    return table


def embedding_entry(architecture: Architecture) -> Entry:
    """Return the row of the input embedding."""
    return EMBEDDING.entry(_sizes(architecture))


def output_entry(architecture: Architecture) -> Entry:
    """Return the row of the output layer, which a tied model makes of its embedding."""
    return (_TIED_OUTPUT if architecture.tied_embeddings else OUTPUT).entry(_sizes(architecture))


def entries(architecture: Architecture, layers: range, *, embedding: bool, output: bool) -> list[Entry]:
    """Return the table of one model chunk, with all experts.

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
    """Return the shape of every tensor of the model's checkpoint by name, in the order in which the table walks
    them.
    """
    table = entries(architecture, range(architecture.num_layers), embedding=True, output=True)
    return {name: shape for entry in table for name, shape in zip(entry.hf, entry.shapes, strict=True)}
