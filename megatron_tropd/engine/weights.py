"""Weights between a laid-out Megatron model and Hugging Face names, in both directions, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.convert.families import Entry, entries
from megatron_tropd.convert.rules import RULES, Cut, Sliceable, shape_of
from megatron_tropd.engine.model import Model, padded_vocab_size
from megatron_tropd.errors import CheckpointError
from megatron_tropd.types import Architecture

_BUCKET_BYTES = 256 << 20
_WEIGHT_DTYPES = {torch.float64, torch.float32, torch.bfloat16, torch.float16}


def _cut_of(model: Model, *, rank: int | None = None) -> Cut:
    layout, groups = model.groups.layout, model.groups
    return Cut(
        model.architecture,
        groups.tensor_rank if rank is None else rank,
        layout.tensor,
        padded_vocab_size(model.architecture.vocab_size, layout.tensor),
    )


def local_table(model: Model) -> list[tuple[Entry, Tensor]]:
    """Every table entry this rank holds, with its parameter."""
    found = []
    for chunk, offset in zip(model.chunks, model.layer_offsets(), strict=True):
        layers = range(offset, offset + len(chunk.decoder.layers))
        parameters = {_global_name(name, offset): p for name, p in chunk.named_parameters()}
        table = entries(model.architecture, layers, embedding=chunk.pre_process, output=chunk.post_process)
        unknown = set(parameters) - {entry.megatron for entry in table}
        if unknown:
            raise CheckpointError(f"parameters without a name in the conversion table: {sorted(unknown)}.")
        found += [(entry, parameters[entry.megatron]) for entry in table]
    return found


def _global_name(name: str, layer_offset: int) -> str:
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(int(parts[2]) + layer_offset)
    return ".".join(parts)


@torch.no_grad()
def load_weights(model: Model, source: Mapping[str, Sliceable]) -> None:
    """Fills this rank's parameters from HF-named tensors, reading only this rank's slices.

    Raises:
        CheckpointError: a tensor is missing, quantized, of another shape than ``config.json`` promises, or of a layer
            that it does not describe.
    """
    _refuse_homeless_layers(model.architecture, source)
    cut = _cut_of(model)
    for entry, parameter in local_table(model):
        _fill(entry, parameter, [source[name] for name in entry.hf], cut)


def _refuse_homeless_layers(architecture: Architecture, source: Iterable[str]) -> None:
    """Layer tensors that config.json has no place for (more layers, biases) would silently be another model."""
    known = {
        name
        for entry in entries(architecture, range(architecture.num_layers), embedding=True, output=True)
        for name in entry.hf
    }
    homeless = sorted(
        name
        for name in set(source) - known
        if name.startswith("model.layers.") and not name.endswith("rotary_emb.inv_freq")
    )
    if homeless:
        raise CheckpointError(
            f"the checkpoint has {homeless[0]!r} ({len(homeless)} such tensors), for which the model described by its "
            f"config.json ({architecture.family}, {architecture.num_layers} layers) has no place. "
            "Give the config.json that belongs to the weights."
        )


def _fill(entry: Entry, parameter: Tensor, parts: Sequence[Sliceable], cut: Cut) -> None:
    rule = RULES[entry.rule]
    for name, part, needed in zip(entry.hf, parts, rule.shapes(tuple(parameter.shape), cut), strict=True):
        if shape_of(part) != needed:
            raise CheckpointError(
                f"{name} has shape {list(shape_of(part))}, but the model of config.json needs {list(needed)}. "
                "Give the config.json that belongs to the weights."
            )
        if (dtype := part[:0].dtype) not in _WEIGHT_DTYPES:
            raise CheckpointError(
                f"{name} is {dtype}: quantized weights are not supported. Save the model as float32 or bfloat16."
            )
    parameter.copy_(rule.cut(parts, cut))


@dataclass(frozen=True, slots=True)
class _Piece:
    """What every rank must know of one entry to take part in its gathering."""

    entry: Entry
    shape: torch.Size


def _stage_tables(model: Model) -> list[list[_Piece]]:
    """The tables of all pipeline stages, the same on every rank."""
    mine = [_Piece(entry, p.shape) for entry, p in local_table(model)]
    if model.groups.layout.pipeline == 1:
        return [mine]
    gathered: list[list[_Piece] | None] = [None] * model.groups.layout.pipeline
    dist.all_gather_object(gathered, mine, group=model.groups.pg.pp)
    return [table or [] for table in gathered]


def hf_tensors(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Yields ``(HF name, whole tensor)`` for the model, on every rank, in a fixed order and the model's dtype.

    Shards are gathered over tensor ranks and handed from the pipeline stage that holds them to the others in buckets
    of at most 256 MiB per rank. Collective: every rank must run the iterator to its end.
    """
    local = {entry.megatron: p.detach() for entry, p in local_table(model)}
    seen: set[str] = set()
    for stage, table in enumerate(_stage_tables(model)):
        # a tied model's last stage repeats the embedding: once is enough
        pieces = [piece for piece in table if not seen & set(piece.entry.hf)]
        seen.update(name for piece in pieces for name in piece.entry.hf)
        for bucket in _buckets(pieces, model.dtype.itemsize):
            shards = _gather_bucket(model, bucket, stage, local)
            for piece, parts in zip(bucket, shards, strict=True):
                joined = RULES[piece.entry.rule].join(parts, _cut_of(model, rank=0))
                yield from zip(piece.entry.hf, joined, strict=True)


