"""What every teacher must do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

from torch import Tensor

from megatron_tropd.types import Needs, Pack, TeacherOutputs

PendingScores = Callable[[], list[TeacherOutputs | None]]  # waits for them; to be called once
QueryIds = Sequence[Tensor | None]  # int64 ids [N, J] of each of this rank's packs; None where it computes no loss


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRequest:
    """What to ask of the teacher for each valid prediction, besides the log-prob of the target."""

    top_k: int = 0
    queries: int = 0  # ids that the caller names, for their log-probs
    entropy: bool = True
    entropy_needed: bool = False  # exactly, and not for a metric alone
    entropy_bound: bool = False  # an upper bound of it, from the top k, where the teacher does not know it exactly
    hidden_states: bool = False
    base: bool = False  # also a base model's log-prob of the target
    tail_mass: bool = False  # also the mass outside the top k, the ids asked for and the target

    @property
    def has_tail(self) -> bool:
        """Whether there are tails in the signal."""
        return self.tail_mass and self.top_k + self.queries > 0

    def bytes_per_row(self, *, hidden_bytes: int) -> int:
        """Size of the signal of one prediction on its way to the student; ``hidden_bytes``: of one hidden state."""
        values = 1 + self.base + self.entropy + self.entropy_bound + self.has_tail + self.top_k + self.queries
        return 4 * (values + self.top_k) + hidden_bytes * self.hidden_states

    @property
    def query_bytes_per_row(self) -> int:
        """Size of the ids of one prediction on their way to the teacher."""
        return 4 * self.queries

    @staticmethod
    def of(needs: Needs) -> TeacherRequest:
        """What a method with these needs asks for."""
        return TeacherRequest(
            top_k=needs.top_k if needs.support != "student" else 0,
            queries=needs.top_k if needs.support in ("student", "union") else 0,
            entropy_needed=needs.teacher_entropy,
            hidden_states=needs.hidden_states,
            base=needs.base_model,
            tail_mass=needs.tail_mass,
        )


class Teacher(Protocol):
    """Scores packs. Collective: every rank calls with the same packs."""

    def score(
        self, packs: Sequence[Sequence[Pack]], spec: TeacherRequest, asked: QueryIds | None = None
    ) -> list[TeacherOutputs | None]:
        """Signals for this rank's own replica of the student.

        Args:
            packs: ``packs[r]`` are the packs student replica ``r`` trains on.
            asked: the ``spec.queries`` ids of each prediction whose log-probs are wanted, the same on tensor ranks.

        Returns:
            One TeacherOutputs per pack of this rank's replica; None on ranks that do not compute the loss.
        """
        ...

    def close(self) -> None:
        """Lets go of what the teacher holds besides memory, such as an engine or connections."""
        ...


@runtime_checkable
class AsyncTeacher(Teacher, Protocol):
    """A teacher that may grade packs while those who asked do something else."""

    def begin(
        self, packs: Sequence[Sequence[Pack]], spec: TeacherRequest, asked: QueryIds | None = None
    ) -> PendingScores:
        """As ``score``, for signals that are waited for later, in the order in which they were asked for."""
        ...


def start_scoring(
    teacher: Teacher, packs: Sequence[Sequence[Pack]], spec: TeacherRequest, asked: QueryIds | None = None
) -> PendingScores:
    """Has the packs graded: at once where that keeps nobody waiting, else when the signals are asked for."""
    if isinstance(teacher, AsyncTeacher):
        return teacher.begin(packs, spec, asked)
    return partial(teacher.score, packs, spec, asked)
