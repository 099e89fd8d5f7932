"""Several teachers, each for the packs of its own sequences: those of the data sources that name it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megatron_tropd.teacher.protocol import QueryIds, Teacher, TeacherRequest
from megatron_tropd.types import Pack, TeacherOutputs


class RoutedTeacher:
    """Implements ``teacher.protocol.Teacher``: asks the teacher that a pack names, and no other.

    A teacher without a pack in the batch does nothing.
    """

    def __init__(self, teachers: Mapping[str, Teacher]) -> None:
        """``teachers``: by name; the empty one is that of packs that name none."""
        self._teachers = dict(teachers)

    def score(
        self, packs: Sequence[Sequence[Pack]], spec: TeacherRequest, asked: QueryIds | None = None
    ) -> list[TeacherOutputs | None]:
        names = [pack.teacher for pack in packs[0]]  # pack by pack the same in every replica: build.pack_for
        found: list[TeacherOutputs | None] = [None] * len(names)
        for name in dict.fromkeys(names):
            numbers = [number for number, own in enumerate(names) if own == name]
            signals = self._teachers[name].score(
                [[replica[number] for number in numbers] for replica in packs],
                spec,
                None if asked is None else [asked[number] for number in numbers],
            )
            for number, signal in zip(numbers, signals, strict=True):
                found[number] = signal
        return found

    def close(self) -> None:
        """Lets all of them go."""
        for teacher in self._teachers.values():
            teacher.close()
