"""Qwen3-30B-A3B and relatives: experts in every layer, norms of query and key."""

from __future__ import annotations

from megatron_tropd.errors import CheckpointError
from megatron_tropd.models.config_fields import Config, common, experts, refuse, window
from megatron_tropd.models.family import ATTENTION, QK_NORM, Family, expert_rows
from megatron_tropd.types import Architecture


def read(config: Config) -> Architecture:
    """Read a ``config.json`` of this family."""
    refuse(config, attention_bias=False, decoder_sparse_step=1)
    if config.get("mlp_only_layers"):
        raise CheckpointError(
            f"config.json has mlp_only_layers={config['mlp_only_layers']}: models with some dense layers are not "
            "supported, only those with experts in every layer."
        )
    looks_back = window(config, used=bool(config.get("use_sliding_window", False)))
    fields = common(config, window=looks_back) | {"ffn_size": int(config["moe_intermediate_size"])}
    normalized = bool(config.get("norm_topk_prob", False))
    return Architecture(**fields, **experts(config, normalized=normalized), qk_norm=True)


FAMILY = Family(
    name="Qwen3MoeForCausalLM",
    read=read,
    layer=ATTENTION + QK_NORM + expert_rows("mlp.gate", "mlp.experts.{e}", "gate_proj", "up_proj", "down_proj"),
)
