"""Many tokenized prompts in flat arrays: a million rows are a few objects, and become ``Prompt`` when read."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

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
        self._values = array(typecode)
        self._ends = array("q", [0])

    def append(self, values: Iterable[int]) -> None:
        self._values.extend(values)
        self._ends.append(len(self._values))

    def append_bytes(self, content: bytes) -> None:
        self._values.frombytes(content)
        self._ends.append(len(self._values))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> array[int]:
        return self._values[self._ends[i] : self._ends[i + 1]]

    def lengths(self) -> Int64Array:
        """Return the ``[N]`` length of every sequence."""
        ends = np.frombuffer(self._ends, dtype=np.int64)
        return ends[1:] - ends[:-1]

    def maxima(self) -> Int64Array:
        """Return the ``[N]`` largest number of every sequence, -1 for an empty one."""
        lengths = self.lengths()
        largest = np.full(len(lengths), -1, dtype=np.int64)
        some = lengths > 0
        if some.any():
            values = np.frombuffer(self._values, dtype=self._values.typecode)
            starts = np.frombuffer(self._ends, dtype=np.int64)[:-1]
            largest[some] = np.maximum.reduceat(values, starts[some])
        return largest

    def feed(self, digest: hashlib._Hash) -> None:
        """Add content and boundaries to a digest."""
        digest.update(memoryview(self._ends))
        digest.update(memoryview(self._values))

    @property
    def nbytes(self) -> int:
        return (len(self._values) * self._values.itemsize) + len(self._ends) * self._ends.itemsize


class PromptTable(Sequence[Prompt]):
    """Prompts in reading order. Rows are added once, by ``data.prompts``; to everyone else a table is a sequence."""

    def __init__(self) -> None:
        self.left_out = 0  # rows of the files that are not in the table: too long, or bad and skipped
        self._token_ids, self._response_ids = Ragged("i"), Ragged("i")
        self._text, self._answer = Ragged("B"), Ragged("B")
        self._has_answer, self._finished = bytearray(), bytearray()
        self._index, self._line = array("q"), array("q")
        self._file, self._origin = array("i"), array("i")
        self._files: list[str] = []
        self._origins: list[Origin] = []

    def add(self, prompt: Prompt, *, file: str | Path, line: int) -> None:
        """Append a row; ``file`` and ``line`` are where it was read."""
        self._token_ids.append(prompt.token_ids.tolist())
        self._response_ids.append(() if prompt.response_ids is None else prompt.response_ids.tolist())
        self._text.append_bytes(_encode(prompt.text))
        self._answer.append_bytes(_encode(prompt.answer or ""))
        self._has_answer.append(prompt.answer is not None)
        self._finished.append(prompt.response_finished)
        self._index.append(prompt.index)
        self._line.append(line)
        self._file.append(_number_of(self._files, str(file)))
        self._origin.append(_number_of(self._origins, Origin(source=prompt.source, teacher=prompt.teacher)))

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
        response, origin = self._response_ids[row], self._origins[self._origin[row]]
        return Prompt(
            index=self._index[row],
            token_ids=np.array(self._token_ids[row], dtype=np.int64),
            text=_decode(self._text[row]),
            answer=_decode(self._answer[row]) if self._has_answer[row] else None,
            response_ids=np.array(response, dtype=np.int64) if response else None,
            response_finished=bool(self._finished[row]),
            source=origin.source,
            teacher=origin.teacher,
        )

    def place(self, row: int) -> str:
        """Name the ``file:line`` of a row."""
        return f"{self._files[self._file[row]]}:{self._line[row]}"

    def sources(self) -> dict[str, Int64Array]:
        """Return the rows of every source, in the order in which sources were read."""
        origin_N = np.frombuffer(self._origin, dtype=np.int32) if len(self) else np.empty(0, np.int32)
        return {origin.source: np.flatnonzero(origin_N == i) for i, origin in enumerate(self._origins)}

    def prompt_lengths(self) -> Int64Array:
        """Count the ``[N]`` tokens of every prompt."""
        return self._token_ids.lengths()

    def response_lengths(self) -> Int64Array:
        """Count the ``[N]`` tokens of every response, 0 where there is none."""
        return self._response_ids.lengths()

    def answered(self) -> npt.NDArray[np.bool_]:
        """Say, ``[N]``, whether a row has a reference answer."""
        return np.frombuffer(self._has_answer, dtype=np.bool_) if len(self) else np.empty(0, np.bool_)

    def largest_ids(self) -> Int64Array:
        """Return the ``[N]`` largest token id of every row's prompt and response."""
        return np.maximum(self._token_ids.maxima(), self._response_ids.maxima())

    def fingerprint(self) -> str:
        """Hash (SHA-256, hex) all that training sees of the prompts, in their order."""
        digest = hashlib.sha256()
        for part in (self._token_ids, self._response_ids, self._answer):
            part.feed(digest)
        digest.update(repr([(o.source, o.teacher) for o in self._origins]).encode() + self._origin.tobytes())
        return digest.hexdigest()

    @property
    def nbytes(self) -> int:
        """Count the bytes of the arrays."""
        ragged = (self._token_ids, self._response_ids, self._text, self._answer)
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


def _decode(content: array[int]) -> str:
    return content.tobytes().decode("utf-8", "surrogatepass")
