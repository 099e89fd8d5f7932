"""Teachers made of teachers: one per data source, or one with a base model beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from megatron_tropd.teacher.protocol import PendingScores, QueryIds, Teacher, TeacherRequest, start_scoring
from megatron_tropd.types import Pack, TeacherOutputs


class RoutedTeacher:
    """Implement ``teacher.protocol.Teacher`` with the teacher that each pack names, and no other.

    A teacher without a pack in the batch does nothing.
    """

    def __init__(self, teachers: Mapping[str, Teacher]) -> None:
        """Take ``teachers`` by name; the empty one is that of packs that name none."""
        self._teachers = dict(teachers)

    def score(
        self, packs: Sequence[Sequence[Pack]], request: TeacherRequest, query_ids: QueryIds | None = None
    ) -> list[TeacherOutputs | None]:
        names = [pack.teacher for pack in packs[0]]  # pack by pack the same in every replica: build.pack_for
        found: list[TeacherOutputs | None] = [None] * len(names)
        for name in dict.fromkeys(names):
            numbers = [number for number, own in enumerate(names) if own == name]
            outputs = self._teachers[name].score(
                [[replica[number] for number in numbers] for replica in packs],
                request,
                None if query_ids is None else [query_ids[number] for number in numbers],
            )
            for number, output in zip(numbers, outputs, strict=True):
                found[number] = output
        return found

    def close(self) -> None:
        """Close all of them."""
        for teacher in self._teachers.values():
            teacher.close()


class TeacherWithBase:
    """Implement ``teacher.protocol.Teacher``: a teacher's outputs with a base model's log-probs of the same tokens.

    The base model is what a method like ExOPD measures the teacher's progress against. It scores as a teacher would,
    the target alone, behind the student's prompts, and has a layout of its own.
    """

    def __init__(self, teacher: Teacher, base: Teacher) -> None:
        self._teacher = teacher
        self._base = base

    def score(
        self, packs: Sequence[Sequence[Pack]], request: TeacherRequest, query_ids: QueryIds | None = None
    ) -> list[TeacherOutputs | None]:
        return self.start(packs, request, query_ids)()

    def start(
        self, packs: Sequence[Sequence[Pack]], request: TeacherRequest, query_ids: QueryIds | None = None
    ) -> PendingScores:
        """Start as ``score``; the base model scores when the outputs are waited for."""
        pending = start_scoring(self._teacher, packs, request, query_ids)

        def outputs() -> list[TeacherOutputs | None]:
            found = pending()
            if not request.base:
                return found
            # it is a reference for the student, and reads what the student reads
            read = [[replace(pack, teacher_pack=None) for pack in replica] for replica in packs]
            base = self._base.score(read, TeacherRequest(entropy=False, end_ids=request.end_ids))
            return [_with_base(*pair) for pair in zip(found, base, strict=True)]

        return outputs

    def close(self) -> None:
        self._teacher.close()
        self._base.close()


def _with_base(outputs: TeacherOutputs | None, base: TeacherOutputs | None) -> TeacherOutputs | None:
    if outputs is None or base is None:
        return None
    return replace(outputs, base_logprob_N=base.logprob_N, base_end_logprob_NX=base.end_logprob_NX)
