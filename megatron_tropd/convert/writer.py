"""Write a Hugging Face checkpoint directory piece by piece, aside, and put it in place when it is whole."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BufferedRandom
from pathlib import Path

import torch
from torch import Tensor

from megatron_tropd.convert.companions import check_companions, companions_of, copy_companions
from megatron_tropd.convert.hf import INDEX, SINGLE, read_json
from megatron_tropd.errors import CheckpointError, StorageError
from megatron_tropd.models.rules import Shape, strips
from megatron_tropd.storage.owned import (
    MARKER,
    UNFINISHED,
    beside,
    discard_unfinished,
    mark_directory,
    replace_directory,
    settled,
    start_unfinished,
    unfinished_note,
    why_not_ours,
)
from megatron_tropd.storage.write_aside import remove_partials, storage_errors, write_aside

CARD = "README.md"
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_OURS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.part|\.index\.json)?")


@dataclass(slots=True)
class _File:
    """One safetensors file to be: what precedes its tensors, where each goes, and what is still missing."""

    name: str
    header: bytes
    offsets: dict[str, int]
    size: int
    missing: dict[str, int]  # rows of each tensor that have yet to come

    @property
    def is_whole(self) -> bool:
        return not any(self.missing.values())


class HFWriter:
    """Writer that holds at most a strip of a tensor. The target directory appears, or is replaced, in one rename."""

    def __init__(
        self,
        directory: str | Path,
        *,
        companions_from: str | Path,
        tensors: Mapping[str, Shape],
        dtype: torch.dtype,
        max_file_bytes: int = 4 << 30,
        resume_from: str | None = None,
        end_ids: Sequence[int] = (),
        card: str | None = None,
    ) -> None:
        """Prepare the files.

        Args:
            companions_from: a model directory whose config and tokenizer the new one gets.
            tensors: everything that will be written, in the order of the files.
            resume_from: identifies the source. Files that an earlier writer of the same source finished before it was
                killed are kept, and what they hold is in ``done``. None starts over.
            end_ids: tokens that end a response, for generation_config.json; empty leaves that as it came.
            card: the README.md beside the model; None writes none.
        """
        self._open: dict[str, BufferedRandom] = {}  # by file name
        self.target = settled(directory)
        self._aside = beside(self.target, "partial")
        self._companions_from = Path(companions_from)
        self._shapes, self._dtype, self._end_ids = dict(tensors), dtype, list(end_ids)
        self._card_text = card
        self._files = _plan(self._shapes, dtype, max_file_bytes)
        self._file_of = {name: file for file in self._files for name in file.offsets}
        self._prepare(resume_from)
        self.done = frozenset(name for name, file in self._file_of.items() if file.is_whole)

    def __del__(self) -> None:
        for handle in self._open.values():
            handle.close()

    def _prepare(self, source: str | None) -> None:
        reason = why_not_ours(self.target)
        if reason is not None:
            raise StorageError(
                f"{self.target.absolute()} {reason}. It is left as it is: name a directory that is not there yet."
            )
        remove_partials(self._aside)
        if source is None or unfinished_note(self._aside) != source:
            discard_unfinished(self._aside, self._is_ours)
            start_unfinished(self._aside, source or "")
            return
        for file in self._files:
            path = self._aside / file.name
            if path.exists() and path.stat().st_size == file.size and _begins_with(path, file.header):
                file.missing = dict.fromkeys(file.missing, 0)

    def _is_ours(self, name: str) -> bool:
        """Say whether a file is one that a writer of this target leaves."""
        return (
            _OURS.fullmatch(name) is not None or name in (MARKER, CARD) or name in companions_of(self._companions_from)
        )

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Write every tensor to its place, in the writer's dtype.

        Raises:
            CheckpointError: a tensor that was not announced, or of another shape.
        """
        for name, tensor in tensors:
            if self._shapes.get(name) != tuple(tensor.shape):
                raise self._unannounced(name, tensor.shape)
            self.write_rows(name, 0, tensor)

    def write_rows(self, name: str, first: int, rows: Tensor) -> None:
        """Write some whole rows of a tensor, from row ``first``. Every row must come once; order does not matter.

        Raises:
            CheckpointError: a tensor that was not announced, of another shape, or more rows than it has.
        """
        shape, file = self._shapes.get(name, ()), self._file_of.get(name)
        if file is None or rows.shape[1:] != shape[1:] or first + len(rows) > shape[0]:
            raise self._unannounced(name, rows.shape, first)
        if file.is_whole:
            return  # a writer before this one finished it
        if file.missing[name] < len(rows):
            raise CheckpointError(f"{self.target.absolute()}: rows of {name} came twice.")
        with storage_errors(self.target):
            handle = self._handle(file)
            handle.seek(file.offsets[name] + first * math.prod(shape[1:]) * self._dtype.itemsize)
            for strip in strips(rows.shape, rows.element_size()):
                part = rows.detach()[strip].to(device="cpu", dtype=self._dtype).contiguous()
                handle.write(part.view(-1).view(torch.uint8).numpy().data)
            file.missing[name] -= len(rows)
            if file.is_whole:
                self._finish_file(file)

    def _unannounced(self, name: str, shape: Iterable[int], first: int = 0) -> CheckpointError:
        rows = f" from row {first}" if first else ""
        return CheckpointError(
            f"{self.target.absolute()}: requested to write {name} of shape {list(shape)}{rows}, "
            f"but was announced {list(self._shapes.get(name, ())) or 'no such tensor'}."
        )

    def _part(self, file: _File) -> Path:
        return self._aside / (file.name + ".part")

    def _handle(self, file: _File) -> BufferedRandom:
        """Open the file in the making: a few are open at a time, where a parameter's tensors are in several."""
        if file.name not in self._open:
            self._open[file.name] = self._part(file).open("w+b")
            self._open[file.name].write(file.header)
        return self._open[file.name]

    def _finish_file(self, file: _File) -> None:
        handle = self._open.pop(file.name)
        handle.flush()
        os.fsync(handle.fileno())
        handle.close()
        self._part(file).rename(self._aside / file.name)

    def finish(self) -> Path:
        """Write the index and companions and replace the target directory in one rename.

        Raises:
            CheckpointError: a tensor that was announced never came. The target is left as it was.
            StorageError: the disk is full, or the target is not this program's.
        """
        missing = [name for file in self._files for name, rows in file.missing.items() if rows]
        if missing:
            raise CheckpointError(
                f"{self.target.absolute()}: {missing[0]!r} was never written ({len(missing)} tensors are missing)."
            )
        with storage_errors(self.target):
            self._write_index()
            copy_companions(self._companions_from, self._aside)
            _name_dtype(self._aside / "config.json", self._dtype)
        check_companions(self._companions_from, self._aside)
        with storage_errors(self.target):
            _name_ends(self._aside / "generation_config.json", self._end_ids)
            if self._card_text is not None:
                write_aside(self._aside / CARD, self._card_text)
            mark_directory(self._aside, kind="Hugging Face model", without=(UNFINISHED,))
            (self._aside / UNFINISHED).unlink()
            replace_directory(self._aside, self.target)
        return self.target

    def _write_index(self) -> None:
        if len(self._files) > 1:
            total = sum(math.prod(shape) for shape in self._shapes.values()) * self._dtype.itemsize
            weight_map = {name: file.name for name, file in self._file_of.items()}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            write_aside(self._aside / INDEX, json.dumps(index, indent=2, sort_keys=True))


