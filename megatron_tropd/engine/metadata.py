"""Reads the one pickle of a ``torch_dist`` checkpoint with an unpickler that knows the classes it may hold and no more.

Megatron's format keeps its table of tensors (``.metadata``) as a pickle, and Megatron unpickles it freely. A pickle
that names nothing but these data classes can build them and do nothing else.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from megatron_tropd.errors import CheckpointError

_ALLOWED = {
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
}


class _TableReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def check_metadata(checkpoint: Path) -> None:
    """Raises CheckpointError when the checkpoint's table is torn, or is a pickle of anything but tables of tensors."""
    path = checkpoint / ".metadata"
    try:
        with path.open("rb") as file:
            _TableReader(file).load()
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{path.absolute()} is not the table of a checkpoint: {error}. It was not loaded. "
            "Use a checkpoint written by this package."
        ) from error
