"""Weights between a laid-out Megatron model and Hugging Face names, in both directions, in bounded memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_tropd.convert.hf import check_weights
from megatron_tropd.convert.lazy import WeightsSource
from megatron_tropd.engine.adapters import is_adapter, updates_of
from megatron_tropd.engine.lora import LowRankUpdate
from megatron_tropd.engine.model import Model, padded_vocab_size
from megatron_tropd.errors import CheckpointError
from megatron_tropd.models.family import Entry
from megatron_tropd.models.name_table import entries, hf_shapes
from megatron_tropd.models.rules import RULES, Shape, TensorShard, fill, joined_rows
from megatron_tropd.progress.phases import Phase

Watch = Callable[[list[tuple[Entry, Tensor]]], Iterable[tuple[Entry, Tensor]]]
# what is gathered at once, over all ranks that hold a part
_BUCKET_BYTES = 16 << 20


def _cut_of(model: Model, *, rank: int | None = None) -> TensorShard:
    layout, groups = model.groups.layout, model.groups
    return TensorShard(
        model.architecture,
        groups.tensor_rank if rank is None else rank,
        layout.tensor,
        padded_vocab_size(model.architecture.vocab_size, layout.tensor),
    )


# --------------------------------------------------------------------------- who holds what


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One chunk of the model: the pipeline stage it is on and what it is made of."""

    stage: int
    table: list[Entry]  # with the experts of all expert-parallel ranks


def _chunks(model: Model) -> list[_Chunk]:
    """List every chunk of the model in layer order, the same on every rank, without communication."""
    layout, config, found = model.groups.layout, model.config, []
    for chunk in range(layout.virtual_pipeline):
        virtual = chunk if layout.virtual_pipeline > 1 else None
        for stage in range(layout.pipeline):
            first = get_transformer_layer_offset(config, virtual, pp_rank=stage)
            table = entries(
                model.architecture,
                range(first, first + get_num_layers_to_build(config, virtual, pp_rank=stage)),
                embedding=stage == 0 and chunk == 0,
                output=stage == layout.pipeline - 1 and chunk == layout.virtual_pipeline - 1,
            )
            found.append(_Chunk(stage, table))
    return found


def local_table(model: Model) -> list[tuple[Entry, Tensor]]:
    """List every table entry this rank holds, with its parameter. Adapters are in no entry."""
    model.finish_pending_gathers()
    tables = [chunk.table for chunk in _chunks(model) if chunk.stage == model.groups.stage]
    found = []
    for chunk, offset, table in zip(model.chunks, model.layer_offsets(), tables, strict=True):
        experts = model.local_experts()
        mine = [entry for entry in table if entry.expert is None or entry.expert in experts]
        parameters = {
            _global_name(name, offset, experts.start): parameter
            for name, parameter in chunk.named_parameters()
            if not is_adapter(name)
        }
        unknown = set(parameters) - {entry.megatron for entry in mine}
        if unknown:
            raise CheckpointError(f"parameters without a name in the conversion table: {sorted(unknown)}.")
        found += [(entry, parameters[entry.megatron]) for entry in mine]
    return found


def _global_name(name: str, first_layer: int, first_expert: int) -> str:
    """Translate a name: Megatron counts layers from the chunk's first, experts from the rank's; the table over the
    model.
    """
    parts = name.split(".")
    for kind, first in (("layers", first_layer), ("local_experts", first_expert)):
        if kind in parts:
            number = parts.index(kind) + 1
            parts[number] = str(int(parts[number]) + first)
    return ".".join(parts)


# --------------------------------------------------------------------------- into the model


@torch.no_grad()
def load_weights(model: Model, source: WeightsSource, *, watch: Watch = iter) -> None:
    """Fill this rank's parameters from tensors on disk, reading only this rank's slices.

    ``watch`` passes the parameters on as they are filled: a progress bar.

    Raises:
        CheckpointError: a tensor is missing, quantized, of another shape than ``config.json`` promises, or of a layer
            that it does not describe. Found before the first parameter is filled.
    """
    check_weights(source, model.architecture)
    cut = _cut_of(model)
    table = local_table(model)
    with Phase(f"loading {source.directory}", total=len(table)) as phase:
        for entry, parameter in phase.watch(watch(table)):
            fill(entry.rule, parameter, {part: source[name] for part, name in enumerate(entry.hf)}, entry.shapes, cut)


