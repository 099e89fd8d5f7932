"""Packing of whole sequences into fixed-budget streams: ``pack``, its validation, the plain twin of the C++ core."""

from megatron_tropd.data.packing.api import (
    LINEAR_WORK,
    FlatSequences,
    backend,
    pack,
    pack_flat,
    pack_work,
    shared_lengths,
)
from megatron_tropd.data.packing.own_prompts import as_teacher_reads, pack_for_both
from megatron_tropd.data.packing.validate import check_regions

__all__ = [
    "LINEAR_WORK",
    "FlatSequences",
    "as_teacher_reads",
    "backend",
    "check_regions",
    "pack",
    "pack_flat",
    "pack_for_both",
    "pack_work",
    "shared_lengths",
]
