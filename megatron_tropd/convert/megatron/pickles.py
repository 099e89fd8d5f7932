"""Read pickles into plain values: everything else in them is named, and never built.

Megatron keeps its table of tensors (``.metadata``) and its arguments (``common.pt``) as pickles, and unpickles them
freely. Here no name in a pickle is ever looked up. A name is answered with one of the stand-ins below, or with an empty
class that does nothing when it is called, filled or extended, so a payload anywhere comes to nothing.
"""

from __future__ import annotations

import io
import pickle
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from megatron_tropd.errors import CheckpointError

# everything by which a torn or hostile pickle can end
PICKLE_ERRORS = (
    pickle.UnpicklingError,
    EOFError,
    AttributeError,
    TypeError,
    ValueError,
    LookupError,
    ImportError,
    RecursionError,
    MemoryError,
)


class Inert:
    """An object that was not built: arguments and state of it, and its name."""

    origin = ""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.args = args
        self.state: Any = options

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __call__(self, *args: Any, **options: Any) -> Inert:
        """Come to nothing: what is called may itself be the result of a call."""
        return Inert(*args)

    def __setitem__(self, name: Any, value: Any) -> None:
        """Leave out an item."""

    def append(self, value: Any) -> None:
        """Leave out an item."""

    def extend(self, values: Any) -> None:
        """Leave out items."""

    def __new__(cls, *args: Any, **options: Any) -> Inert:
        made = super().__new__(cls)
        made.args, made.state = args, {}
        return made

    def field(self, name: str, default: Any = None) -> Any:
        """Return a field of the object's state, where that is a table."""
        state = self.state[1] if isinstance(self.state, tuple) and len(self.state) == 2 else self.state
        return state.get(name, default) if isinstance(state, dict) else default


_METADATA = "torch.distributed.checkpoint.metadata"
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_PLAIN: dict[str, Any] = {"torch.Size": tuple, "collections.OrderedDict": dict}
# classes whose state is read; nothing of the classes themselves
_READ = {
    *(f"{_METADATA}.{name}" for name in ("Metadata", "TensorStorageMetadata", "BytesStorageMetadata")),
    *(f"{_METADATA}.{name}" for name in ("ChunkStorageMetadata", "MetadataIndex", "TensorProperties", "StorageMeta")),
    f"{_METADATA}._MEM_FORMAT_ENCODING",
    "torch.serialization._get_layout",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    *(f"torch.distributed.checkpoint.planner.{name}" for name in ("SavePlan", "WriteItem", "WriteItemType")),
    "torch.distributed.checkpoint.planner.TensorWriteData",
    "argparse.Namespace",
    *(f"{module}.{kind}Path" for module in ("pathlib", "pathlib._local") for kind in ("Posix", "PurePosix", "Windows")),
    "torch._utils._rebuild_tensor_v2",
    *(f"torch.{name}Storage" for name in ("Float", "BFloat16", "Half", "Double", "Byte", "Long", "Int", "Bool")),
    *(f"torch.{name}Storage" for name in ("Char", "Short")),
    "torch.storage.UntypedStorage",
}


class PlainReader(pickle.Unpickler):
    """Unpickler to which every name is a stand-in. ``left_out`` counts the names that are none of ours."""

    def __init__(self, data: bytes) -> None:
        super().__init__(io.BytesIO(data))
        self.left_out: Counter[str] = Counter()
        self._made: dict[str, type[Inert]] = {}

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _PLAIN:
            return _PLAIN[full]
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if full not in _READ:
            self.left_out[full] += 1
        if full not in self._made:
            self._made[full] = type("Inert", (Inert,), {"origin": full})
        return self._made[full]

    def persistent_load(self, pid: Any) -> Any:
        """Keep what a tensor's bytes are called; they are read elsewhere, or not at all."""
        found = Inert(*pid) if isinstance(pid, tuple) else Inert(pid)
        return found


def read_plain(path: Path, data: bytes) -> tuple[Any, Counter[str]]:
    """Read a pickle into plain values and stand-ins; beside them the names that were left out.

    Raises:
        CheckpointError: it is torn, or no pickle.
    """
    reader = PlainReader(data)
    try:
        return reader.load(), reader.left_out
    except PICKLE_ERRORS as error:
        raise CheckpointError(
            f"{path.absolute()} is torn, or not what its name says: {error}{named(reader.left_out)}. Nothing in it "
            "was run. Copy it again."
        ) from error


def named(left_out: Counter[str]) -> str:
    """List names that were left out, for the end of a message."""
    return f"; it names {', '.join(sorted(left_out))}" if left_out else ""


def read_archive(path: Path) -> tuple[Any, Counter[str]]:
    """Read the pickle of a file that ``torch.save`` wrote. Tensors stay stand-ins.

    Raises:
        CheckpointError: it is torn, or none.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            data = archive.read(pickle_of(archive))
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise CheckpointError(f"{path.absolute()} is torn, or no file that torch.save writes: {error}.") from error
    return read_plain(path, data)


def pickle_of(archive: zipfile.ZipFile) -> zipfile.ZipInfo:
    """Find the pickle of an archive that ``torch.save`` wrote; ValueError where there is none, or it is packed."""
    found = next((info for info in archive.infolist() if info.filename.endswith("/data.pkl")), None)
    if found is None or found.compress_type != zipfile.ZIP_STORED:
        raise ValueError("it holds no data.pkl" if found is None else "its data.pkl is compressed")
    return found
