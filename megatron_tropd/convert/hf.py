"""Hugging Face checkpoint directories on disk, read slice by slice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_tropd.convert.lazy import LazyTensor, SafetensorsFile, WeightsSource
from megatron_tropd.errors import CheckpointError
from megatron_tropd.models.name_table import EMBEDDING, OUTPUT, hf_shapes
from megatron_tropd.models.registry import architecture_of
from megatron_tropd.models.rules import strips
from megatron_tropd.progress.phases import Phase
from megatron_tropd.storage.kinds import adapter_base, foreign_kind
from megatron_tropd.storage.model_files import check_model_files
from megatron_tropd.types import Architecture

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def read_json(path: Path) -> Any:
    """Parse a JSON file; CheckpointError when it is missing or not JSON."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError) as error:
        if adapter := adapter_base(path.parent):
            raise CheckpointError(f"{path.parent.absolute()} is {adapter}") from error
        raise CheckpointError(f"{path.absolute()} does not exist. Give a Hugging Face model directory.") from error
    except ValueError as error:  # JSONDecodeError, or bytes that are no text
        if kind := foreign_kind(path):
            raise CheckpointError(f"{path.absolute()} is {kind}") from error
        raise CheckpointError(f"{path.absolute()} is not valid JSON: {error}.") from error
    except RecursionError as error:
        raise CheckpointError(f"{path.absolute()} holds lists within lists, deeper than can be read.") from error


def read_architecture(directory: str | Path) -> Architecture:
    """Read the model's sizes from ``config.json``; CheckpointError when missing or unsupported, or a file is none."""
    check_model_files(directory)
    return architecture_of(read_json(Path(directory) / "config.json"))


class HFWeights(Mapping[str, LazyTensor]):
    """Name -> lazily read tensor of a directory's safetensors files. Nothing is read until sliced.

    Raises:
        CheckpointError: no safetensors (pickled ``.bin`` weights are refused), a torn file, a missing shard or name.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._open: dict[str, SafetensorsFile] = {}
        self._file_of = self._locate()

    def _locate(self) -> dict[str, str]:
        if (self.directory / INDEX).exists():
            weight_map = self._weight_map()
            for file in sorted(set(weight_map.values())):
                if not (self.directory / file).exists():
                    raise CheckpointError(
                        f"{self.directory.absolute()}: {INDEX} names {file}, which is not there. Copy the shard too."
                    )
            return weight_map
        if (self.directory / SINGLE).exists():
            return dict.fromkeys(self._opened(SINGLE).tensors, SINGLE)
        pickled = sorted(path.name for path in self.directory.glob("*.bin"))
        reason = f"only pickled weights ({', '.join(pickled)}), which are never loaded" if pickled else "no weights"
        raise CheckpointError(
            f"{self.directory.absolute()} has {reason}: expected {SINGLE} or {INDEX}. Save the model as safetensors."
        )

    def _weight_map(self) -> dict[str, str]:
        index = read_json(self.directory / INDEX)
        weight_map: Any = index.get("weight_map") if isinstance(index, dict) else None
        names = weight_map.values() if isinstance(weight_map, dict) else [None]
        if not all(isinstance(file, str) and Path(file).name == file for file in names):
            raise CheckpointError(
                f"{(self.directory / INDEX).absolute()} has no weight_map of names to files next to it. Copy it again."
            )
        return dict(weight_map)

    def _opened(self, file: str) -> SafetensorsFile:
        if file not in self._open:
            self._open[file] = SafetensorsFile(self.directory / file)
        return self._open[file]

    def __getitem__(self, name: str) -> LazyTensor:
        if name not in self._file_of:
            raise CheckpointError(
                f"{self.directory.absolute()} has no tensor {name!r}. Its config.json promises a model that needs it."
            )
        file = self._file_of[name]
        if name not in self._opened(file).tensors:
            raise CheckpointError(
                f"{(self.directory / file).absolute()} lacks tensor {name!r}, which {INDEX} says it has."
            )
        return self._open[file].tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def check_weights(weights: WeightsSource, architecture: Architecture) -> None:
    """Compare names, shapes and types with what the architecture needs, from the files' headers alone.

    Raises:
        CheckpointError: names the directory and the first tensor that is missing, of another shape, quantized, or of
            no place in the model; or an output layer of its own in a tied model.
    """
    where, needed = weights.directory.absolute(), hf_shapes(architecture)
    for name, shape in needed.items():
        found = weights[name]
        if found.shape != shape:
            raise CheckpointError(
                f"{where}: {name} has shape {list(found.shape)}, but the model of config.json needs {list(shape)}. "
                "Give the config.json that belongs to the weights."
            )
        _ = found.dtype
    # layer tensors that config.json has no place for (more layers, biases) would silently be another model
    homeless = sorted(
        name
        for name in set(weights) - set(needed)
        if name.startswith("model.layers.") and not name.endswith("rotary_emb.inv_freq")
    )
    if homeless:
        raise CheckpointError(
            f"{where}: the checkpoint has {homeless[0]!r} ({len(homeless)} such tensors), for which the model of "
            f"its config.json ({architecture.family}, {architecture.num_layers} layers) has no place. "
            "Give the config.json that belongs to the weights."
        )
    _check_tied(weights, architecture)


def _check_tied(weights: WeightsSource, architecture: Architecture) -> None:
    """Refuse a tied model that carries two different output layers; twice the same one is fine."""
    (name,), (source,) = OUTPUT.hf, EMBEDDING.hf
    if not architecture.tied_embeddings or name not in weights:
        return
    own, embedding = weights[name], weights[source]
    same = own.shape == embedding.shape and all(
        own[rows].equal(embedding[rows].to(own.dtype)) for rows in strips(own.shape, own.dtype.itemsize)
    )
    if not same:
        raise CheckpointError(
            f"{weights.directory.absolute()}: config.json has tie_word_embeddings=true, but {name} differs from "
            f"{source}. Set tie_word_embeddings to false, or remove {name}."
        )


# values of a tensor that stand for it in a fingerprint
_SAMPLE = 1024


def weights_fingerprint(directory: str | Path) -> str | None:
    """Hash the weights of a Hugging Face directory, as ``fingerprint_of`` does; None where there are none."""
    try:
        return fingerprint_of(HFWeights(directory))
    except CheckpointError:
        return None


def fingerprint_of(weights: WeightsSource) -> str:
    """Hash (hex) names, shapes, types and some values of every tensor, however they are cut into files.

    Any training changes all matrices, so their first and last rows distinguish models.
    """
    digest = hashlib.sha256()
    with Phase(f"identifying the weights of {weights.directory}", total=len(weights)) as phase:
        for name in phase.watch(sorted(weights)):
            tensor = weights[name]
            digest.update(json.dumps([name, tensor.kind, tensor.shape]).encode())
            for rows in (slice(0, 1), slice(-1, None)) if len(tensor.shape) > 1 else (slice(0, _SAMPLE),):
                try:
                    values = tensor[rows].reshape(-1)[:_SAMPLE].contiguous()
                except CheckpointError:  # quantized: its names and shapes have to do
                    continue
                digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
