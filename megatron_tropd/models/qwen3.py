"""Qwen3: norms of query and key."""

from __future__ import annotations

from megatron_tropd.models.config_fields import Config, common, qwen_window, refuse
from megatron_tropd.models.family import ATTENTION, DENSE_MLP, QK_NORM, Family
from megatron_tropd.types import Architecture


def read(config: Config) -> Architecture:
    """Read a ``config.json`` of this family."""
    refuse(config, attention_bias=False)
    fields = common(config, window=qwen_window(config)) | {"head_dim": int(config["head_dim"])}
    return Architecture(**fields, qk_norm=True)


FAMILY = Family(name="Qwen3ForCausalLM", read=read, layer=ATTENTION + DENSE_MLP + QK_NORM)
