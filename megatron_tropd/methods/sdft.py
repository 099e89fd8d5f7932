"""Self-distillation fine-tuning: the JSD on the student's own top 100, renormalized there (arXiv 2601.19897)."""

from __future__ import annotations

from megatron_tropd.methods.base import Preset
from megatron_tropd.methods.opsd import OpsdOptions, opsd

PRESET = Preset(
    summary="JSD on the student's top k to itself, which reads a demonstration",
    source="arXiv 2601.19897",
    options=OpsdOptions,
    build=opsd,
    defaults={"form": "topk", "tail": "renorm", "support": "student", "mismatch": "truncate"},
)