def _buckets(pieces: list[_Piece], itemsize: int) -> Iterator[list[_Piece]]:
    bucket: list[_Piece] = []
    size = 0
    for piece in pieces:
        bytes_ = piece.shape.numel() * itemsize
        if bucket and size + bytes_ > _BUCKET_BYTES:
            yield bucket
            bucket, size = [], 0
        bucket.append(piece)
        size += bytes_
    if bucket:
        yield bucket


def _gather_bucket(model: Model, bucket: list[_Piece], stage: int, local: Mapping[str, Tensor]) -> list[list[Tensor]]:
    """For each piece, its shards of all tensor ranks, on every rank of the pipeline."""
    groups = model.groups
    tensor, total = groups.layout.tensor, sum(piece.shape.numel() for piece in bucket)
    flat = torch.empty(tensor, total, dtype=model.dtype, device=model.device)
    if groups.stage == stage:
        mine = torch.cat([local[piece.entry.megatron].reshape(-1) for piece in bucket])
        if tensor == 1:
            flat[0] = mine
        else:
            dist.all_gather(list(flat.unbind()), mine, group=groups.pg.tp)
    if groups.layout.pipeline > 1:
        dist.broadcast(flat, src=dist.get_global_rank(groups.pg.pp, stage), group=groups.pg.pp)
    sizes = [piece.shape.numel() for piece in bucket]
    columns = flat.split(sizes, dim=1)
    return [
        [shard.view(piece.shape) for shard in column.unbind()] for piece, column in zip(bucket, columns, strict=True)
    ]


@torch.no_grad()
def load_stream(model: Model, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Fills this rank's parameters from a stream of whole HF-named tensors, holding only what is not yet complete.

    Raises:
        CheckpointError: the stream ended before every parameter was filled, or a shape is wrong.
    """
    waiting: dict[str, list[tuple[Entry, Tensor]]] = {}
    for entry, parameter in local_table(model):
        for name in entry.hf:
            waiting.setdefault(name, []).append((entry, parameter))
    cut = _cut_of(model)
    held: dict[str, Tensor] = {}
    filled: set[str] = set()
    for name, tensor in tensors:
        if name not in waiting:
            continue
        held[name] = tensor
        for entry, parameter in waiting[name]:
            if all(part in held for part in entry.hf):
                _fill(entry, parameter, [held[part] for part in entry.hf], cut)
                filled.update(entry.hf)
        # a tensor is let go once all that it is part of has been filled
        for part in [part for part in held if part in filled]:
            del held[part]
    missing = sorted(set(waiting) - filled)
    if missing:
        raise CheckpointError(f"the weight stream ended without {missing[0]!r} ({len(missing)} tensors missing).")
