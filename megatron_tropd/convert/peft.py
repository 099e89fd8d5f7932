"""Adapters on disk as `peft` writes and reads them. It need not be installed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from megatron_tropd.convert.hf import read_json
from megatron_tropd.convert.lazy import LazyTensor, SafetensorsFile
from megatron_tropd.errors import CheckpointError
from megatron_tropd.models.adapters import adapter_shapes, possible_targets
from megatron_tropd.storage.owned import (
    MARKER,
    UNFINISHED,
    beside,
    discard_unfinished,
    mark_directory,
    replace_directory,
    settled,
    start_unfinished,
)
from megatron_tropd.storage.write_aside import storage_errors, write_aside
from megatron_tropd.types import AdapterSpec, Architecture

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
# settings of `peft` that must be as they are here, where they are there at all
_PLAIN: Mapping[str, Any] = {"peft_type": "LORA", "bias": "none"}
# ways of starting that leave the base model as it is; others (pissa, olora, ...) take away from its weights
_STARTS = (True, False, "gaussian", "eva", "orthogonal")
# what changes nothing of how a finished adapter computes, or is told by its matrices; every other setting must be empty
_HARMLESS = frozenset(
    (
        *("auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "exclude_modules"),
        *("inference_mode", "init_lora_weights", "layers_pattern", "lora_alpha", "lora_dropout", "megatron_core"),
        *("peft_version", "qalora_group_size", "r", "revision", "runtime_config", "target_modules", "task_type"),
    )
)


class PeftAdapter(Mapping[str, LazyTensor]):
    """An adapter on disk: its settings, and its matrices by name, of which nothing is read until sliced.

    Raises:
        CheckpointError: it is torn, of another model than ``architecture``, or more than plain LoRA.
    """

    def __init__(self, directory: Path, architecture: Architecture) -> None:
        self.directory = directory
        settings = read_settings(directory)
        self._tensors = SafetensorsFile(directory / TENSORS).tensors if (directory / TENSORS).exists() else {}
        if not self._tensors:
            raise CheckpointError(
                f"{directory.absolute()} has no {TENSORS} (pickled adapters are never loaded). Save the adapter as "
                "safetensors."
            )
        self.spec = self._read_spec(settings, architecture)
        self._check(architecture)

    def _read_spec(self, settings: Mapping[str, Any], architecture: Architecture) -> AdapterSpec:
        named = {key.split(".lora_")[0].rpartition(".")[2] for key in self._tensors}
        try:
            return AdapterSpec(
                rank=int(settings["r"]),
                alpha=float(settings["lora_alpha"]),
                dropout=0.0,
                targets=tuple(target for target in possible_targets(architecture) if target in named),
            )
        except (LookupError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"{(self.directory / CONFIG).absolute()} has no r and lora_alpha that are numbers: {error!r}."
            ) from error

    def _check(self, architecture: Architecture) -> None:
        shapes, where = adapter_shapes(architecture, self.spec), self.directory.absolute()
        strange = sorted(set(self._tensors) - set(shapes))
        if strange:
            raise CheckpointError(
                f"{where} has {strange[0]!r} ({len(strange)} such tensors), for which the student "
                f"({architecture.family}, {architecture.num_layers} layers) has no place: adapters may be of "
                f"{', '.join(possible_targets(architecture))}, in every layer."
            )
        for key, shape in shapes.items():
            if key not in self._tensors:
                raise CheckpointError(
                    f"{where} has no {key!r}: adapters of a part of the layers are not supported, only of all."
                )
            if self._tensors[key].shape != shape:
                raise CheckpointError(
                    f"{where}: {key} has shape {list(self._tensors[key].shape)}, but r = {self.spec.rank} and the "
                    f"student need {list(shape)}. Give the adapter of this model."
                )
            _ = self._tensors[key].dtype  # refuses quantized ones

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Return the dtypes of its matrices."""
        return {tensor.dtype for tensor in self._tensors.values()}

    def fingerprint(self) -> str:
        """Hash (hex) names and contents."""
        digest = hashlib.sha256()
        for name in sorted(self._tensors):
            digest.update(name.encode())
            digest.update(self._tensors[name][:].contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def __getitem__(self, name: str) -> LazyTensor:
        return self._tensors[name]

    def __iter__(self) -> Any:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def read_settings(directory: Path) -> Mapping[str, Any]:
    """Read ``adapter_config.json``.

    Raises:
        CheckpointError: there is none, or it is of an adapter that computes something else than plain LoRA.
    """
    if not (directory / CONFIG).is_file():
        raise CheckpointError(
            f"{directory.absolute()} has no {CONFIG}. Give the directory of an adapter that `peft` saved."
        )
    settings = read_json(directory / CONFIG)
    if not isinstance(settings, dict):
        raise CheckpointError(f"{(directory / CONFIG).absolute()} holds no settings of an adapter.")
    for name, value in settings.items():
        plain = _PLAIN.get(name)
        if name in _HARMLESS or value == plain or value in (None, False, "", [], {}):
            continue
        raise _unsupported(directory, name, value, "none" if plain is None else json.dumps(plain))
    start = settings.get("init_lora_weights", True)
    if start not in _STARTS:
        raise _unsupported(directory, "init_lora_weights", start, "one that leaves the base model as it is")
    return settings


def _unsupported(directory: Path, name: str, value: Any, only: str) -> CheckpointError:
    return CheckpointError(
        f"{(directory / CONFIG).absolute()} has {name} = {value!r}, which is not supported: only plain LoRA is "
        f"({name}: {only}). Merge that adapter into its model first."
    )


def write_peft(
    directory: Path, tensors: Iterable[tuple[str, Tensor]] | Mapping[str, Tensor], spec: AdapterSpec, *, base: str
) -> Path:
    """Write an adapter that `peft` loads, aside, and put it in place in one rename. ``base``: its model, path or name.

    Raises:
        StorageError: the disk is full, or the target holds what this program did not write.
    """
    target = settled(directory)
    aside = beside(target, "partial")
    discard_unfinished(aside, lambda name: name in (CONFIG, TENSORS, MARKER))
    start_unfinished(aside, "an adapter")
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in dict(tensors).items()}
    with storage_errors(target):
        write_aside(aside / TENSORS, save(held, metadata={"format": "pt"}))
        write_aside(aside / CONFIG, json.dumps(_settings(spec, base), indent=2, sort_keys=True) + "\n")
        mark_directory(aside, kind="adapter", without=(UNFINISHED,))
        (aside / UNFINISHED).unlink()
        replace_directory(aside, target)
    return target


def _settings(spec: AdapterSpec, base: str) -> dict[str, Any]:
    alpha = int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": spec.rank,
        "lora_alpha": alpha,
        "lora_dropout": spec.dropout,
        "target_modules": list(spec.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
    }
