"""A Megatron checkpoint as a mapping from Hugging Face names to lazily read tensors."""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_tropd.convert.lazy import KINDS
from megatron_tropd.convert.megatron.facts import Facts, compare, read_facts
from megatron_tropd.convert.megatron.locate import ADAPTER_KEY, MegatronDirectory, adapters_alone
from megatron_tropd.convert.megatron.names import Names, StoredPlace, objects_by_kind
from megatron_tropd.convert.megatron.stored import StoredReader, Table, read_table
from megatron_tropd.errors import CheckpointError
from megatron_tropd.models.family import Entry
from megatron_tropd.models.name_table import EMBEDDING, OUTPUT, entries
from megatron_tropd.models.rules import RULES, RowRange, Shape, TensorShard
from megatron_tropd.types import Architecture

_log = logging.getLogger(__name__)


class StoredView:
    """A Hugging Face tensor whose rows stand in tensors of a Megatron checkpoint. Sliced as ``LazyTensor`` is."""

    def __init__(self, reader: StoredReader, name: str, shape: Shape, rows: list[tuple[RowRange, StoredPlace]]) -> None:
        self.name = name
        self.shape = shape
        self._reader, self._rows = reader, sorted(rows, key=lambda row: row[0].hf_row)
        self._dtype = reader.table.tensors[rows[0][1].key].dtype

    @property
    def keys(self) -> set[str]:
        """Return the keys of the checkpoint that it is made of."""
        return {place.key for _, place in self._rows}

    @property
    def kind(self) -> str:
        """Return safetensors' name of the dtype."""
        return KINDS.get(self._dtype, str(self._dtype))

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype; CheckpointError for anything but a floating-point tensor of 16 bits or more."""
        if self._dtype not in KINDS:
            raise CheckpointError(
                f"{self._reader.table.directory.absolute()}: {self._rows[0][1].key} is of type {self._dtype}: "
                "quantized weights are not supported. Save the model as float32 or bfloat16."
            )
        return self._dtype

    def __getitem__(self, index: Any) -> Tensor:
        first, second = index if isinstance(index, tuple) else (index, None)
        start, stop, _ = first.indices(self.shape[0])
        columns = None if second is None else slice(*second.indices(self.shape[1])[:2])
        parts = []
        for block, place in self._rows:
            low, high = max(start, block.hf_row), min(stop, block.hf_row + block.rows)
            if low < high:
                at = block.shard_row - block.hf_row
                parts.append(self._reader.read(place.key, place.place, slice(low + at, high + at), columns))
        if not parts:
            width = [] if len(self.shape) == 1 else [self.shape[1] if columns is None else columns.stop - columns.start]
            return torch.empty(0, *width, dtype=self.dtype)
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class MegatronWeights(Mapping[str, StoredView]):
    """Name -> lazily read tensor of a checkpoint in the ``torch_dist`` format, whatever layout and names wrote it.

    Raises:
        CheckpointError: it is not whole, or of another model than ``architecture``: every difference is named.
    """

    def __init__(self, found: MegatronDirectory, architecture: Architecture, *, config: Path) -> None:
        self.directory = found.path
        table = _table(found.path)
        if any(ADAPTER_KEY in key for key in table.tensors):
            raise CheckpointError(adapters_alone(found.path))
        facts = read_facts(table, found.described)
        compare(facts, architecture, checkpoint=found.path, config=config)
        self._names, self._reader = Names(table.tensors), StoredReader(table)
        self._check_sizes(architecture, config)
        self._views = dict(self._view_all(architecture))
        self._check_homeless(architecture, config)
        _say_once(_summary(found, facts, self._names, table) + self._padding(architecture))

    def _check_sizes(self, architecture: Architecture, config: Path) -> None:
        sizes = self._names.sizes()
        for what, key, wanted in (
            ("layers", "num_hidden_layers", architecture.num_layers),
            ("experts", "num_experts", architecture.num_experts),
        ):
            if sizes.get(what, 0) != wanted:
                raise CheckpointError(
                    f"{self.directory.absolute()} has {sizes.get(what, 0)} {what}, {config.absolute()} wants {wanted} "
                    f"({key}). Give the directory of the model that it was trained from as `like`."
                )

    def _view_all(self, architecture: Architecture) -> Iterator[tuple[str, StoredView]]:
        table = entries(architecture, range(architecture.num_layers), embedding=True, output=True)
        if architecture.tied_embeddings and self._names.find(OUTPUT.megatron, layer=None, expert=None) is not None:
            # a tied model that has one all the same: whoever checks the weights compares the two
            table.append(Entry(OUTPUT.megatron, tuple(OUTPUT.hf), table[0].shapes, OUTPUT.rule))
        cut = TensorShard(architecture, 0, 1, architecture.vocab_size)  # all that one rank without sharding has
        for entry in table:
            for part, name in enumerate(entry.hf):
                yield name, self._view(entry, part, cut)

    def _view(self, entry: Entry, part: int, cut: TensorShard) -> StoredView:
        name = _template(entry)
        place = self._names.find(name, layer=entry.layer, expert=entry.expert)
        blocks = [block for block in RULES[entry.rule].blocks(entry.shapes, cut) if block.part == part]
        rows = sum(shape[0] for shape in entry.shapes)
        if place is None and len(entry.hf) == 2:  # gate and up, each under a key of its own
            place = self._names.find(name, layer=entry.layer, expert=entry.expert, half=("_w", "_v")[part])
            blocks, rows = [RowRange(part, entry.shapes[part][0], 0, 0)], entry.shapes[part][0]
        if place is None:
            raise CheckpointError(
                f"{self.directory.absolute()} has no {entry.megatron}, of which {entry.hf[part]} is made: it is not "
                "whole, or of another model than its config.json."
            )
        self._check_shape(entry, place, (rows, *entry.shapes[0][1:]))
        return StoredView(self._reader, entry.hf[part], entry.shapes[part], [(block, place) for block in blocks])

    def _check_shape(self, entry: Entry, place: StoredPlace, wanted: Shape) -> None:
        found = self._names.shape(place)
        padded = entry.hf[0] in (*EMBEDDING.hf, *OUTPUT.hf) and len(found) == 2 and found[0] >= wanted[0]
        if found != wanted and not (padded and found[1:] == wanted[1:]):
            raise CheckpointError(
                f"{self.directory.absolute()}: {place.key} has shape {list(found)}, the model of config.json needs "
                f"{list(wanted)}. Give the directory of the model that it was trained from as `like`."
            )

    def _padding(self, architecture: Architecture) -> str:
        (embedding,) = EMBEDDING.hf
        rows = max(self._reader.table.tensors[key].shape[0] for key in self._views[embedding].keys)
        extra = rows - architecture.vocab_size
        return f"; {extra:,} rows of the vocabulary beyond the config's {architecture.vocab_size:,}" if extra else ""

    def _check_homeless(self, architecture: Architecture, config: Path) -> None:
        used = {key for view in self._views.values() for key in view.keys}
        strange = self._names.homeless(used)
        if strange:
            raise CheckpointError(
                f"{self.directory.absolute()} has {strange[0]!r} ({len(strange)} such tensors), for which the model of "
                f"{config.absolute()} ({architecture.family}) has no place. Give the directory of the model that it "
                "was trained from as `like`."
            )

    def __getitem__(self, name: str) -> StoredView:
        if name not in self._views:
            raise CheckpointError(f"{self.directory.absolute()} has nothing of which {name!r} could be made.")
        return self._views[name]

    def __contains__(self, name: object) -> bool:
        return name in self._views

    def __iter__(self) -> Iterator[str]:
        return iter(self._views)

    def __len__(self) -> int:
        return len(self._views)


def _template(entry: Entry) -> str:
    name = entry.megatron.replace(f"layers.{entry.layer}.", "layers.{i}.")
    return name.replace(f"local_experts.{entry.expert}.", "local_experts.{e}.")


def _table(path: Path) -> Table:
    """Read the table once for all who open the checkpoint: of a large model it takes seconds."""
    stat = os.stat(path / ".metadata")
    return _cached_table(path.absolute(), stat.st_mtime_ns, stat.st_size)


@functools.lru_cache(maxsize=4)
def _cached_table(path: Path, modified: int, size: int) -> Table:
    return read_table(path)


def _summary(found: MegatronDirectory, facts: Facts, names: Names, table: Table) -> str:
    """Say what was read, and what of the directory was left out."""
    left = [f"{count:,} tensors of the {what}" for what, count in names.beside.items() if count]
    for kind, keys in objects_by_kind(table.others).items():
        left.append(
            f"{len(keys):,} objects of kind {kind}" + (f" ({', '.join(keys[:3])})" if kind == "unknown" else "")
        )
    unbuilt = facts.left_out + table.left_out
    left += [f"{sum(unbuilt.values())} times {', '.join(sorted(unbuilt))}, not built"] if unbuilt else []
    step = facts.common.get("iteration")
    of = f", iteration {step}" if isinstance(step, int) else ""
    return f"{found.path}: weights of a checkpoint of {found.writer}{of}; left out: {'; '.join(left) or 'nothing'}"


@functools.cache
def _say_once(text: str) -> None:
    _log.warning("%s", text)
