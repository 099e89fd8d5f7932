"""Hugging Face checkpoint directories on disk: read slice by slice, written file by file and atomically."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_tropd.convert.families import architecture_of
from megatron_tropd.convert.rules import Sliceable
from megatron_tropd.errors import CheckpointError
from megatron_tropd.types import Architecture

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
# what a model directory holds besides weights, and an export carries over
_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


def read_json(path: Path) -> Any:
    """The parsed file; CheckpointError when it is missing or not JSON."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{path.absolute()} does not exist. Give a Hugging Face model directory.") from error
    except ValueError as error:  # JSONDecodeError, or bytes that are no text
        raise CheckpointError(f"{path.absolute()} is not valid JSON: {error}.") from error


def read_architecture(directory: str | Path) -> Architecture:
    """The model's sizes from ``config.json``; CheckpointError when missing or unsupported."""
    return architecture_of(read_json(Path(directory) / "config.json"))


class HFWeights(Mapping[str, Sliceable]):
    """Name -> lazily read tensor of a directory's safetensors files. Nothing is read until sliced.

    Raises:
        CheckpointError: no safetensors (pickled ``.bin`` weights are refused), a torn file, a missing shard or name.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._file_of = self._locate()
        self._open: dict[str, Any] = {}

    def _locate(self) -> dict[str, str]:
        if (self.directory / _INDEX).exists():
            weight_map = self._weight_map()
            for file in sorted(set(weight_map.values())):
                if not (self.directory / file).exists():
                    raise CheckpointError(
                        f"{self.directory.absolute()}: {_INDEX} names {file}, which is not there. Copy the shard too."
                    )
            return weight_map
        if (self.directory / _SINGLE).exists():
            return dict.fromkeys(self._handle_of(_SINGLE).keys(), _SINGLE)
        pickled = sorted(path.name for path in self.directory.glob("*.bin"))
        reason = f"only pickled weights ({', '.join(pickled)}), which are never loaded" if pickled else "no weights"
        raise CheckpointError(
            f"{self.directory.absolute()} has {reason}: expected {_SINGLE} or {_INDEX}. Save the model as safetensors."
        )

    def _weight_map(self) -> dict[str, str]:
        index = read_json(self.directory / _INDEX)
        weight_map: Any = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise CheckpointError(
                f"{(self.directory / _INDEX).absolute()} has no weight_map of names to files. Copy it again."
            )
        return weight_map

    def _handle_of(self, file: str) -> Any:
        try:
            return safe_open(self.directory / file, framework="pt")
        except SafetensorError as error:
            path = (self.directory / file).absolute()
            raise CheckpointError(f"{path} is torn or not safetensors: {error}. Copy it again.") from error

    def __getitem__(self, name: str) -> Sliceable:
        if name not in self._file_of:
            raise CheckpointError(
                f"{self.directory.absolute()} has no tensor {name!r}. Its config.json promises a model that needs it."
            )
        file = self._file_of[name]
        if file not in self._open:
            self._open[file] = self._handle_of(file)
        try:
            sliced: Sliceable = self._open[file].get_slice(name)
        except SafetensorError as error:
            raise CheckpointError(
                f"{(self.directory / file).absolute()} lacks tensor {name!r}, which {_INDEX} says it has: {error}."
            ) from error
        return sliced

    def __iter__(self) -> Any:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


class HFWriter:
    """Writes tensors into safetensors files of bounded size, aside, and puts the directory in place at the end."""

    def __init__(self, directory: str | Path, *, companions_from: str | Path, max_file_bytes: int = 4 << 30) -> None:
        self.target = Path(directory)
        self._aside = self.target.with_name(self.target.name + ".partial")
        self._companions_from = Path(companions_from)
        self._max = max_file_bytes
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._files: list[list[str]] = []
        self._total_bytes = 0
        shutil.rmtree(self._aside, ignore_errors=True)
        self._aside.mkdir(parents=True)

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Streams every tensor to disk; holds at most one file's worth."""
        for name, tensor in tensors:
            size = tensor.numel() * tensor.element_size()
            if self._pending and self._pending_bytes + size > self._max:
                self._flush()
            self._pending[name] = tensor.detach().cpu().contiguous()
            self._pending_bytes += size
            self._total_bytes += size

    def finish(self) -> Path:
        """Writes the index and companions and replaces the target directory in one rename."""
        self._flush()
        self._name_files()
        for name in _COMPANIONS:
            if (self._companions_from / name).exists():
                shutil.copyfile(self._companions_from / name, self._aside / name)
        replaced = self.target.with_name(self.target.name + ".replaced")
        shutil.rmtree(replaced, ignore_errors=True)
        if self.target.exists():
            self.target.rename(replaced)
        self._aside.rename(self.target)
        shutil.rmtree(replaced, ignore_errors=True)
        return self.target

    def _flush(self) -> None:
        if not self._pending:
            return
        part = self._aside / f"part-{len(self._files)}"
        save_file(self._pending, part, metadata={"format": "pt"})
        part.chmod(0o644)  # safetensors leaves its files to their owner alone, a model is for whoever may read the rest
        self._files.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0

    def _name_files(self) -> None:
        count = len(self._files)
        if count == 1:
            os.rename(self._aside / "part-0", self._aside / _SINGLE)
            return
        weight_map = {}
        for number, names in enumerate(self._files):
            file = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            os.rename(self._aside / f"part-{number}", self._aside / file)
            weight_map.update(dict.fromkeys(names, file))
        index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
        (self._aside / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True))
