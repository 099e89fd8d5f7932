"""Describe a model in the words of megatron-core's configuration, as Megatron-Bridge's ``run_config.yaml`` holds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_tropd.errors import CheckpointError
from megatron_tropd.types import Architecture

_PROVIDER = "megatron.bridge.models.gpt_provider.GPTModelProvider"
_TOKENIZER = "megatron.bridge.training.tokenizers.config.TokenizerConfig"
_LLAMA3_FIXED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192.0}


def provider_fields(architecture: Architecture, *, dtype: str) -> dict[str, Any]:
    """Return the fields of a ``GPTModelProvider``. ``dtype``: float32, bfloat16 or float16.

    Raises:
        CheckpointError: a RoPE scaling that megatron-core has no field for.
    """
    fields: dict[str, Any] = {
        "num_layers": architecture.num_layers,
        "hidden_size": architecture.hidden_size,
        "ffn_hidden_size": architecture.ffn_size,
        "num_attention_heads": architecture.num_heads,
        "num_query_groups": architecture.num_kv_heads,
        "kv_channels": architecture.head_dim,
        "vocab_size": architecture.vocab_size,
        "should_pad_vocab": True,
        "seq_length": architecture.max_positions,
        "normalization": "RMSNorm",
        "layernorm_epsilon": architecture.norm_eps,
        "qk_layernorm": architecture.qk_norm,
        "add_qkv_bias": architecture.qkv_bias,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": {"_target_": "torch.nn.functional.silu", "_call_": False},
        "position_embedding_type": "rope",
        "rotary_base": _whole(architecture.rope_theta),
        "share_embeddings_and_output_weights": architecture.tied_embeddings,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
        "params_dtype": {"_target_": f"torch.{dtype}", "_call_": False},
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
    }
    return fields | _rope(architecture) | _experts(architecture)


def _whole(value: float) -> int | float:
    return int(value) if value == int(value) else value


def _rope(architecture: Architecture) -> dict[str, Any]:
    scaling = architecture.rope_scaling
    if scaling is None:
        return {}
    if scaling["type"] == "linear":
        return {"seq_len_interpolation_factor": scaling["factor"]}
    other = {name: scaling[name] for name, value in _LLAMA3_FIXED.items() if scaling[name] != value}
    if other:
        raise CheckpointError(
            f"megatron-core scales RoPE with {_LLAMA3_FIXED} alone, and this model has {other}: it would be another "
            "model there. Keep it as a Hugging Face directory."
        )
    return {"rope_scaling": True, "rope_scaling_factor": scaling["factor"]}


def _experts(architecture: Architecture) -> dict[str, Any]:
    if not architecture.num_experts:
        return {}
    return {
        "num_moe_experts": architecture.num_experts,
        "moe_ffn_hidden_size": architecture.ffn_size,
        "moe_router_topk": architecture.experts_per_token,
        "moe_router_pre_softmax": not architecture.normalize_experts,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": True,
    }


def run_config(architecture: Architecture, *, dtype: str, tokenizer: Path) -> dict[str, Any]:
    """Return what Megatron-Bridge reads beside a checkpoint: model, what was saved, and the tokenizer."""
    return {
        "model": {"_target_": _PROVIDER, **provider_fields(architecture, dtype=dtype)},
        "checkpoint": {"save_optim": False, "save_rng": False, "fully_parallel_save": False},
        "tokenizer": {
            "_target_": _TOKENIZER,
            "tokenizer_type": "HuggingFaceTokenizer",
            "tokenizer_model": str(tokenizer),
        },
    }
