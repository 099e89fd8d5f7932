"""Share what teachers with a layout of their own do: assign packs to replicas, carry outputs to the student's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from megatron_tropd.errors import EngineError
from megatron_tropd.parallel.partition import PointToPoint
from megatron_tropd.teacher.protocol import PendingScores, QueryIds, TeacherRequest
from megatron_tropd.teacher.transfer import Key, ReplicaMap, Wire, carry
from megatron_tropd.teacher.wire import HiddenKind, blank_wire, from_wire
from megatron_tropd.types import Pack, TeacherOutputs


class ShardedTeacher(ABC):
    """Implement ``teacher.protocol.Teacher`` for a subclass that scores packs.

    All packs of the batch are assigned to the teacher's replicas, round robin. Query ids travel to the ranks that score
    their pack, and outputs to the ranks that compute the loss on it: the two layouts need nothing in common.
    """

    def __init__(
        self,
        own: ReplicaMap,
        student: ReplicaMap,
        device: torch.device,
        hidden: HiddenKind | None = None,
        *,
        post: PointToPoint | None = None,
    ) -> None:
        """Take ``own``: who scores; ``student``: whom outputs are delivered to; ``post``: who carries them (default:
        both are the same world, which does)."""
        self._own = own
        self._student = student
        self._device = device
        self._hidden = hidden
        self._post = post or PointToPoint()

    def score(
        self, packs: Sequence[Sequence[Pack]], request: TeacherRequest, query_ids: QueryIds | None = None
    ) -> list[TeacherOutputs | None]:
        return self._start(packs, request, query_ids)()

    def close(self) -> None:
        """Release what the teacher holds besides memory."""
        return None

    @abstractmethod
    def _score_assigned(
        self, packs: Sequence[Sequence[Pack]], request: TeacherRequest, query_ids: Mapping[Key, Tensor]
    ) -> dict[Key, Wire]:
        """Score the packs assigned to this replica, ready to travel (``to_wire``); nothing off the last stage."""

    def _start(
        self, packs: Sequence[Sequence[Pack]], request: TeacherRequest, query_ids: QueryIds | None
    ) -> PendingScores:
        """Score what is assigned to this rank; what others send it is waited for when the result is called."""
        delivered = self._deliver(packs, request, query_ids)
        here = self._own.groups is not None
        wires = self._score_assigned(packs, request, self._as_ids(delivered())) if here else {}
        source, target = self._own, self._student
        collect = carry(
            packs, wires, source=source, target=target, blank=lambda rows: self._blank(rows, request), post=self._post
        )

        def outputs() -> list[TeacherOutputs | None]:
            if not here:
                delivered()  # the query ids have been sent
            found, mine = collect(), target.mine(packs)
            if not target.compute:
                return [None] * len(mine)
            queried = query_ids if query_ids is not None and request.queries else [None] * len(mine)
            return [
                replace(from_wire(self._on_device(found[key]), request), query_ids_NJ=ids)
                for key, ids in zip(mine, queried, strict=True)
            ]

        return outputs

    def _deliver(
        self, packs: Sequence[Sequence[Pack]], request: TeacherRequest, query_ids: QueryIds | None
    ) -> Callable[[], dict[Key, Wire]]:
        """Send the query ids to the ranks whose last stage scores their packs."""
        if not request.queries:
            return dict
        student = self._student
        held: dict[Key, Wire] = {}
        for key, ids_NJ in zip(student.mine(packs), query_ids or (), strict=False):
            if ids_NJ is not None:
                held[key] = [ids_NJ.to(torch.int32)]
        if student.compute and len(held) < len(student.mine(packs)):
            raise EngineError(f"the teacher is to score {request.queries} ids of the student's, but none were given.")

        def blank(rows: int) -> Wire:
            return [torch.empty(rows, request.queries, dtype=torch.int32, device=self._post.receives_on(self._device))]

        return carry(packs, held, source=student, target=self._own, blank=blank, post=self._post)

    def _blank(self, rows: int, request: TeacherRequest) -> Wire:
        return blank_wire(rows, request, self._hidden, self._post.receives_on(self._device))

    def _on_device(self, wire: Wire) -> Wire:
        return [part.to(self._device) for part in wire]

    def _as_ids(self, found: Mapping[Key, Wire]) -> dict[Key, Tensor]:
        return {key: self._on_device(wire)[0].long() for key, wire in found.items()}
