"""Rows of packs carried between two layouts over the same ranks: directly, from rank to rank, without padding, to
whoever computes on them. The layouts need nothing in common.

One layout is the student's, whose replica r trains on ``packs[r]``; any other (a teacher's) has all packs of the batch
dealt to its replicas in turn. Where both agree every pack is worked on by the same ranks and nothing travels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.engine.context import valid_positions
from megatron_tropd.parallel.groups import Groups
from megatron_tropd.types import Int64Array, Pack

Key = tuple[int, int]  # (student replica, number) of a pack
Wire = list[Tensor]  # tensors with one row per prediction, in the pack's order


@dataclass(frozen=True, slots=True)
class Workers:
    """The last-stage ranks of one layout, and which of its replicas works on which pack."""

    groups: Groups
    dealt: bool  # all packs are dealt to the replicas in turn; else replica r works on packs[r]

    def replica(self, packs: Sequence[Sequence[Pack]], key: Key) -> int:
        """The replica that works on pack ``key``."""
        replica, number = key
        return (number * len(packs) + replica) % self.groups.num_replicas if self.dealt else replica

    def mine(self, packs: Sequence[Sequence[Pack]]) -> list[Key]:
        """The packs this rank's replica works on."""
        return [key for key in _keys(packs) if self.replica(packs, key) == self.groups.replica]

    def rank(self, replica: int, *, tensor: int, context: int) -> int:
        """World rank on the last stage."""
        layout = self.groups.layout
        return self.groups.global_rank(replica=replica, stage=layout.pipeline - 1, tensor=tensor, context=context)


def _keys(packs: Sequence[Sequence[Pack]]) -> list[Key]:
    """Every pack of the batch, by number and then by replica; all replicas have the same number of packs."""
    return [(replica, number) for number in range(len(packs[0])) for replica in range(len(packs))]


@dataclass(frozen=True, slots=True)
class _Parcel:
    """Rows of one pack that go from one rank to another."""

    key: Key
    source: int  # world rank
    target: int
    held: Int64Array  # the rows, among those the source computes
    wanted: Int64Array  # the same rows, among those the target computes


def _parcels(packs: Sequence[Sequence[Pack]], source: Workers, target: Workers) -> Iterator[_Parcel]:
    """Everything that is to be carried, in one order on every rank.

    Tensor ranks have the same rows and get them from one each, themselves where they can; context ranks have different
    ones.
    """
    for key in _keys(packs):
        pack = packs[key[0]][key[1]]
        from_replica, to_replica = source.replica(packs, key), target.replica(packs, key)
        has = _rows_by_context(pack, source.groups)
        for context, needed in enumerate(_rows_by_context(pack, target.groups)):
            for source_context, rows in enumerate(has):
                _, held, wanted = np.intersect1d(rows, needed, assume_unique=True, return_indices=True)
                holders = [
                    source.rank(from_replica, tensor=tensor, context=source_context)
                    for tensor in range(source.groups.layout.tensor)
                ]
                for tensor in range(target.groups.layout.tensor):
                    to = target.rank(to_replica, tensor=tensor, context=context)
                    giver = to if to in holders else holders[tensor % len(holders)]
                    yield _Parcel(key=key, source=giver, target=to, held=held, wanted=wanted)


def _rows_by_context(pack: Pack, groups: Groups) -> list[Int64Array]:
    ranks = groups.layout.context
    return [valid_positions(pack, rank=rank, ranks=ranks) for rank in range(ranks)]


def carry(
    packs: Sequence[Sequence[Pack]],
    held: Mapping[Key, Wire],
    *,
    source: Workers,
    target: Workers,
    blank: Callable[[int], Wire],
) -> dict[Key, Wire]:
    """What this rank needs under the layout ``target``, by pack; empty off its last stage. Collective.

    Args:
        held: what this rank has under the layout ``source``; every pack it works on, on last-stage ranks.
        blank: tensors of the kinds that are held, uninitialised, with so many rows.
    """
    me = dist.get_rank()
    received: dict[Key, list[tuple[Int64Array, Wire]]] = {}
    operations: list[dist.P2POp] = []
    for parcel in _parcels(packs, source, target):
        if me not in (parcel.source, parcel.target):
            continue
        wire = _rows(held[parcel.key], parcel.held) if me == parcel.source else blank(len(parcel.held))
        if me == parcel.target:
            received.setdefault(parcel.key, []).append((parcel.wanted, wire))
        if len(parcel.held) and parcel.source != parcel.target:
            send, peer = (dist.isend, parcel.target) if me == parcel.source else (dist.irecv, parcel.source)
            operations += [dist.P2POp(send, part.contiguous(), peer) for part in wire]
    if operations:
        for request in dist.batch_isend_irecv(operations):
            request.wait()
    return {key: _joined(parts) for key, parts in received.items()}


def _rows(wire: Wire, rows: Int64Array) -> Wire:
    if len(rows) == len(wire[0]):
        return wire
    return [part[torch.from_numpy(rows).to(part.device)] for part in wire]


def _joined(parts: Sequence[tuple[Int64Array, Wire]]) -> Wire:
    """The rows of all parcels of a pack in the pack's order."""
    if len(parts) == 1:
        return parts[0][1]
    order = torch.from_numpy(np.argsort(np.concatenate([rows for rows, _ in parts]), kind="stable"))
    return [torch.cat(column)[order.to(column[0].device)] for column in zip(*(wire for _, wire in parts), strict=True)]
