"""Rows of data files become tokenized prompts, each with its reference answer and one response, where it has them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_tropd.data.files import BadRow, RawRow, column_of, find_files, read_rows
from megatron_tropd.data.table import PromptTable
from megatron_tropd.data.templates import RowTemplate, row_template
from megatron_tropd.data.tokenizer import Message, Tokenizer
from megatron_tropd.errors import ConfigError, DataError, TokenizerError
from megatron_tropd.types import Int64Array, Prompt

logger = logging.getLogger(__name__)

OnBadRow = Literal["error", "skip"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Names of the columns, ``a.b`` for a field. GSM8K: ``Columns(prompt="question", response="answer")``."""

    prompt: str = "prompt"  # text, or chat messages
    messages: str = "messages"  # chat messages; read where a row has no prompt column
    response: str = "response"  # optional: one response of the teacher, used for guidance
    answer: str = "answer"  # optional: reference for grading, text or number


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where prompts come from and how a row becomes one."""

    paths: tuple[Path, ...]  # files, globs and directories
    name: str = ""
    teacher: str = ""  # who grades it; empty where there is only one teacher
    columns: Columns = Columns()
    template: str | None = (
        None  # Jinja over the row's columns, ``{{ prompt }}`` the prompt column; None: the prompt alone
    )
    answer_template: str | None = None  # the same for the reference answer
    system: str | None = None  # system message of every conversation that has none


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Which rows to leave out. Rows that are too long are left out and counted, never cut."""

    max_prompt_tokens: int | None = None
    max_response_tokens: int | None = None  # of the response column, end token included
    max_rows: int | None = None  # usable rows of every source
    require_response: bool = False  # rows without a response are bad


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """What a reading gave: prompts in file order, and what was left out."""

    prompts: PromptTable
    too_long: tuple[int, ...] = ()  # row numbers beyond a limit
    bad_rows: tuple[str, ...] = ()  # "file:line: reason", only with on_bad_row="skip"


def read_prompts(
    paths: str | Path | Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    columns: Columns = Columns(),
    max_prompt_tokens: int | None = None,
    require_response: bool = False,
    on_bad_row: OnBadRow = "error",
) -> PromptSet:
    """``read_sources`` for a single unnamed source."""
    given = (paths,) if isinstance(paths, str | Path) else paths
    source = Source(paths=tuple(Path(path) for path in given), columns=columns)
    limits = Limits(max_prompt_tokens=max_prompt_tokens, require_response=require_response)
    return read_sources([source], tokenizer, limits=limits, on_bad_row=on_bad_row)


def read_sources(
    sources: Sequence[Source], tokenizer: Tokenizer, *, limits: Limits = Limits(), on_bad_row: OnBadRow = "error"
) -> PromptSet:
    """Reads, checks and tokenizes every row of every source.

    ``Prompt.index`` is the row's number from 0 (the line of a text file, blank ones included), counted through all
    files of all sources, so it does not change when rows are filtered. ``Prompt.response_ids`` ends in
    ``tokenizer.eos_ids[0]``. A conversation that ends in an assistant message is a prompt with that response, unless
    the row has a response column.

    Args:
        on_bad_row: "error" stops at the first bad row, "skip" leaves bad rows out and logs how many.

    Raises:
        DataError: a file is missing or torn, a row is bad, or a source has no row left. The message has file, line
            and reason.
        ConfigError: a template is not valid.
    """
    if on_bad_row not in ("error", "skip"):
        raise ConfigError(f"on_bad_row is {on_bad_row!r}: use 'error' or 'skip'.")
    reading = _Reading(limits=limits, on_bad_row=on_bad_row)
    for source in sources:
        reading.read(source, tokenizer)
    return PromptSet(prompts=reading.table, too_long=tuple(reading.too_long), bad_rows=tuple(reading.bad))


@dataclass(slots=True, kw_only=True)
class _Reading:
    """The state of one pass over the files."""

    limits: Limits
    on_bad_row: OnBadRow
    table: PromptTable = field(default_factory=PromptTable)
    too_long: list[int] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    rows_before: int = 0  # of the files already read

    def read(self, source: Source, tokenizer: Tokenizer) -> None:
        files, parser = find_files(source.paths), _RowParser(source, tokenizer, self.limits.require_response)
        kept, too_long, bad = len(self.table), len(self.too_long), len(self.bad)
        most = self.limits.max_rows
        with closing(self._rows(files, parser)) as rows:
            for file, row in rows:
                self._take(file, row, parser)
                if most is not None and len(self.table) - kept == most:
                    break
        _report_left_out(
            source.name or ", ".join(map(str, files)),
            kept=len(self.table) - kept,
            too_long=len(self.too_long) - too_long,
            bad=self.bad[bad:],
            limits=self.limits,
        )

    def _rows(self, files: Sequence[Path], parser: _RowParser) -> Generator[tuple[Path, RawRow], None, None]:
        for file in files:
            number = 0
            try:
                for row in read_rows(file, columns=parser.columns, one_of=parser.one_of):
                    number = row.number
                    yield file, row
            finally:  # also when a source has enough rows: those of the next one have numbers of their own
                self.rows_before += number

    def _take(self, file: Path, row: RawRow, parser: _RowParser) -> None:
        index = self.rows_before + row.number - 1
        try:
            if isinstance(row.content, BadRow):
                raise row.content
            prompt = parser.prompt(index, row.content)
        except BadRow as reason:
            place = f"{file}:{row.number}"
            if self.on_bad_row == "error":
                raise DataError(f"{place}: {reason} Fix the row, or set on_bad_row to 'skip'.") from None
            self.bad.append(f"{place}: {reason}")
            return
        if _is_too_long(prompt, self.limits):
            self.too_long.append(index)
        else:
            self.table.add(prompt, file=file, line=row.number)


