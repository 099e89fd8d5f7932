"""The protocol of a teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

from torch import Tensor

from megatron_tropd.teacher.schema import TeacherRequest
from megatron_tropd.types import Pack, TeacherOutputs

__all__ = ["AsyncTeacher", "PendingScores", "QueryIds", "Teacher", "TeacherRequest", "start_scoring"]

PendingScores = Callable[[], list[TeacherOutputs | None]]  # waits for them; to be called once
QueryIds = Sequence[Tensor | None]  # int64 ids [N, J] of each of this rank's packs; None where it computes no loss


class Teacher(Protocol):
    """Score packs. Collective: every rank calls with the same packs."""

    def score(
        self, packs: Sequence[Sequence[Pack]], request: TeacherRequest, query_ids: QueryIds | None = None
    ) -> list[TeacherOutputs | None]:
        """Score every pack for the replica of the student that trains on it.

        Args:
            packs: ``packs[r]`` are the packs student replica ``r`` trains on.
            query_ids: the ``request.queries`` ids of each prediction whose log-probs are requested, the same on tensor
                ranks.

        Returns:
            One TeacherOutputs per pack of this rank's replica; None on ranks that do not compute the loss.
        """
        ...

    def close(self) -> None:
        """Release what the teacher holds besides memory, such as an engine or connections."""
        ...


@runtime_checkable
class AsyncTeacher(Teacher, Protocol):
    """Score packs while the caller does something else."""

    def start(
        self, packs: Sequence[Sequence[Pack]], request: TeacherRequest, query_ids: QueryIds | None = None
    ) -> PendingScores:
        """Start scoring as ``score`` does; outputs are to be waited for in the order in which they were requested."""
        ...


def start_scoring(
    teacher: Teacher, packs: Sequence[Sequence[Pack]], request: TeacherRequest, query_ids: QueryIds | None = None
) -> PendingScores:
    """Have the packs scored: at once where that keeps nobody waiting, else when the outputs are waited for."""
    if isinstance(teacher, AsyncTeacher):
        return teacher.start(packs, request, query_ids)
    return partial(teacher.score, packs, request, query_ids)
