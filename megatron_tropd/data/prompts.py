"""Prompt files (JSON lines) and the order in which training walks through them."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_tropd.data.tokenizer import Message, Tokenizer
from megatron_tropd.errors import ConfigError, DataError, TokenizerError
from megatron_tropd.types import Int64Array, Prompt

logger = logging.getLogger(__name__)

OnBadRow = Literal["error", "skip"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Names of the columns. GSM8K files: ``Columns(prompt="question", answer="answer", response="answer")``."""

    prompt: str = "prompt"  # text
    messages: str = "messages"  # chat messages; read where a row has no prompt column
    response: str = "response"  # optional: one response of the teacher, used for guidance
    answer: str = "answer"  # optional: reference for grading, text or number


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """What a reading gave: prompts in file order, and what was left out."""

    prompts: tuple[Prompt, ...]
    too_long: tuple[int, ...] = ()  # row numbers beyond max_prompt_tokens
    bad_rows: tuple[str, ...] = ()  # "file:line: reason", only with on_bad_row="skip"


class _BadRow(Exception):
    """Why one row cannot be used; the reader adds file and line."""


def read_prompts(
    paths: str | Path | Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    columns: Columns = Columns(),
    max_prompt_tokens: int | None = None,
    require_response: bool = False,
    on_bad_row: OnBadRow = "error",
) -> PromptSet:
    """Reads, checks and tokenizes one or more JSON-lines files.

    ``Prompt.index`` is the row's line number from 0, counted through all files, so it does not change when rows are
    filtered. ``Prompt.response_ids`` ends in ``tokenizer.eos_ids[0]``. Blank lines are ignored.

    Args:
        max_prompt_tokens: rows whose rendered prompt is longer are left out (and counted), not cut.
        require_response: rows without a response are bad; set when training is guided by teacher prefixes.
        on_bad_row: "error" stops at the first bad row, "skip" leaves bad rows out and logs how many.

    Raises:
        DataError: a file is missing, a row is bad, or no row is left. The message has file, line and reason.
    """
    if on_bad_row not in ("error", "skip"):
        raise ConfigError(f"on_bad_row is {on_bad_row!r}: use 'error' or 'skip'.")
    files = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
    prompts: list[Prompt] = []
    too_long: list[int] = []
    bad: list[str] = []
    for index, place, line in _lines(files):
        try:
            prompt = _parse_row(index, line, tokenizer, columns, require_response)
        except _BadRow as reason:
            if on_bad_row == "error":
                raise DataError(f"{place}: {reason} Fix the row, or set on_bad_row to 'skip'.") from reason.__cause__
            bad.append(f"{place}: {reason}")
            continue
        if max_prompt_tokens is not None and len(prompt.token_ids) > max_prompt_tokens:
            too_long.append(index)
        else:
            prompts.append(prompt)
    _report_left_out(files, kept=len(prompts), too_long=too_long, bad=bad, limit=max_prompt_tokens)
    return PromptSet(prompts=tuple(prompts), too_long=tuple(too_long), bad_rows=tuple(bad))


def _lines(files: Sequence[Path]) -> Iterator[tuple[int, str, bytes]]:
    """(row number over all files, "file:line", content) of every line that is not blank."""
    index = 0
    for file in files:
        if not file.is_file():
            raise DataError(f"prompt file {file} does not exist or is not a file: give a JSON-lines file.")
        with file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield index, f"{file}:{number}", line
                index += 1


def _report_left_out(
    files: Sequence[Path], *, kept: int, too_long: list[int], bad: list[str], limit: int | None
) -> None:
    names = ", ".join(map(str, files))
    long = f"{len(too_long)} longer than {limit} tokens, " if too_long else ""
    summary = f"{long}{len(bad)} bad" + "".join(f"\n  {row}" for row in bad[:3])
    if not kept:
        raise DataError(f"no usable prompt in {names}: {summary}. Check the column names and length limits.")
    if too_long or bad:
        logger.warning("%s: kept %d prompts, left out %s", names, kept, summary)


# --------------------------------------------------------------------------- one row