def _plan(shapes: Mapping[str, Shape], dtype: torch.dtype, max_file_bytes: int) -> list[_File]:
    """Assign the tensors in order to files of at most that many bytes, or of one tensor."""
    groups: list[dict[str, Shape]] = [{}]
    held = 0
    for name, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        if groups[-1] and held + size > max_file_bytes:
            groups.append({})
            held = 0
        groups[-1][name] = shape
        held += size
    names = [f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors" for number in range(len(groups))]
    return [
        _lay_out(name, group, dtype)
        for name, group in zip([SINGLE] if len(groups) == 1 else names, groups, strict=True)
    ]


def _lay_out(name: str, shapes: Mapping[str, Shape], dtype: torch.dtype) -> _File:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, at = {}, 0
    for tensor, shape in shapes.items():
        size = math.prod(shape) * dtype.itemsize
        header[tensor] = {"dtype": _DTYPES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        offsets[tensor] = at
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start on a multiple of 8 bytes
    start = 8 + len(text)
    return _File(
        name,
        len(text).to_bytes(8, "little") + text,
        {tensor: start + offset for tensor, offset in offsets.items()},
        start + at,
        {tensor: shape[0] for tensor, shape in shapes.items()},
    )


def _begins_with(path: Path, header: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(header)) == header


def _name_dtype(config: Path, dtype: torch.dtype) -> None:
    """Name the dtype of the weights in config.json; leave it otherwise byte for byte as it came."""
    settings = read_json(config) if config.exists() else {}
    name = str(dtype).removeprefix("torch.")
    changed = {key: name for key in ("dtype", "torch_dtype") if settings.get(key, name) != name}
    if changed:
        write_aside(config, json.dumps(settings | changed, indent=2) + "\n")


def _name_ends(config: Path, end_ids: list[int]) -> None:
    """Name the ends in generation_config.json; leave all else as it is."""
    settings = read_json(config) if config.exists() else {}
    if end_ids and settings.get("eos_token_id") != end_ids:
        write_aside(config, json.dumps(settings | {"eos_token_id": end_ids}, indent=2) + "\n")
