"""Checkpoints in the ``torch_dist`` format by PyTorch's own writer, in this process: Megatron's without Megatron."""

from __future__ import annotations

import argparse
import io
import json
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner


class _AsTheyAre(DefaultSavePlanner):
    """Writes bytes as Megatron's planner does: they are what ``torch.save`` wrote already."""

    def transform_object(self, write_item: Any, object: Any) -> Any:
        return object if isinstance(object, io.BytesIO) else super().transform_object(write_item, object)


def save_torch_dist(directory: Path, tensors: dict[str, Any], common: dict[str, Any]) -> Path:
    """What ``dist_checkpointing.save`` leaves: tensors, their table, ``common.pt`` and ``metadata.json``."""
    directory.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tensors, checkpoint_id=directory, no_dist=True, planner=_AsTheyAre())
    torch.save(common, directory / "common.pt")
    backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch"}
    (directory / "metadata.json").write_text(json.dumps(backends))
    return directory


def llama_tensors(hf: Path, *, padding: int = 27) -> dict[str, Tensor]:
    """A Llama's or a Qwen3's weights under Megatron's keys, layers stacked, as one rank without sharding has them."""
    weights, config = load_file(hf / "model.safetensors"), json.loads((hf / "config.json").read_text())
    groups = config["num_key_value_heads"]

    def stacked(*names: str, qkv: bool = False) -> Tensor:
        layers = []
        for layer in range(config["num_hidden_layers"]):
            parts = [weights[f"model.layers.{layer}.{name}.weight"] for name in names]
            parts = [one.chunk(groups)[group] for group in range(groups) for one in parts] if qkv else parts
            layers.append(torch.cat(parts))
        return torch.stack(layers)

    def padded(name: str) -> Tensor:
        return torch.cat([weights[name], torch.full((padding, weights[name].shape[1]), 7.0)])

    at = "decoder.layers."
    own: dict[str, Tensor] = {}
    if "lm_head.weight" in weights:
        own["output_layer.weight"] = padded("lm_head.weight")
    if "model.layers.0.self_attn.q_norm.weight" in weights:
        own |= {f"{at}self_attention.{x}_layernorm.weight": stacked(f"self_attn.{x}_norm") for x in "qk"}
    return own | {
        "embedding.word_embeddings.weight": padded("model.embed_tokens.weight"),
        "decoder.final_layernorm.weight": weights["model.norm.weight"],
        f"{at}self_attention.linear_qkv.layer_norm_weight": stacked("input_layernorm"),
        f"{at}self_attention.linear_qkv.weight": stacked(*(f"self_attn.{x}_proj" for x in "qkv"), qkv=True),
        f"{at}self_attention.linear_proj.weight": stacked("self_attn.o_proj"),
        f"{at}mlp.linear_fc1.layer_norm_weight": stacked("post_attention_layernorm"),
        f"{at}mlp.linear_fc1.weight": stacked("mlp.gate_proj", "mlp.up_proj"),
        f"{at}mlp.linear_fc2.weight": stacked("mlp.down_proj"),
    }


def save_megatron(root: Path, hf: Path, *, tensors: dict[str, Any] | None = None, **args: Any) -> Path:
    """A directory as Megatron-LM leaves it, of the model in ``hf``; ``args`` go into ``common.pt``."""
    root.mkdir(parents=True)
    (root / "latest_checkpointed_iteration.txt").write_text("100\n")
    common = {"iteration": 100, "checkpoint_version": 3.0, "args": argparse.Namespace(**args)}
    save_torch_dist(root / "iter_0000100", llama_tensors(hf) if tensors is None else tensors, common)
    return root
