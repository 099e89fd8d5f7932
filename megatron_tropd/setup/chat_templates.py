"""Find where student and teachers write conversations differently, and say what the teacher scores under then."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from megatron_tropd.config.run import RunConfig
from megatron_tropd.config.sections import SuiteConfig
from megatron_tropd.data.prompts import first_prompts
from megatron_tropd.data.table import PromptTable
from megatron_tropd.data.tokenizer import Tokenizer
from megatron_tropd.errors import ConfigError
from megatron_tropd.report.terminal import literal
from megatron_tropd.setup.datasets import read_problems, sources_of, teacher_tokenizer
from megatron_tropd.types import ModelSource, Prompt

logger = logging.getLogger(__name__)

_COMPARED = 4  # prompts of every source
_SHOWN = 600  # characters of each rendering


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One teacher that renders prompts otherwise than the student does."""

    role: str
    prompts: tuple[tuple[str, str], ...]  # of the first that differ: as the student, as the teacher writes it
    compared: int
    ends: tuple[str, str]  # end tokens, a turn's own first


def speaks_alike(first: Tokenizer, second: Tokenizer) -> bool:
    """Say whether two tokenizers render every conversation alike and end answers alike."""
    sources = [None if one.chat is None else one.chat.source for one in (first, second)]
    ends = [(set(one.eos_ids), one.turn_end, one.bos_id) for one in (first, second)]
    return sources[0] == sources[1] and ends[0] == ends[1]


def template_differences(config: RunConfig, student: Tokenizer) -> list[Difference]:
    """Render the first training prompts under the templates of student and teachers, and compare."""
    models = {"teacher": config.teacher.source} | {f"teacher {t.name!r}": t.source for t in config.teachers}
    found = (_difference(config, student, role, model) for role, model in models.items())
    return [one for one in found if one is not None]


def _difference(config: RunConfig, student: Tokenizer, role: str, model: ModelSource) -> Difference | None:
    teacher = teacher_tokenizer(config, model)
    if speaks_alike(student, teacher):
        return None
    pairs = [
        (_shown(ours, student), _shown(theirs, teacher))
        for source in sources_of(config.data)
        for ours, theirs in zip(
            first_prompts(source, student, _COMPARED), first_prompts(source, teacher, _COMPARED), strict=True
        )
    ]
    other, ends = tuple(pair for pair in pairs if pair[0] != pair[1]), (_ends(student), _ends(teacher))
    if not other and ends[0] == ends[1]:
        return None
    return Difference(role=role, prompts=other, compared=len(pairs), ends=ends)


def _shown(prompt: Prompt | Exception, tokenizer: Tokenizer) -> str:
    if isinstance(prompt, Exception):
        return f"refused: {prompt}"
    return "".join(tokenizer.tokens(prompt.token_ids.tolist()))


def _ends(tokenizer: Tokenizer) -> str:
    ids = dict.fromkeys((tokenizer.turn_end, *sorted(tokenizer.eos_ids)))
    return ", ".join(tokenizer.token_text(i) for i in ids)


def warn_of_differences(config: RunConfig, student: Tokenizer) -> None:
    """Say once at the start where a teacher would render prompts otherwise.

    Raises:
        ConfigError: the teacher is to score under its own template, which is not done yet.
    """
    for one in template_differences(config, student):
        if one.prompts and config.teacher.chat_template == "own":
            raise ConfigError(
                f"teacher.chat_template=own: the {one.role} renders {len(one.prompts)} of the first {one.compared} "
                "prompts otherwise than the student, and scoring a response after another prompt than the student's is "
                "not available yet. Set teacher.chat_template=student."
            )
        if one.prompts:
            ours, theirs = one.prompts[0]
            logger.warning(
                "the %s has another chat template than the student, under which it scores: %d of the first "
                "%d prompts differ, such as %r, which its own writes as %r. `tropd check` shows them; it is evaluated "
                "under its own",
                *(one.role, len(one.prompts), one.compared, ours[-80:], theirs[-80:]),
            )


DIFFERENCES = "Chat templates differ: the teacher scores under the student's, and is evaluated under its own"


def difference_table(found: Sequence[Difference]) -> Table:
    """Show the renderings of student and teachers side by side."""
    table = Table(show_lines=True)
    for column in ("", "student", "its own"):
        table.add_column(column, overflow="fold")
    for one in found:
        for ours, theirs in one.prompts[:2]:
            table.add_row(literal(one.role), literal(_cut(ours)), literal(_cut(theirs)))
        table.add_row(literal(f"{one.role}: ends"), literal(one.ends[0]), literal(one.ends[1]))
    return table


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]} ... {text[-_SHOWN // 2 :]}"


def teacher_problems(
    config: RunConfig, suites: Sequence[SuiteConfig], student: Tokenizer, problems: Mapping[str, PromptTable]
) -> tuple[Tokenizer, Mapping[str, PromptTable]]:
    """Return the teacher's own tokenizer, and the problems as that renders them: how the teacher is evaluated."""
    own = teacher_tokenizer(config)
    if speaks_alike(student, own):
        return student, problems
    return own, read_problems(suites, config.data, own, allow_code=config.evaluate.code_execution)


def warn_of_unread_options(config: RunConfig, student: Tokenizer) -> None:
    """Name the ``data.template_options`` that no template reads."""
    options = config.data.template_options
    unread = sorted(options) if student.chat is None else list(student.chat.unread_options)
    if unread:
        why = "has none" if student.chat is None else "does not read them"
        logger.warning("data.template_options sets %s: the student's chat template %s", ", ".join(unread), why)
