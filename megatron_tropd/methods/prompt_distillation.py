"""Prompt distillation: forward KL to a teacher that reads a prompt which the student is to do without."""

from __future__ import annotations

from megatron_tropd.methods.base import Preset
from megatron_tropd.methods.fkl import FklOptions, fkl

PRESET = Preset(
    summary="forward KL to a teacher that reads a longer prompt",
    source="exact divergence",
    options=FklOptions,
    build=fkl,
)
