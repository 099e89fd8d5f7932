"""Llama 2, 3, 3.1, 3.2 and DeepSeek-R1-Distill-Llama."""

from __future__ import annotations

from megatron_tropd.models.config_fields import Config, common, refuse
from megatron_tropd.models.family import ATTENTION, DENSE_MLP, Family
from megatron_tropd.types import Architecture


def read(config: Config) -> Architecture:
    """Read a ``config.json`` of this family."""
    refuse(config, attention_bias=False, mlp_bias=False)
    return Architecture(**common(config))


FAMILY = Family(name="LlamaForCausalLM", read=read, layer=ATTENTION + DENSE_MLP)
