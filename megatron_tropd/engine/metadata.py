"""Read the pickles of a ``torch_dist`` checkpoint with unpicklers that know the classes they may hold and no more.

Megatron's format keeps its table of tensors (``.metadata``) as a pickle, and Megatron unpickles it freely. A pickle
that names nothing but these data classes can build them and do nothing else. The table may call any entry an object;
PyTorch unpickles objects freely, too, so they are first read as PyTorch reads mere weights.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.planner import ReadItem

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

_REFUSED = "refused to load object"


class _TableReader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def check_metadata(checkpoint: Path) -> None:
    """Raise CheckpointError when the checkpoint's table is torn, or is a pickle of anything but tables of tensors."""
    path = checkpoint / ".metadata"
    try:
        with path.open("rb") as file:
            _TableReader(file).load()
    except (OSError, EOFError, pickle.UnpicklingError, AttributeError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(
            f"{path.absolute()} is not the table of a checkpoint: {error}. It was not loaded. "
            "Use a checkpoint written by this package."
        ) from error


@contextlib.contextmanager
def only_plain_objects(checkpoint: Path) -> Iterator[None]:
    """Load objects of a checkpoint, within the block, only when they are numbers, text, tensors or bytes.

    Raises:
        CheckpointError: an object is anything else. It was not built.
    """
    load_bytes = DefaultLoadPlanner.load_bytes

    def checked(self: DefaultLoadPlanner, read_item: ReadItem, value: io.BytesIO) -> None:
        try:
            with torch.serialization.safe_globals([io.BytesIO]):
                torch.load(value, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
            raise CheckpointError(f"{_REFUSED} {read_item.dest_index.fqn}") from error
        value.seek(0)
        load_bytes(self, read_item, value)

    DefaultLoadPlanner.load_bytes = checked  # type: ignore[method-assign]
    try:
        yield
    except Exception as error:
        what = _refused(error)
        if what is None:
            raise
        raise CheckpointError(
            f"{checkpoint.absolute()}: {what} is a pickle of more than numbers, text and tensors. It was not loaded. "
            "Use a checkpoint written by this package."
        ) from error
    finally:
        DefaultLoadPlanner.load_bytes = load_bytes  # type: ignore[method-assign]


def _refused(error: BaseException | None) -> str | None:
    """Return what was not loaded, here or on another rank, whose errors arrive as text."""
    while error is not None:
        if found := re.search(_REFUSED + r" ([\w./]+)", str(error)):
            return f"object {found[1]}"
        if isinstance(error, pickle.UnpicklingError):
            return "common.pt"
        error = error.__cause__
    return None
