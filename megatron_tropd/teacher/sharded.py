"""What teachers with a layout of their own share: packs dealt to their replicas, signals carried to the student's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_tropd.errors import EngineError
from megatron_tropd.parallel.partition import PointToPoint
from megatron_tropd.teacher.protocol import PendingScores, QueryIds, TeacherRequest
from megatron_tropd.teacher.transfer import Key, ReplicaMap, Wire, carry
from megatron_tropd.types import Pack, TeacherOutputs


@dataclass(frozen=True, slots=True)
class HiddenKind:
    """What the hidden states of a teacher are made of."""

    size: int
    dtype: torch.dtype


class ShardedTeacher(ABC):
    """Implements ``teacher.protocol.Teacher`` for a subclass that grades packs.

    All packs of the batch are dealt to the teacher's replicas. Ids that are asked for travel to the ranks that score
    their pack, and signals to the ranks that compute the loss on it: the two layouts need nothing in common.
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
        """``own``: who grades; ``student``: whom signals are delivered to; ``post``: who carries them (default:
        both are the same world, which does)."""
        self._own = own
        self._student = student
        self._device = device
        self._hidden = hidden
        self._post = post or PointToPoint()

    def score(
        self, packs: Sequence[Sequence[Pack]], spec: TeacherRequest, asked: QueryIds | None = None
    ) -> list[TeacherOutputs | None]:
        return self._begin(packs, spec, asked)()

    def close(self) -> None:
        """Lets go of what the teacher holds besides memory."""
        return None

    @abstractmethod
    def _score_assigned(
        self, packs: Sequence[Sequence[Pack]], spec: TeacherRequest, asked: Mapping[Key, Tensor]
    ) -> dict[Key, Wire]:
        """Signals of the packs dealt to this replica, ready to travel (``to_wire``); nothing off the last stage."""

    def _begin(self, packs: Sequence[Sequence[Pack]], spec: TeacherRequest, asked: QueryIds | None) -> PendingScores:
        """Grades what is dealt to this rank; what it is told by others is waited for when the result is called."""
        delivered = self._deliver(packs, spec, asked)
        here = self._own.groups is not None
        wires = self._score_assigned(packs, spec, self._as_ids(delivered())) if here else {}
        source, target = self._own, self._student
        collect = carry(
            packs, wires, source=source, target=target, blank=lambda rows: self._blank(rows, spec), post=self._post
        )

        def signals() -> list[TeacherOutputs | None]:
            if not here:
                delivered()  # what was asked has been heard
            found, mine = collect(), target.mine(packs)
            if not target.compute:
                return [None] * len(mine)
            answered = asked if asked is not None and spec.queries else [None] * len(mine)
            return [
                replace(_from_wire(self._on_device(found[key]), spec), query_ids_NJ=ids)
                for key, ids in zip(mine, answered, strict=True)
            ]

        return signals

    def _deliver(
        self, packs: Sequence[Sequence[Pack]], spec: TeacherRequest, asked: QueryIds | None
    ) -> Callable[[], dict[Key, Wire]]:
        """Sends the ids asked for to the ranks whose last stage scores their packs."""
        if not spec.queries:
            return dict
        student = self._student
        held: dict[Key, Wire] = {}
        for key, ids_NJ in zip(student.mine(packs), asked or (), strict=False):
            if ids_NJ is not None:
                held[key] = [ids_NJ.to(torch.int32)]
        if student.compute and len(held) < len(student.mine(packs)):
            raise EngineError(f"the teacher is to grade {spec.queries} ids of the student's, but was not told which.")

        def blank(rows: int) -> Wire:
            return [torch.empty(rows, spec.queries, dtype=torch.int32, device=self._post.receives_on(self._device))]

        return carry(packs, held, source=student, target=self._own, blank=blank, post=self._post)

    def _blank(self, rows: int, spec: TeacherRequest) -> Wire:
        device = self._post.receives_on(self._device)
        wire = [torch.empty(rows, sum(_columns(spec).values()), device=device)]
        if spec.top_k:
            wire.append(torch.empty(rows, spec.top_k, dtype=torch.int32, device=device))
        if spec.hidden_states:
            assert self._hidden is not None  # inputs.check_teacher sees to it
            wire.append(torch.empty(rows, self._hidden.size, dtype=self._hidden.dtype, device=device))
        return wire

    def _on_device(self, wire: Wire) -> Wire:
        return [part.to(self._device) for part in wire]

    def _as_ids(self, found: Mapping[Key, Wire]) -> dict[Key, Tensor]:
        return {key: self._on_device(wire)[0].long() for key, wire in found.items()}


def check_finite(signal: TeacherOutputs, *, role: str = "teacher") -> None:
    """The teacher's door: a bad number is stopped here, before it can hide behind a mask.

    Raises:
        EngineError: a log-prob or entropy is not finite, or a log-prob is positive beyond rounding.
    """
    fields = {
        "log-prob": signal.logprob_N,
        "top-k log-prob": signal.topk_logprob_NK,
        "log-prob of an id asked for": signal.query_logprob_NJ,
        "entropy": signal.entropy_N,
        "bound on the entropy": signal.entropy_bound_N,
        "hidden state": signal.hidden_NE,
        # an empty tail is -inf
        "log tail": None if signal.topk_logtail_N is None else signal.topk_logtail_N.clamp(min=-1.0),
    }
    for name, values in fields.items():
        if values is not None and not bool(torch.isfinite(values).all()):
            raise EngineError(
                f"the {role} gave a {name} that is not finite. Its weights or dtype are broken: try dtype=fp32, "
                "or check the checkpoint with `tropd check`."
            )


def _columns(spec: TeacherRequest) -> dict[str, int]:
    """Fields of a TeacherOutputs that travel as columns of one fp32 tensor, and how many each has."""
    widths = {
        "logprob_N": 1,
        "entropy_N": int(spec.entropy),
        "entropy_bound_N": int(spec.entropy_bound),
        "topk_logtail_N": int(spec.has_tail),
        "topk_logprob_NK": spec.top_k,
        "query_logprob_NJ": spec.queries,
    }
    return {name: width for name, width in widths.items() if width}


def to_wire(signal: TeacherOutputs, spec: TeacherRequest) -> Wire:
    """One fp32 tensor of values and, when there are any, ids as int32 and hidden states as they are."""
    values = [getattr(signal, name) for name in _columns(spec)]
    wire = [torch.cat([value if value.dim() == 2 else value[:, None] for value in values], dim=1)]
    if signal.topk_ids_NK is not None:
        wire.append(signal.topk_ids_NK.to(torch.int32))
    if signal.hidden_NE is not None:
        wire.append(signal.hidden_NE)
    return wire


def _from_wire(wire: Wire, spec: TeacherRequest) -> TeacherOutputs:
    columns = _columns(spec)
    values = dict(zip(columns, wire[0].split(list(columns.values()), dim=1), strict=True))
    return TeacherOutputs(
        **{name: value if name.endswith(("K", "J")) else value[:, 0] for name, value in values.items()},
        topk_ids_NK=wire[1].long() if spec.top_k else None,
        hidden_NE=wire[-1] if spec.hidden_states else None,
    )
