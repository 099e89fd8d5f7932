"""Many tokenized prompts in flat arrays: a million rows are a few objects, and become ``Prompt`` when read."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np
import numpy.typing as npt

from megatron_tropd.types import Int64Array, Prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The origin of a prompt: its source, and the teacher that scores it (empty: the only one)."""

    source: str = ""
    teacher: str = ""


class Ragged:
    """Sequences of numbers of different lengths, end to end in one array."""

    def __init__(self, typecode: str) -> None:
        self._values: Any = array(typecode)  # an array of the standard library while it grows, of NumPy once mapped
        self._ends: Any = array("q", [0])

    @classmethod
    def of(cls, values: npt.NDArray[Any], ends: Int64Array) -> Ragged:
        """View ``values`` without a copy; sequence ``i`` lies from ``ends[i]`` to ``ends[i + 1]``."""
        ragged = cls("b")
        ragged._values, ragged._ends = values, ends
        return ragged

    def parts(self) -> tuple[npt.NDArray[Any], Int64Array]:
        """View the values of all sequences, and the ``[N + 1]`` places between them."""
        ends = np.asarray(self._ends)
        return np.asarray(self._values), ends

    def append(self, values: Iterable[int]) -> None:
        self._values.extend(values)
        self._ends.append(len(self._values))

    def append_bytes(self, content: bytes) -> None:
        self._values.frombytes(content)
        self._ends.append(len(self._values))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> npt.NDArray[Any]:
        return np.array(self._values[self._ends[i] : self._ends[i + 1]])

    def lengths(self) -> Int64Array:
        """Return the ``[N]`` length of every sequence."""
        _, ends = self.parts()
        return ends[1:] - ends[:-1]

    def maxima(self) -> Int64Array:
        """Return the ``[N]`` largest number of every sequence, -1 for an empty one."""
        lengths = self.lengths()
        largest = np.full(len(lengths), -1, dtype=np.int64)
        some = lengths > 0
        if some.any():
            values, ends = self.parts()
            largest[some] = np.maximum.reduceat(values, ends[:-1][some])
        return largest

    def feed(self, digest: hashlib._Hash) -> None:
        """Add content and boundaries to a digest."""
        values, ends = self.parts()
        digest.update(ends.data)
        digest.update(values.data)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts())


Column: TypeAlias = Ragged | npt.NDArray[Any]


