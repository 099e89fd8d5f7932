"""A base model beside the teacher: what a method like ExOPD measures the teacher's progress against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from megatron_tropd.teacher.protocol import PendingScores, QueryIds, Teacher, TeacherRequest, start_scoring
from megatron_tropd.types import Pack, TeacherOutputs


class TeacherWithBase:
    """Implements ``teacher.protocol.Teacher``: a teacher's signals with a base model's log-probs of the same tokens.

    The base model is asked as a teacher would be, for the target alone, and has a layout of its own.
    """

    def __init__(self, teacher: Teacher, base: Teacher) -> None:
        self._teacher = teacher
        self._base = base

    def score(
        self, packs: Sequence[Sequence[Pack]], spec: TeacherRequest, asked: QueryIds | None = None
    ) -> list[TeacherOutputs | None]:
        return self.begin(packs, spec, asked)()

    def begin(
        self, packs: Sequence[Sequence[Pack]], spec: TeacherRequest, asked: QueryIds | None = None
    ) -> PendingScores:
        """As ``score``; the base model grades when the signals are asked for."""
        pending = start_scoring(self._teacher, packs, spec, asked)

        def signals() -> list[TeacherOutputs | None]:
            found = pending()
            if not spec.base:
                return found
            graded = self._base.score(packs, TeacherRequest(entropy=False))
            return [_with_base(*pair) for pair in zip(found, graded, strict=True)]

        return signals

    def close(self) -> None:
        self._teacher.close()
        self._base.close()


def _with_base(signal: TeacherOutputs | None, base: TeacherOutputs | None) -> TeacherOutputs | None:
    return None if signal is None or base is None else replace(signal, base_logprob_N=base.logprob_N)
