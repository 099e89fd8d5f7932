"""Rows of packs carried between two layouts, over the same ranks or over two parts of a launch: directly, from rank to
rank, without padding, to whoever computes on them. The layouts need nothing in common.

One layout is the student's, whose replica r trains on ``packs[r]``; any other (a teacher's) has all packs of the batch
assigned to its replicas, round robin. Where both agree every pack is worked on by the same ranks and nothing travels.
Rows are known by their number among the valid predictions of the pack, which is the same in the pack that the teacher
reads behind prompts of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_tropd.config.sections import Layout
from megatron_tropd.engine.context import valid_positions
from megatron_tropd.parallel.groups import Groups
from megatron_tropd.parallel.partition import PointToPoint, Transfer
from megatron_tropd.types import Int64Array, Pack

Key = tuple[int, int]  # (student replica, number) of a pack
Wire = list[Tensor]  # tensors with one row per prediction, in the pack's order


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaMap:
    """The last-stage ranks of one layout, and which of its replicas works on which pack."""

    layout: Layout
    num_replicas: int
    round_robin: bool  # a teacher's: all packs are assigned to the replicas in turn, and it reads those with its own
    #                    prompts; else replica r works on packs[r]
    groups: Groups | None  # None where they are ranks of a launch that this one is not among
    first_rank: int = 0  # the number of their first rank, as senders give it

    @staticmethod
    def local(groups: Groups, *, round_robin: bool, first_rank: int = 0) -> ReplicaMap:
        """Map this rank and the others of its world."""
        return ReplicaMap(
            layout=groups.layout,
            num_replicas=groups.num_replicas,
            round_robin=round_robin,
            groups=groups,
            first_rank=first_rank,
        )

    @staticmethod
    def remote(layout: Layout, *, ranks: int, round_robin: bool, first_rank: int = 0) -> ReplicaMap:
        """Map the ``ranks`` of another part of the launch."""
        replicas = layout.data_size(ranks)
        return ReplicaMap(
            layout=layout, num_replicas=replicas, round_robin=round_robin, groups=None, first_rank=first_rank
        )

    @property
    def compute(self) -> bool:
        """Say whether this rank is one of them, on the last stage."""
        return self.groups is not None and self.groups.is_last_stage

    def replica(self, packs: Sequence[Sequence[Pack]], key: Key) -> int:
        """Return the replica that works on pack ``key``."""
        replica, number = key
        return (number * len(packs) + replica) % self.num_replicas if self.round_robin else replica

    def reads(self, pack: Pack) -> Pack:
        """Return the pack that this layout computes: the teacher's own prompts are the teacher's alone."""
        return pack.scored if self.round_robin else pack

    def mine(self, packs: Sequence[Sequence[Pack]]) -> list[Key]:
        """List the packs this rank's replica works on; none where it is not one of them."""
        if self.groups is None:
            return []
        return [key for key in _keys(packs) if self.replica(packs, key) == self.groups.replica]

    def rank(self, replica: int, *, tensor: int, context: int) -> int:
        """Return the number of a rank on the last stage, as senders give it."""
        at = {"replica": replica, "replicas": self.num_replicas, "stage": self.layout.pipeline - 1}
        return self.first_rank + self.layout.rank_at(**at, tensor=tensor, context=context)


def _keys(packs: Sequence[Sequence[Pack]]) -> list[Key]:
    """List every pack of the batch, by number and then by replica; all replicas have the same number of packs."""
    return [(replica, number) for number in range(len(packs[0])) for replica in range(len(packs))]


@dataclass(frozen=True, slots=True)
class _Parcel:
    """Rows of one pack that go from one rank to another."""

    key: Key
    source: int  # number of the rank, as senders give it
    target: int
    held: Int64Array  # the rows, among those the source computes
    wanted: Int64Array  # the same rows, among those the target computes


def _parcels(packs: Sequence[Sequence[Pack]], source: ReplicaMap, target: ReplicaMap) -> Iterator[_Parcel]:
    """Yield everything that is to be carried, in one order on every rank.

    Tensor ranks have the same rows and get them from one each, themselves where they can; context ranks have different
    ones.
    """
    for key in _keys(packs):
        pack = packs[key[0]][key[1]]
        from_replica, to_replica = source.replica(packs, key), target.replica(packs, key)
        has = _rows_by_context(source.reads(pack), source.layout)
        for context, needed in enumerate(_rows_by_context(target.reads(pack), target.layout)):
            for source_context, rows in enumerate(has):
                _, held, wanted = np.intersect1d(rows, needed, assume_unique=True, return_indices=True)
                holders = [
                    source.rank(from_replica, tensor=tensor, context=source_context)
                    for tensor in range(source.layout.tensor)
                ]
                for tensor in range(target.layout.tensor):
                    to = target.rank(to_replica, tensor=tensor, context=context)
                    giver = to if to in holders else holders[tensor % len(holders)]
                    yield _Parcel(key=key, source=giver, target=to, held=held, wanted=wanted)


def _rows_by_context(pack: Pack, layout: Layout) -> list[Int64Array]:
    """Number the valid predictions that each context rank computes, as the whole pack counts them."""
    ranks, every = layout.context, valid_positions(pack)
    return [np.searchsorted(every, valid_positions(pack, rank=rank, ranks=ranks)) for rank in range(ranks)]


def carry(
    packs: Sequence[Sequence[Pack]],
    held: Mapping[Key, Wire],
    *,
    source: ReplicaMap,
    target: ReplicaMap,
    blank: Callable[[int], Wire],
    post: PointToPoint,
) -> Callable[[], dict[Key, Wire]]:
    """Start to carry what ``target`` needs. Collective over both.

    Args:
        held: what this rank has under the layout ``source``; every pack it works on, on last-stage ranks.
        blank: tensors of the kinds that are held, uninitialized, with so many rows.

    Returns:
        What waits until all has been sent and received, and then gives what this rank needs under the layout
        ``target``, by pack; empty off its last stage.
    """
    me = post.rank
    received: dict[Key, list[tuple[Int64Array, Wire]]] = {}
    messages: list[Transfer] = []
    for parcel in _parcels(packs, source, target):
        if me not in (parcel.source, parcel.target):
            continue
        sent = me == parcel.source
        wire = _rows(held[parcel.key], parcel.held) if sent else blank(len(parcel.held))
        if me == parcel.target:
            received.setdefault(parcel.key, []).append((parcel.wanted, wire))
        if len(parcel.held) and parcel.source != parcel.target:
            peer = parcel.target if sent else parcel.source
            messages += [Transfer(part.contiguous(), peer, sent) for part in wire]
    wait = post.exchange(messages)

    def collect() -> dict[Key, Wire]:
        wait()
        return {key: _joined(parts) for key, parts in received.items()}

    return collect


def _rows(wire: Wire, rows: Int64Array) -> Wire:
    if len(rows) == len(wire[0]):
        return wire
    return [part[torch.from_numpy(rows).to(part.device)] for part in wire]


def _joined(parts: Sequence[tuple[Int64Array, Wire]]) -> Wire:
    """Join the rows of all parcels of a pack in the pack's order."""
    if len(parts) == 1:
        return parts[0][1]
    order = torch.from_numpy(np.argsort(np.concatenate([rows for rows, _ in parts]), kind="stable"))
    return [torch.cat(column)[order.to(column[0].device)] for column in zip(*(wire for _, wire in parts), strict=True)]