class PromptTable(Sequence[Prompt]):
    """Prompts in reading order. Rows are added once, by ``data.prompts``; to everyone else a table is a sequence."""

    def __init__(self) -> None:
        self.left_out = 0  # rows of the files that are not in the table: too long, or bad and skipped
        self._token_ids, self._response_ids, self._teacher_ids = Ragged("i"), Ragged("i"), Ragged("i")
        self._text, self._answer = Ragged("B"), Ragged("B")
        self._has_answer: Any = bytearray()
        self._finished: Any = bytearray()
        self._index: Any = array("q")
        self._line: Any = array("q")
        self._file: Any = array("i")
        self._origin: Any = array("i")
        self.files: list[str] = []
        self.origins: list[Origin] = []

    @classmethod
    def of_columns(
        cls, columns: Mapping[str, Column], *, files: Sequence[str], origins: Sequence[Origin], left_out: int
    ) -> PromptTable:
        """View what ``columns`` gave, without a copy. Nothing is added."""
        table = cls()
        for name, column in columns.items():
            setattr(table, f"_{name}", column)
        table.files, table.origins, table.left_out = list(files), list(origins), left_out
        return table

    def columns(self) -> dict[str, Column]:
        """View the columns by name, ``[N]`` or ragged; nothing may be added while a view is held."""
        flat = {"has_answer": self._has_answer, "finished": self._finished}
        numbers = {"index": self._index, "line": self._line, "file": self._file, "origin": self._origin}
        return {
            "token_ids": self._token_ids,
            "response_ids": self._response_ids,
            "teacher_ids": self._teacher_ids,
            "text": self._text,
            "answer": self._answer,
            **{name: _bytes_of(column) for name, column in flat.items()},
            **{name: np.asarray(column) for name, column in numbers.items()},
        }

    def add(self, prompt: Prompt, *, file: str | Path, line: int) -> None:
        """Append a row; ``file`` and ``line`` are where it was read."""
        self._token_ids.append(prompt.token_ids.tolist())
        self._response_ids.append(() if prompt.response_ids is None else prompt.response_ids.tolist())
        self._teacher_ids.append(() if prompt.teacher_ids is None else prompt.teacher_ids.tolist())
        self._text.append_bytes(_encode(prompt.text))
        self._answer.append_bytes(_encode(prompt.answer or ""))
        self._has_answer.append(prompt.answer is not None)
        self._finished.append(prompt.response_finished)
        self._index.append(prompt.index)
        self._line.append(line)
        self._file.append(_number_of(self.files, str(file)))
        self._origin.append(_number_of(self.origins, Origin(source=prompt.source, teacher=prompt.teacher)))

    def __len__(self) -> int:
        return len(self._index)

    @overload
    def __getitem__(self, i: int) -> Prompt: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[Prompt]: ...
    def __getitem__(self, i: int | slice) -> Prompt | Sequence[Prompt]:
        if isinstance(i, slice):
            return tuple(self[row] for row in range(*i.indices(len(self))))
        row = range(len(self))[i]
        response, own, origin = self._response_ids[row], self._teacher_ids[row], self.origins[self._origin[row]]
        return Prompt(
            index=int(self._index[row]),
            token_ids=self._token_ids[row].astype(np.int64),
            text=_decode(self._text[row]),
            answer=_decode(self._answer[row]) if self._has_answer[row] else None,
            response_ids=response.astype(np.int64) if len(response) else None,
            response_finished=bool(self._finished[row]),
            source=origin.source,
            teacher=origin.teacher,
            teacher_ids=own.astype(np.int64) if len(own) else None,
        )

    def place(self, row: int) -> str:
        """Name the ``file:line`` of a row."""
        return f"{self.files[self._file[row]]}:{self._line[row]}"

    def sources(self) -> dict[str, Int64Array]:
        """Return the rows of every source, in the order in which sources were read."""
        origin_N = np.asarray(self._origin)
        return {origin.source: np.flatnonzero(origin_N == i) for i, origin in enumerate(self.origins)}

    def prompt_lengths(self) -> Int64Array:
        """Count the ``[N]`` tokens of every prompt."""
        return self._token_ids.lengths()

    def response_lengths(self) -> Int64Array:
        """Count the ``[N]`` tokens of every response, 0 where there is none."""
        return self._response_ids.lengths()

    def teacher_prompt_lengths(self) -> Int64Array:
        """Count the ``[N]`` tokens of every prompt as the teacher reads it."""
        own_N = self._teacher_ids.lengths()
        return np.where(own_N > 0, own_N, self.prompt_lengths())

    def with_own_teacher_prompt(self) -> Int64Array:
        """List the rows whose prompt is another for the teacher than for the student."""
        return np.flatnonzero(self._teacher_ids.lengths())

    def row_of_index(self) -> dict[int, int]:
        """Map ``Prompt.index`` to the row that has it."""
        return {int(index): row for row, index in enumerate(self._index)}

    def answered(self) -> npt.NDArray[np.bool_]:
        """Say, ``[N]``, whether a row has a reference answer."""
        return _bytes_of(self._has_answer).view(np.bool_)

    def largest_ids(self) -> Int64Array:
        """Return the ``[N]`` largest token id of every row's prompts and response."""
        return np.maximum.reduce([part.maxima() for part in (self._token_ids, self._response_ids, self._teacher_ids)])

    def fingerprint(self) -> str:
        """Hash (SHA-256, hex) all that training sees of the prompts, in their order."""
        digest = hashlib.sha256()
        for part in (self._token_ids, self._response_ids, self._answer):
            part.feed(digest)
        if len(self.with_own_teacher_prompt()):
            self._teacher_ids.feed(digest)
        digest.update(repr([(o.source, o.teacher) for o in self.origins]).encode() + self._origin.tobytes())
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """Count the bytes of the arrays."""
        ragged = (self._token_ids, self._response_ids, self._teacher_ids, self._text, self._answer)
        return sum(part.nbytes for part in ragged) + len(self) * (1 + 1 + 8 + 8 + 4 + 4)


def table_of(prompts: Iterable[Prompt]) -> PromptTable:
    """Build a table of prompts that were not read from a file."""
    table = PromptTable()
    for number, prompt in enumerate(prompts, start=1):
        table.add(prompt, file="memory", line=number)
    return table


def _number_of(known: list[Any], item: Any) -> int:
    if not known or known[-1] != item:  # rows of one file and source follow each other
        if item in known:
            return known.index(item)
        known.append(item)
    return len(known) - 1


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _decode(content: npt.NDArray[np.uint8]) -> str:
    return content.tobytes().decode("utf-8", "surrogatepass")


def _bytes_of(column: Any) -> npt.NDArray[np.uint8]:
    return np.frombuffer(column, dtype=np.uint8) if len(column) else np.empty(0, np.uint8)
