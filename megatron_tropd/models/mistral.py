"""Mistral 7B: sequences up to ``sliding_window``."""

from __future__ import annotations

from megatron_tropd.models.config_fields import Config, common, window
from megatron_tropd.models.family import ATTENTION, DENSE_MLP, Family
from megatron_tropd.types import Architecture


def read(config: Config) -> Architecture:
    """Read a ``config.json`` of this family."""
    return Architecture(**common(config, window=window(config, used=True)))


FAMILY = Family(name="MistralForCausalLM", read=read, layer=ATTENTION + DENSE_MLP)