def _parse_row(index: int, line: bytes, tokenizer: Tokenizer, columns: Columns, require_response: bool) -> Prompt:
    row = _parse_json(line)
    prompt = _prompt_of(row, columns)
    answer = row.get(columns.answer)
    if isinstance(answer, bool) or not isinstance(answer, str | int | float | None):
        raise _BadRow(f"column {columns.answer!r} holds {type(answer).__name__}, expected text or a number.")
    return Prompt(
        index=index,
        token_ids=_encoded(tokenizer.render_prompt, prompt),
        text=prompt if isinstance(prompt, str) else "\n".join(message["content"] for message in prompt),
        answer=None if answer is None else str(answer),
        response_ids=_response_of(row, tokenizer, columns, require_response),
    )


def _parse_json(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:  # of the JSON or of the UTF-8
        raise _BadRow(f"not valid JSON: {error}.") from error
    if not isinstance(row, dict):
        raise _BadRow(f"holds {type(row).__name__}, expected a JSON object with a prompt.")
    return row


def _prompt_of(row: dict[str, Any], columns: Columns) -> str | list[Message]:
    prompt = row.get(columns.prompt)
    if prompt is None:
        prompt = row.get(columns.messages)
    if prompt is None:
        raise _BadRow(f"has neither {columns.prompt!r} nor {columns.messages!r}, only {sorted(row)}.")
    if isinstance(prompt, str):
        if not prompt.strip():
            raise _BadRow(f"column {columns.prompt!r} is empty.")
        return prompt
    if isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt):
        return prompt
    raise _BadRow(
        f"prompt holds {str(prompt)[:80]!r}, expected text or a list of messages with text 'role' and 'content'."
    )


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _response_of(row: dict[str, Any], tokenizer: Tokenizer, columns: Columns, required: bool) -> Int64Array | None:
    response = row.get(columns.response)
    if response is None and not required:
        return None
    if not isinstance(response, str) or not response:
        raise _BadRow(f"column {columns.response!r} holds {str(response)[:80]!r}, expected text that is not empty.")
    ids = _encoded(tokenizer.encode, response)
    if ids.size and ids[-1] in tokenizer.eos_ids:  # some files keep the end token in the text
        return ids
    return np.append(ids, np.int64(tokenizer.eos_ids[0]))


def _encoded(encode: Any, prompt: str | list[Message]) -> Int64Array:
    try:
        return np.asarray(encode(prompt), dtype=np.int64)
    except TokenizerError as error:
        raise _BadRow(f"{error}") from error


# --------------------------------------------------------------------------- order of training


@dataclass(frozen=True, slots=True)
class PromptStream:
    """An endless shuffled walk through the prompts; every epoch visits each prompt once, in an order of its own.

    ``batch`` is a pure function of (seed, step), so there is no position to save: a run resumes from its step number
    alone. That holds as long as prompts, seed and batch size stay the same over the run.
    """

    prompts: Sequence[Prompt]
    seed: int
    shuffle: bool = True

    def __post_init__(self) -> None:
        if not self.prompts:
            raise DataError("a prompt stream needs at least one prompt, got none.")
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed is {self.seed}: give an integer in 0..2^64-1.")

    def batch(self, step: int, size: int) -> list[Prompt]:
        """Prompts of training step ``step`` (from 0). A batch may span the end of one epoch and the next one's start.

        ``size`` may exceed the number of prompts; then prompts repeat within the batch.
        """
        if step < 0 or size < 1:
            raise ValueError(f"step {step} must be >= 0 and size {size} >= 1.")
        places = range(step * size, (step + 1) * size)
        return [self.prompts[self._row(place)] for place in places]

    def epoch(self, step: int, size: int) -> float:
        """Epochs completed before ``step``; a whole number when an epoch has just ended."""
        return step * size / len(self.prompts)

    def _row(self, place: int) -> int:
        epoch, offset = divmod(place, len(self.prompts))
        return int(_order(self.seed, epoch, len(self.prompts))[offset]) if self.shuffle else offset


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> Int64Array:
    """A permutation of 0..count-1: the ranks of raw Philox words.

    Sorting the words of the bit generator, rather than calling ``Generator.permutation``, keeps the order the same
    over numpy versions: only bit streams are promised not to change.
    """
    words = np.random.Philox(key=np.array([seed, epoch], dtype=np.uint64)).random_raw(count)
    order = np.argsort(words, kind="stable")
    order.setflags(write=False)
    return order
