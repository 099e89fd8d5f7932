"""Which Hugging Face architectures are understood, and what each of their tensors becomes in Megatron.

A family is an ``Architecture`` read from ``config.json`` plus a table of ``Entry``: one Megatron parameter, the HF
tensors it is made of, and the rule (``convert.rules``) that cuts and joins them under tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_tropd.errors import CheckpointError
from megatron_tropd.types import Architecture


@dataclass(frozen=True, slots=True)
class Entry:
    """One Megatron parameter. ``{i}`` in the names stands for the global layer number."""

    megatron: str
    hf: tuple[str, ...]
    rule: str  # key of convert.rules.RULES


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How to read one HF architecture."""

    architecture: Callable[[Mapping[str, Any]], Architecture]
    layer: tuple[Entry, ...]


EMBEDDING = Entry("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocabulary")
FINAL_NORM = Entry("decoder.final_layernorm.weight", ("model.norm.weight",), "whole")
OUTPUT = Entry("output_layer.weight", ("lm_head.weight",), "vocabulary")

_LAYER = "decoder.layers.{i}."
_HF_LAYER = "model.layers.{i}."


def _layer_entry(megatron: str, hf: tuple[str, ...], rule: str) -> Entry:
    return Entry(_LAYER + megatron, tuple(_HF_LAYER + name for name in hf), rule)


_DECODER = (
    _layer_entry("input_layernorm.weight", ("input_layernorm.weight",), "whole"),
    _layer_entry(
        "self_attention.linear_qkv.weight",
        ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "qkv",
    ),
    _layer_entry("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), "columns"),
    _layer_entry("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), "whole"),
    _layer_entry("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "stacked_rows"),
    _layer_entry("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), "columns"),
)
_QK_NORM = (
    _layer_entry("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",), "whole"),
    _layer_entry("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",), "whole"),
)


def _rope_theta(config: Mapping[str, Any]) -> float:
    # transformers 5 writes rope_parameters, earlier versions a top-level rope_theta
    parameters = config.get("rope_parameters") or {}
    return float(parameters.get("rope_theta", config.get("rope_theta", 10_000.0)))


def _refuse(config: Mapping[str, Any], **expected: Any) -> None:
    """Options this family has but this package does not carry are refused by name, before anything is read."""
    for option, value in expected.items():
        if config.get(option, value) not in (value, None):
            raise CheckpointError(
                f"config.json has {option}={config[option]!r}, which is not supported (only {value!r} is). "
                "Use a checkpoint without it."
            )
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    # one set of parameters per kind of layer is a table of tables
    nested = [name for name, value in rope.items() if isinstance(value, Mapping)]
    kind = nested or rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(f"config.json asks for RoPE of type {kind!r}, which is not supported, only 'default' is.")


def _qwen3(config: Mapping[str, Any]) -> Architecture:
    _refuse(config, hidden_act="silu", attention_bias=False, use_sliding_window=False, quantization_config=None)
    heads = int(config["num_attention_heads"])
    return Architecture(
        family="Qwen3ForCausalLM",
        num_layers=int(config["num_hidden_layers"]),
        hidden_size=int(config["hidden_size"]),
        ffn_size=int(config["intermediate_size"]),
        num_heads=heads,
        num_kv_heads=int(config["num_key_value_heads"] or heads),
        head_dim=int(config["head_dim"]),
        vocab_size=int(config["vocab_size"]),
        max_positions=int(config["max_position_embeddings"]),
        rope_theta=_rope_theta(config),
        norm_eps=float(config["rms_norm_eps"]),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qk_norm=True,
    )


FAMILIES: dict[str, Family] = {
    "Qwen3ForCausalLM": Family(architecture=_qwen3, layer=_DECODER + _QK_NORM),
}


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The ``Architecture`` of an HF ``config.json``.

    Raises:
        CheckpointError: the architecture, or an option of it, is not supported; a required key is missing.
    """
    if not isinstance(config, Mapping):
        raise CheckpointError(f"config.json holds a {type(config).__name__}, not the settings of a model.")
    names = config.get("architectures") or []
    if not isinstance(names, list) or len(names) != 1 or names[0] not in FAMILIES:
        raise CheckpointError(
            f"architecture {names or 'missing'} is not supported. Supported: {', '.join(sorted(FAMILIES))}."
        )
    try:
        return FAMILIES[names[0]].architecture(config)
    except KeyError as error:
        raise CheckpointError(f"config.json of a {names[0]} lacks {error}: it needs all its sizes.") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"config.json of a {names[0]} has a value of the wrong kind: {error}.") from error


def entries(architecture: Architecture, layers: range, *, embedding: bool, output: bool) -> list[Entry]:
    """The table of one pipeline stage, layer numbers filled in (global numbers).

    ``embedding`` and ``output``: whether the stage holds the first and the last end of the model. A tied model's last
    stage, when it is not also the first, keeps its own copy of the embedding under the output layer's name.
    """
    table = [EMBEDDING] if embedding else []
    for i in layers:
        for entry in FAMILIES[architecture.family].layer:
            table.append(Entry(entry.megatron.format(i=i), tuple(name.format(i=i) for name in entry.hf), entry.rule))
    if output:
        table.append(FINAL_NORM)
        if not architecture.tied_embeddings:
            table.append(OUTPUT)
        elif not embedding:
            table.append(Entry(OUTPUT.megatron, EMBEDDING.hf, OUTPUT.rule))
    return table
