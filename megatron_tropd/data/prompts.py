"""Rows of data files become tokenized prompts, each with its reference answer and one response, where it has them."""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

from megatron_tropd.config.sections import ColumnsConfig
from megatron_tropd.data.files import BadRow, RawRow, find_files, read_rows
from megatron_tropd.data.notes import Notes
from megatron_tropd.data.prompt_cache import kept_table, table_key
from megatron_tropd.data.rows import RowParser, Source
from megatron_tropd.data.table import PromptTable
from megatron_tropd.data.table_file import StoredTable
from megatron_tropd.data.tokenizer import Tokenizer
from megatron_tropd.errors import ConfigError, DataError
from megatron_tropd.progress.phases import Phase
from megatron_tropd.types import Prompt

logger = logging.getLogger(__name__)

OnBadRow = Literal["error", "skip"]
_COLUMNS = ColumnsConfig()


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits beyond which rows are left out. Rows that are too long are left out and counted, never cut."""

    max_prompt_tokens: int | None = None
    max_response_tokens: int | None = None  # of the response column, end token included
    max_teacher_prompt_tokens: int | None = None  # of the teacher's own prompt
    max_rows: int | None = None  # usable rows of every source
    require_response: bool = False  # rows without a response are bad
    max_left_out: float = 0.9  # share of a source's rows that may be left out; beyond it that is an error


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """The result of a reading: prompts in file order, and what was left out."""

    prompts: PromptTable
    too_long: tuple[int, ...] = ()  # row numbers beyond a limit
    bad_rows: tuple[str, ...] = ()  # "file:line: reason", only with on_bad_row="skip"
    kept_in: Path | None = None  # the file that is mapped into memory; None: the table is this process's own


def read_prompts(
    paths: str | Path | Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    columns: ColumnsConfig = _COLUMNS,
    max_prompt_tokens: int | None = None,
    require_response: bool = False,
    on_bad_row: OnBadRow = "error",
) -> PromptSet:
    """Read, as ``read_sources`` does, a single unnamed source."""
    given = (paths,) if isinstance(paths, str | Path) else paths
    source = Source(paths=tuple(Path(path) for path in given), columns=columns)
    limits = Limits(max_prompt_tokens=max_prompt_tokens, require_response=require_response)
    return read_sources([source], tokenizer, limits=limits, on_bad_row=on_bad_row)


def read_sources(
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    *,
    limits: Limits = Limits(),
    on_bad_row: OnBadRow = "error",
    cache_dir: Path | None = None,
) -> PromptSet:
    """Read, check and tokenize every row of every source.

    ``Prompt.index`` is the row's number from 0 (the line of a text file, blank ones included), counted through all
    files of all sources, so it does not change when rows are filtered. ``Prompt.response_ids`` are what the chat
    template writes behind the prompt, up to the token that ends the turn (without one where the response was cut off).
    A conversation that ends in an assistant message is a prompt with that response, unless the row has a response
    column. What was changed or left unread is said once per source, with counts.

    Args:
        on_bad_row: "error" stops at the first bad row, "skip" leaves bad rows out and logs how many.
        cache_dir: where tokenized rows are kept. The first process there reads the files; the others, and later runs
            of the same files and rules, map its table into memory and say what it said. None: all read for themselves.

    Raises:
        DataError: a file is missing or torn, a row is bad, or a source has no row left. The message has file, line
            and reason.
        ConfigError: a template is not valid.
    """
    if on_bad_row not in ("error", "skip"):
        raise ConfigError(f"on_bad_row is {on_bad_row!r}: use 'error' or 'skip'.")
    if cache_dir is None:
        found = _tokenized(sources, tokenizer, limits=limits, on_bad_row=on_bad_row)
    else:
        files = [file for source in sources for file in find_files(source.paths)]
        before = _dates(files)
        key = table_key(files, tokenizer, rules=[*map(repr, sources), repr(limits), on_bad_row])

        def make() -> StoredTable:
            made = _tokenized(sources, tokenizer, limits=limits, on_bad_row=on_bad_row)
            _check_unchanged(before, _dates(files))
            return made

        found = kept_table(cache_dir, key, make)
    facts = found.facts
    for message in () if found.is_new else facts["said"]:
        logger.warning("%s", message)
    return PromptSet(
        prompts=found.table,
        too_long=tuple(facts["too_long"]),
        bad_rows=tuple(facts["bad_rows"]),
        kept_in=found.path,
    )


def _tokenized(sources: Sequence[Source], tokenizer: Tokenizer, *, limits: Limits, on_bad_row: OnBadRow) -> StoredTable:
    reading = _Reading(limits=limits, on_bad_row=on_bad_row)
    for source in sources:
        reading.read(source, tokenizer)
    reading.table.left_out = len(reading.too_long) + len(reading.bad)
    facts = {"too_long": reading.too_long, "bad_rows": reading.bad, "said": reading.said}
    return StoredTable(table=reading.table, facts=facts)


def _dates(files: Sequence[Path]) -> dict[Path, tuple[int, int]]:
    """Return size and date of files; of one that cannot be looked at, nothing."""
    found = {}
    for file in files:
        with suppress(OSError):
            found[file] = (file.stat().st_size, file.stat().st_mtime_ns)
    return found


def _check_unchanged(before: Mapping[Path, tuple[int, int]], after: Mapping[Path, tuple[int, int]]) -> None:
    changed = [str(file) for file in before if before[file] != after.get(file)]
    if changed:
        raise DataError(f"{', '.join(changed)} changed while being read. Start again once nobody writes to it.")


def first_prompts(source: Source, tokenizer: Tokenizer, count: int) -> list[Prompt | BadRow]:
    """Read the first rows of a source, and say nothing: a row that cannot be used is its reason."""
    parser, found = RowParser(source, tokenizer, require_response=False, notes=Notes()), list[Prompt | BadRow]()
    rows = (row for file in find_files(source.paths) for row in read_rows(file, columns=parser.columns))
    for index, row in enumerate(islice(rows, count)):
        try:
            if isinstance(row.content, BadRow):
                raise row.content
            found.append(parser.prompt(index, row.content))
        except BadRow as reason:
            found.append(reason)
    return found


@dataclass(slots=True, kw_only=True)
class _Reading:
    """The state of one pass over the files."""

    limits: Limits
    on_bad_row: OnBadRow
    table: PromptTable = field(default_factory=PromptTable)
    too_long: list[int] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)  # warnings, for those who find the table made
    rows_before: int = 0  # of the files already read

    def read(self, source: Source, tokenizer: Tokenizer) -> None:
        files, notes = find_files(source.paths), Notes()
        parser = RowParser(source, tokenizer, require_response=self.limits.require_response, notes=notes)
        kept, too_long, bad = len(self.table), len(self.too_long), len(self.bad)
        most = self.limits.max_rows
        what = source.name or ", ".join(map(str, files))
        with closing(self._rows(files, parser)) as rows, Phase(f"reading {what}") as phase:
            for file, row in phase.watch(rows):
                notes.place = f"{file}:{row.number}"
                self._take(file, row, parser)
                if most is not None and len(self.table) - kept == most:
                    break
        self._say(*notes.sentences(what))
        if unseen := parser.unseen_columns():
            self._say(f"{what}: the template reads {', '.join(map(repr, unseen))}, which no row has")
        summary = _checked_left_out(
            what,
            kept=len(self.table) - kept,
            too_long=len(self.too_long) - too_long,
            bad=self.bad[bad:],
            limits=self.limits,
        )
        self._say(*([summary] if summary else []))

    def _say(self, *messages: str) -> None:
        self.said += messages
        for message in messages:
            logger.warning("%s", message)

    def _rows(self, files: Sequence[Path], parser: RowParser) -> Generator[tuple[Path, RawRow], None, None]:
        for file in files:
            number = 0
            try:
                for row in read_rows(file, columns=parser.columns, one_of=parser.one_of):
                    number = row.number
                    yield file, row
            finally:  # also when a source has enough rows: those of the next one have numbers of their own
                self.rows_before += number

    def _take(self, file: Path, row: RawRow, parser: RowParser) -> None:
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
    response, own = (0 if ids is None else len(ids) for ids in (prompt.response_ids, prompt.teacher_ids))
    return any(
        most is not None and length > most
        for length, most in (
            (len(prompt.token_ids), limits.max_prompt_tokens),
            (response, limits.max_response_tokens),
            (own, limits.max_teacher_prompt_tokens),
        )
    )


def _checked_left_out(what: str, *, kept: int, too_long: int, bad: Sequence[str], limits: Limits) -> str | None:
    """Say what is left out of a source; None when nothing is. Raises DataError when that is too much."""
    allowed = f"{limits.max_prompt_tokens} tokens"
    if limits.max_response_tokens is not None:
        allowed += f" of prompt or {limits.max_response_tokens} of response"
    if limits.max_teacher_prompt_tokens is not None:
        allowed += f" (the teacher's own prompt: {limits.max_teacher_prompt_tokens})"
    long = f"{too_long} longer than {allowed}, " if too_long else ""
    summary = f"{long}{len(bad)} bad" + "".join(f"\n  {row}" for row in bad[:3])
    if not kept:
        raise DataError(f"no usable prompt in {what}: {summary}. Check the column names and length limits.")
    dropped = too_long + len(bad)
    # as many rows as were wanted are enough, however many were passed over on the way
    if kept != limits.max_rows and dropped > limits.max_left_out * (kept + dropped):
        raise DataError(
            f"{what}: of {kept + dropped} rows {dropped} are left out, {summary}\nThat is more than "
            f"data.max_left_out={limits.max_left_out:g} of them. Check the column names and length limits, or set "
            "data.max_left_out=1 to continue with the rest."
        )
    return f"{what}: kept {kept} prompts, left out {summary}" if dropped else None