def _is_too_long(prompt: Prompt, limits: Limits) -> bool:
    response = 0 if prompt.response_ids is None else len(prompt.response_ids)
    return any(
        most is not None and length > most
        for length, most in ((len(prompt.token_ids), limits.max_prompt_tokens), (response, limits.max_response_tokens))
    )


def _report_left_out(what: str, *, kept: int, too_long: int, bad: Sequence[str], limits: Limits) -> None:
    allowed = f"{limits.max_prompt_tokens} tokens"
    if limits.max_response_tokens is not None:
        allowed += f" of prompt or {limits.max_response_tokens} of response"
    long = f"{too_long} longer than {allowed}, " if too_long else ""
    summary = f"{long}{len(bad)} bad" + "".join(f"\n  {row}" for row in bad[:3])
    if not kept:
        raise DataError(f"no usable prompt in {what}: {summary}. Check the column names and length limits.")
    if too_long or bad:
        logger.warning("%s: kept %d prompts, left out %s", what, kept, summary)


# --------------------------------------------------------------------------- one row


class _RowParser:
    """Turns rows of one source into prompts. Its methods raise BadRow."""

    def __init__(self, source: Source, tokenizer: Tokenizer, require_response: bool) -> None:
        self._source, self._tokenizer, self._required = source, tokenizer, require_response
        self._template, self._answer_template = _compiled(source.template), _compiled(source.answer_template)
        names, used = source.columns, [t.columns for t in (self._template, self._answer_template) if t]
        self.columns = frozenset({names.prompt, names.messages, names.response, names.answer}.union(*used))
        # with a template of its own a source may have neither
        self.one_of = () if self._template else (names.prompt, names.messages)

    def prompt(self, index: int, row: dict[str, Any]) -> Prompt:
        conversation, response = self._conversation(row)
        shown = conversation if isinstance(conversation, str) else "\n".join(m["content"] for m in conversation)
        return Prompt(
            index=index,
            token_ids=_encoded(self._tokenizer.render_prompt, conversation),
            text=shown,
            answer=self._answer(row),
            response_ids=self._response(row, response),
            source=self._source.name,
            teacher=self._source.teacher,
        )

    def _conversation(self, row: dict[str, Any]) -> tuple[str | list[Message], str | None]:
        """What the model is to continue, and how the row itself continues it."""
        given, response = self._given(row), None
        if isinstance(given, list) and given[-1]["role"] == "assistant":
            response = given.pop()["content"]
            if not given:
                raise BadRow("the conversation has only an assistant message: there is nothing to answer.")
        if self._template is not None:
            given = self._filled(self._template, given, row)
        if isinstance(given, str):
            if not given.strip():
                raise BadRow(f"column {self._source.columns.prompt!r} is empty.")
            given = given if self._source.system is None else [{"role": "user", "content": given}]
        if isinstance(given, list) and self._source.system is not None and given[0]["role"] != "system":
            given = [{"role": "system", "content": self._source.system}, *given]
        assert given is not None  # without a template a row has a prompt
        return given, response

    def _given(self, row: dict[str, Any]) -> str | list[Message] | None:
        """The prompt column as it stands; None where a template does without."""
        names = self._source.columns
        prompt = column_of(row, names.prompt)
        if prompt is None:
            prompt = column_of(row, names.messages)
        if prompt is None and self._template is None:
            raise BadRow(f"has neither {names.prompt!r} nor {names.messages!r}, only {sorted(row)}.")
        if prompt is None or isinstance(prompt, str):
            return prompt
        if isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt):
            return list(prompt)
        if self._template is not None:
            return str(prompt)
        raise BadRow(
            f"prompt holds {str(prompt)[:80]!r}, expected text or a list of messages with text 'role' and 'content'."
        )

    def _filled(
        self, template: RowTemplate, given: str | list[Message] | None, row: dict[str, Any]
    ) -> str | list[Message]:
        """The template around a text, or around the last message of a conversation."""
        if not isinstance(given, list):
            return template.render(row if given is None else row | {"prompt": given})
        *before, last = given
        return [*before, {**last, "content": template.render(row | {"prompt": last["content"]})}]

    def _answer(self, row: dict[str, Any]) -> str | None:
        column = self._source.columns.answer
        answer = column_of(row, column)
        if self._answer_template is not None:
            return self._answer_template.render(row if answer is None else row | {"answer": answer})
        if isinstance(answer, bool) or not isinstance(answer, str | int | float | None):
            raise BadRow(f"column {column!r} holds {type(answer).__name__}, expected text or a number.")
        return None if answer is None else str(answer)

    def _response(self, row: dict[str, Any], spoken: str | None) -> Int64Array | None:
        column = self._source.columns.response
        response = column_of(row, column)
        response = spoken if response is None else response
        if response is None and not self._required:
            return None
        if not isinstance(response, str) or not response:
            raise BadRow(f"column {column!r} holds {str(response)[:80]!r}, expected text that is not empty.")
        ids = _encoded(self._tokenizer.encode, response)
        if ids.size and ids[-1] in self._tokenizer.eos_ids:  # some files keep the end token in the text
            return ids
        return np.append(ids, np.int64(self._tokenizer.eos_ids[0]))


def _compiled(template: str | None) -> RowTemplate | None:
    return None if template is None else row_template(template)


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _encoded(encode: Callable[[Any], list[int]], prompt: str | list[Message]) -> Int64Array:
    try:
        return np.asarray(encode(prompt), dtype=np.int64)
    except TokenizerError as error:
        raise BadRow(f"{error}") from error
