"""Mixtral: experts in every layer."""

from __future__ import annotations

from megatron_tropd.models.config_fields import Config, common, experts, window
from megatron_tropd.models.family import ATTENTION, Family, expert_rows
from megatron_tropd.types import Architecture


def read(config: Config) -> Architecture:
    """Read a ``config.json`` of this family."""
    looks_back = window(config, used=True, default=None)
    return Architecture(**common(config, window=looks_back, theta=1e6), **experts(config, normalized=True))


FAMILY = Family(
    name="MixtralForCausalLM",
    read=read,
    layer=ATTENTION + expert_rows("block_sparse_moe.gate", "block_sparse_moe.experts.{e}", "w1", "w3", "w2"),
)
