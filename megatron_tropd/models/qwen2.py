"""Qwen2, Qwen2.5 and DeepSeek-R1-Distill-Qwen: biases of query, key and value."""

from __future__ import annotations

from megatron_tropd.models.config_fields import Config, common, qwen_window
from megatron_tropd.models.family import ATTENTION, DENSE_MLP, QKV_BIAS, Family
from megatron_tropd.types import Architecture


def read(config: Config) -> Architecture:
    """Read a ``config.json`` of this family."""
    return Architecture(**common(config, window=qwen_window(config)), qkv_bias=True)


FAMILY = Family(name="Qwen2ForCausalLM", read=read, layer=ATTENTION + DENSE_MLP + QKV_BIAS)