@torch.no_grad()
def load_stream(model: Model, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Fill this rank's parameters from a stream of whole HF-named tensors in any order, holding none of them.

    Raises:
        CheckpointError: the stream ended before every parameter was filled, or a shape is wrong.
    """
    waiting: dict[str, list[tuple[Entry, int, Tensor]]] = defaultdict(list)
    for entry, parameter in local_table(model):
        for part, name in enumerate(entry.hf):
            waiting[name].append((entry, part, parameter))
    cut = _cut_of(model)
    for name, tensor in tensors:
        for entry, part, parameter in waiting.pop(name, ()):
            if tuple(tensor.shape) != entry.shapes[part]:
                raise CheckpointError(
                    f"the weight stream brought {name} of shape {list(tensor.shape)}, "
                    f"but the model needs {list(entry.shapes[part])}."
                )
            fill(entry.rule, parameter, {part: tensor}, entry.shapes, cut)
    if waiting:
        raise CheckpointError(f"the weight stream ended without {min(waiting)!r} ({len(waiting)} tensors missing).")


# --------------------------------------------------------------------------- out of the model


@dataclass(frozen=True, slots=True)
class _Piece:
    """Parameters gathered together: one, or the experts that stand at the same place on every expert-parallel rank."""

    entries: tuple[Entry, ...]
    shard: Shape  # of the parameter on each rank

    @property
    def spread(self) -> bool:
        return len(self.entries) > 1


@dataclass(frozen=True, slots=True)
class _Rows:
    """Some rows of a piece: large pieces are gathered a few rows at a time."""

    piece: _Piece
    first: int
    count: int

    @property
    def shape(self) -> Shape:
        return (self.count, *self.piece.shard[1:])


@dataclass(frozen=True, slots=True)
class _Held:
    """A parameter of this rank, and the adapter beside it."""

    weight: Tensor
    update: LowRankUpdate | None

    def rows(self, first: int, count: int) -> Tensor:
        rows = slice(first, first + count)
        return self.weight[rows] if self.update is None else self.update.merged(self.weight, rows)


def hf_rows(model: Model, *, skip: Collection[str] = ()) -> Iterator[tuple[str, int, Tensor]]:
    """Yield ``(HF name, first row, rows)`` until every row of every tensor has come once, on every rank, in a fixed
    order and the model's dtype. The rows are lost when the next are drawn: copy what is to be kept. Of a model with
    adapters they are those of the merged weights (``LowRankUpdate.merged``), which are made a few rows at a time.

    Shards are gathered over tensor ranks, experts over expert ranks too, and handed from the pipeline stage that holds
    them to the others, 16 MiB at a time, whatever the size of a tensor. Collective: every rank must run the iterator
    to its end.

    Args:
        skip: names that need not come, the same on every rank. Others of the same parameter still may.
    """
    updates = {} if model.base_only else {update.linear.weight: update for update in updates_of(model)}
    local = {entry.megatron: _Held(p.detach(), updates.get(entry.megatron)) for entry, p in local_table(model)}
    buffer = torch.empty(0, dtype=model.dtype, device=model.device)
    tensor, cut = model.groups.layout.tensor, _cut_of(model)
    for chunk in _without_repeats(_chunks(model)):
        for bucket in _buckets(_pieces(model, chunk.table, set(skip)), model):
            if buffer.numel() < (needed := _numel(bucket) * _holders(model, bucket).size()):
                buffer = torch.empty(needed, dtype=model.dtype, device=model.device)
            for rows, shards in zip(bucket, _gather(model, bucket, chunk.stage, local, buffer), strict=True):
                for number, entry in enumerate(rows.piece.entries):
                    own = shards[number * tensor : (number + 1) * tensor]
                    for part, first, found in joined_rows(entry.rule, own, rows.first, entry.shapes, cut):
                        yield entry.hf[part], first, found


def hf_tensors(model: Model, *, skip: Collection[str] = ()) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(HF name, whole tensor)``: what ``hf_rows`` brings, put together. Collective.

    Beyond the rows under way a rank holds the tensors of one parameter, or those of one expert from each expert rank.
    """
    shapes = hf_shapes(model.architecture)
    whole: dict[str, Tensor] = {}
    missing: dict[str, int] = {}
    for name, first, rows in hf_rows(model, skip=skip):
        if name not in whole:
            whole[name], missing[name] = rows.new_empty(shapes[name]), shapes[name][0]
        whole[name][first : first + len(rows)].copy_(rows)
        missing[name] -= len(rows)
        if not missing[name]:
            yield name, whole.pop(name)


def _without_repeats(chunks: list[_Chunk]) -> Iterator[_Chunk]:
    """Drop the embedding that a tied model's last stage repeats."""
    seen: set[str] = set()
    for one in chunks:
        yield _Chunk(one.stage, [entry for entry in one.table if not seen & set(entry.hf)])
        seen.update(name for entry in one.table for name in entry.hf)


def _pieces(model: Model, table: list[Entry], skip: set[str]) -> Iterator[_Piece]:
    """Yield dense parameters one by one, then the experts of each layer."""
    ranks = model.groups.layout.expert
    per_rank = model.architecture.num_experts // ranks
    together: dict[tuple[int | None, int, str], list[Entry]] = defaultdict(list)
    for number, entry in enumerate(table):
        # entries of one rank are separate; so are the matrices of an expert
        key = (None, number, "") if entry.expert is None else (entry.layer, entry.expert % per_rank, entry.rule)
        together[key].append(entry)
    cut = _cut_of(model)
    for group in together.values():
        if not skip.issuperset(name for entry in group for name in entry.hf):
            yield _Piece(tuple(group), RULES[group[0].rule].shard_shape(group[0].shapes, cut))


def _buckets(pieces: Iterable[_Piece], model: Model) -> Iterator[list[_Rows]]:
    bucket: list[_Rows] = []
    size = 0
    for piece in pieces:
        row_bytes = torch.Size(piece.shard[1:]).numel() * model.dtype.itemsize
        row_bytes *= model.groups.layout.tensor * len(piece.entries)
        step = max(_BUCKET_BYTES // max(row_bytes, 1), 1)
        for first in range(0, piece.shard[0], step):
            rows = _Rows(piece, first, min(step, piece.shard[0] - first))
            added = rows.count * row_bytes
            if bucket and (size + added > _BUCKET_BYTES or piece.spread != bucket[0].piece.spread):
                yield bucket
                bucket, size = [], 0
            bucket.append(rows)
            size += added
    if bucket:
        yield bucket


def _numel(bucket: list[_Rows]) -> int:
    """Return the number of elements that each holder has of a bucket."""
    return sum(torch.Size(rows.shape).numel() for rows in bucket)


def _holders(model: Model, bucket: list[_Rows]) -> dist.ProcessGroup:
    return model.groups.pg.tp_ep if bucket[0].piece.spread else model.groups.pg.tp


def _gather(
    model: Model, bucket: list[_Rows], stage: int, local: Mapping[str, _Held], buffer: Tensor
) -> list[list[Tensor]]:
    """Gather each of the bucket's rows from all holders, by expert and tensor rank, on every rank of the pipeline.

    They are views of ``buffer``: one that is used over and over, or the C library keeps much of what it is given back.
    """
    groups, group = model.groups, _holders(model, bucket)
    sizes = [torch.Size(rows.shape).numel() for rows in bucket]
    flat = buffer[: group.size() * sum(sizes)]
    if groups.stage == stage:
        own = flat.view(group.size(), -1)
        torch.cat([_local_rows(rows, local).reshape(-1) for rows in bucket], out=own[group.rank()])
        # not an all-gather: gloo's keeps 100 MB of buffers to itself
        holders = dist.get_process_group_ranks(group)
        for work in [dist.broadcast(*to, group=group, async_op=True) for to in zip(own, holders, strict=True)]:
            work.wait()
    if groups.layout.pipeline > 1:
        dist.broadcast(flat, src=dist.get_global_rank(groups.pg.pp, stage), group=groups.pg.pp)
    columns = flat.view(group.size(), -1).split(sizes, dim=1)
    return [[shard.view(rows.shape) for shard in column.unbind()] for rows, column in zip(bucket, columns, strict=True)]


def _local_rows(rows: _Rows, local: Mapping[str, _Held]) -> Tensor:
    mine = next(local[entry.megatron] for entry in rows.piece.entries if entry.megatron in local)
    return mine.rows(rows.first, rows.count)
