"""A tiny random model of every family, made by `transformers`: real configs scaled down, no two sizes equal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

SIZES = {
    "vocab_size": 101,
    "hidden_size": 44,
    "intermediate_size": 58,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4, "head_dim": 14}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
# name -> architecture, and what its config says beyond SIZES
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("Llama", {"num_key_value_heads": 4, "hidden_size": 48}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 18}),
    "llama3-tied": ("Llama", {"rope_parameters": LLAMA3, "hidden_size": 48, "tie_word_embeddings": True}),
    "llama-linear": (
        "Llama",
        {"hidden_size": 40, "rope_parameters": {"rope_type": "linear", "rope_theta": 1e3, "factor": 2.5}},
    ),
    "mistral": ("Mistral", {"head_dim": 16, "sliding_window": 48}),
    "qwen2": ("Qwen2", {"hidden_size": 48}),
    "qwen2-tied": ("Qwen2", {"hidden_size": 40, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 14}),
    "qwen3-tied": ("Qwen3", {"head_dim": 14, "tie_word_embeddings": True}),
    "r1-distill-qwen": ("Qwen2", {"hidden_size": 48, "rope_parameters": {"rope_theta": 1e4}, "vocab_size": 128}),
    "r1-distill-llama": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 12, "bos_token_id": 3}),
    "qwen3-moe": ("Qwen3Moe", {**EXPERTS, "moe_intermediate_size": 34, "norm_topk_prob": True}),
    "qwen3-moe-raw": (
        "Qwen3Moe",
        {**EXPERTS, "moe_intermediate_size": 34, "norm_topk_prob": False, "tie_word_embeddings": True},
    ),
    "mixtral": ("Mixtral", {**EXPERTS, "num_experts_per_tok": 3}),
}
MOE = [name for name, (kind, _) in FAMILIES.items() if kind in ("Qwen3Moe", "Mixtral")]


def save_family(
    directory: Path,
    name: str,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    sizes: dict[str, Any] | None = None,
) -> Path:
    """Random matrices of spread 0.25, norms around 1, biases and routers that matter: a swapped tensor is seen.

    ``sizes``: keys of the config that are to differ.
    """
    import transformers

    kind, options = FAMILIES[name]
    torch.manual_seed(seed)
    options = options | (sizes or {})
    sizes = SIZES | {"rope_parameters": {"rope_type": "default", "rope_theta": 3_000.0}} | options
    config = getattr(transformers, f"{kind}Config")(**sizes, initializer_range=0.25, attention_dropout=0.0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.dim() == 1 else 0.25
            parameter.add_(spread * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(directory)
    return directory


def load_transformers(directory: Path, dtype: torch.dtype = torch.float64) -> Any:
    """The checkpoint in `transformers`, whatever its family."""
    from transformers import AutoModelForCausalLM

    options = {"attn_implementation": "eager", "experts_implementation": "eager"}  # the others know no fp64
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, **options).eval()


def config_of(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


def on_disk_gradients(directory: Path, model: Any) -> dict[str, Tensor]:
    """Every parameter's gradient under the name it has on disk, where `transformers` does not stack experts."""
    parameters = {name: p.grad for name, p in model.named_parameters()}
    found = {}
    for name in load_file(directory / "model.safetensors"):
        parts = name.split(".experts.")
        if len(parts) == 1:
            found[name] = parameters[name.replace("block_sparse_moe.gate", "mlp.gate")]
            continue
        expert, matrix = parts[1].removesuffix(".weight").split(".")
        stacked = parts[0].replace("block_sparse_moe", "mlp") + ".experts."
        if matrix in ("down_proj", "w2"):
            found[name] = parameters[stacked + "down_proj"][int(expert)]
        else:
            gate, up = parameters[stacked + "gate_up_proj"][int(expert)].chunk(2)
            found[name] = gate if matrix in ("gate_proj", "w1") else up
    return found
