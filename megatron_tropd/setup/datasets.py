"""Tokenizer, prompts and problems of a configuration, read and checked before a model is built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch.distributed as dist
from rich.console import Console

from megatron_tropd.config.run import RunConfig
from megatron_tropd.config.sections import (
    CodeExecution,
    DataConfig,
    EvaluateConfig,
    SourceConfig,
    SuiteConfig,
)
from megatron_tropd.convert.source import source_tokenizer
from megatron_tropd.data.prompt_cache import default_directory
from megatron_tropd.data.prompts import Limits, read_sources
from megatron_tropd.data.rows import Source
from megatron_tropd.data.stream import Share
from megatron_tropd.data.table import PromptTable
from megatron_tropd.data.tokenizer import Tokenizer, check_same_vocabulary, load_tokenizer
from megatron_tropd.errors import ConfigError, DataError, TokenizerError
from megatron_tropd.evaluate.grader_pool import check_code_allowed
from megatron_tropd.evaluate.rules import CODE
from megatron_tropd.rollout.engines.registry import ROLLOUT_ENGINES
from megatron_tropd.setup.ends import STUDENT
from megatron_tropd.setup.references import answer_template, check_problem_answers
from megatron_tropd.types import Architecture, ModelSource

# --------------------------------------------------------------------------- tokenizers


def read_tokenizers(config: RunConfig, *, base: bool = False) -> dict[str, Tokenizer]:
    """Read the tokenizers of all models by role, the student's first.

    Raises:
        TokenizerError: another model's does not give its ids to the same tokens as the student's.
    """
    data = config.data
    tokenizer = load_tokenizer(
        source_tokenizer(config.student.source),
        chat_template=data.chat_template,
        template_options=data.template_options,
    )
    found = {STUDENT: tokenizer}
    models = {"teacher": config.teacher.source}
    models |= {f"teacher {teacher.name!r}": teacher.source for teacher in config.teachers}
    for role, model in (models | ({"base model": config.base_source} if base else {})).items():
        found[role] = load_tokenizer(source_tokenizer(model), chat_template=data.chat_template)
        check_same_vocabulary(tokenizer, found[role], role=role)
    return found


def read_tokenizer(config: RunConfig) -> Tokenizer:
    """Read the student's tokenizer; errors as of ``read_tokenizers``."""
    return read_tokenizers(config)[STUDENT]


def teacher_tokenizer(config: RunConfig, model: ModelSource | None = None) -> Tokenizer:
    """Load the tokenizer of a teacher (that of ``teacher`` by default) with its own chat template and end tokens."""
    data = config.data
    return load_tokenizer(
        source_tokenizer(model or config.teacher.source),
        chat_template=data.chat_template,
        template_options=data.template_options,
    )


def check_ids(
    rows: Mapping[str, Iterable[PromptTable]], tokenizer: Tokenizer, *, vocab_sizes: Mapping[str, int]
) -> None:
    """Raise TokenizerError when the tokenizer writes ids that a model has no embedding for.

    Args:
        rows: by what they are called in a message.
        vocab_sizes: embeddings of each model, by its role.
    """
    role, size = min(vocab_sizes.items(), key=lambda item: item[1])
    rule = (
        f"the {role} has embeddings for {size} ids only (vocab_size in its config.json). "
        "Give every model the tokenizer it was trained with."
    )
    if tokenizer.eos_ids[0] >= size:
        raise TokenizerError(f"the end-of-sequence id is {tokenizer.eos_ids[0]}, but {rule}")
    for what, prompts in ((what, table) for what, tables in rows.items() for table in tables):
        largest_N = prompts.largest_ids()
        if len(prompts) and largest_N.max() >= size:
            row = int(np.argmax(largest_N >= size))
            raise TokenizerError(f"the {what} at {prompts.place(row)} holds token id {largest_N[row]}, but {rule}")


# --------------------------------------------------------------------------- data


def sources_of(data: DataConfig) -> list[Source]:
    """List the training sources of a configuration: ``data.sources``, or ``data.prompts`` as the only one."""
    listed = data.sources or (SourceConfig.model_construct(name="", prompts=data.prompts),)
    return [
        Source(
            paths=source.prompts,
            name=source.name,
            teacher=source.teacher or "",
            columns=source.columns or data.columns,
            template=data.template if source.template is None else source.template,
            answer_template=answer_template(
                data.answer_template if source.answer_template is None else source.answer_template,
                code=source.code or data.code if (source.grader or data.grader) == CODE else None,
            ),
            system=data.system if source.system is None else source.system,
            teacher_template=data.teacher_template if source.teacher_template is None else source.teacher_template,
            teacher_system=data.teacher_system if source.teacher_system is None else source.teacher_system,
        )
        for source in listed
    ]


def shares_of(data: DataConfig, prompts: PromptTable) -> tuple[Share, ...]:
    """Return the rows and the weight of every source, for ``PromptStream``."""
    rows = prompts.sources()
    weights = {source.name: source.weight for source in data.sources}
    return tuple(Share(rows_N, weights.get(name) or float(len(rows_N))) for name, rows_N in rows.items())


def read_training_prompts(
    config: RunConfig, tokenizer: Tokenizer, *, guided: bool, may_lack: bool = False
) -> PromptTable:
    """Read the training prompts; with ``guided`` every one of them has a teacher response.

    ``may_lack``: unless the teacher is about to write what is missing (``data.responses: auto``).
    """
    data = config.data
    written = may_lack and data.responses == "auto" and why_not_by_teacher(config) is None
    limits = Limits(
        max_prompt_tokens=data.max_prompt_tokens,
        max_response_tokens=data.max_response_tokens,
        max_teacher_prompt_tokens=data.longest_teacher_prompt if data.own_teacher_prompts else None,
        max_left_out=data.max_left_out,
        require_response=guided and data.on_bad_row == "skip" and not written,
    )
    prompts = _read(data, sources_of(data), tokenizer, limits)
    bare = np.flatnonzero(prompts.response_lengths() == 0)
    if guided and bare.size and not written:
        raise DataError(
            f"{bare.size} of {len(prompts)} prompts have no teacher response in column {data.columns.response!r} (the "
            f"first is {prompts.place(int(bare[0]))}), and method.name={config.method.name} starts some sequences with "
            f"one. {_ways_to_responses(config)}"
        )
    return prompts


def why_not_by_teacher(config: RunConfig) -> str | None:
    """Say why the teacher of a run cannot write responses when the run starts; None where it can."""
    if config.teacher.recorded_from is not None:
        return f"its scores are recorded ones (teacher.recorded_from = '{config.teacher.recorded_from}')"
    if not ROLLOUT_ENGINES[config.rollout.engine].generates:
        return f"rollouts are replayed (rollout.engine={config.rollout.engine}), with the responses of their own run"
    writer = ROLLOUT_ENGINES.get(config.teacher.engine)
    if writer is None or not (writer.generates and writer.colocated):
        return f"teacher.engine={config.teacher.engine} only scores"
    return None


def _ways_to_responses(config: RunConfig) -> str:
    others = (
        "write them beforehand (`tropd generate CONFIG.yaml OUT`, then data.prompts=OUT), or set data.responses=none "
        "to train without guidance."
    )
    if config.data.responses == "required":
        return f"data.responses=required has nobody write them: set it to auto, {others}"
    reason = why_not_by_teacher(config)
    if reason is not None:
        return f"The teacher cannot write them now: {reason}. Do so with one that can: {others}"
    return f"`tropd train` has the teacher write them (data.responses=auto). Else {others}"


def _read(data: DataConfig, sources: Sequence[Source], tokenizer: Tokenizer, limits: Limits) -> PromptTable:
    """Read sources as a table that all processes of the host share; the first rank says where it lies."""
    kept = data.cache_dir or default_directory()
    found = read_sources(sources, tokenizer, limits=limits, on_bad_row=data.on_bad_row, cache_dir=kept)
    if found.kept_in is not None and not (dist.is_initialized() and dist.get_rank()):
        size = found.kept_in.stat().st_size / 2**20
        text = f"{len(found.prompts):,} prompts, tokenized once for this host: {size:,.1f} MiB in {found.kept_in}"
        Console().print(text, markup=False, highlight=False, soft_wrap=True)
    return found.prompts


def suites_of(config: RunConfig) -> tuple[SuiteConfig, ...]:
    """List the suites there are problems for, with nothing left to look up elsewhere in the configuration."""
    return complete_suites(config.evaluate, config.data, budget=config.rollout.max_new_tokens)


def complete_suites(evaluate: EvaluateConfig, data: DataConfig, *, budget: int) -> tuple[SuiteConfig, ...]:
    """Fill in what suites of ``evaluate`` leave open, by ``evaluate``, ``data`` and the answers' budget."""
    return tuple(
        suite.model_copy(
            update={
                "prompts": suite.prompts or evaluate.prompts,
                "max_problems": suite.max_problems or evaluate.max_problems,
                "columns": suite.columns or data.columns,
                "template": data.template if suite.template is None else suite.template,
                "answer_template": data.answer_template if suite.answer_template is None else suite.answer_template,
                "system": data.system if suite.system is None else suite.system,
                "grader": suite.grader or data.grader,
                "extract": data.extract if suite.extract is None else suite.extract,
                "code": suite.code or data.code,
                "max_new_tokens": suite.max_new_tokens or budget,
            }
        )
        for suite in evaluate.suites
        if suite.prompts or evaluate.prompts
    )


def read_problems(
    suites: Sequence[SuiteConfig], data: DataConfig, tokenizer: Tokenizer, *, allow_code: CodeExecution
) -> dict[str, PromptTable]:
    """Read the problems of every (complete) suite by its name; suites that name the same share a table.

    Raises:
        DataError: a file or a row is bad, or a problem has no answer that it can be graded against.
        ConfigError: programs would be run, which ``allow_code`` does not allow.
    """
    read: dict[tuple[Any, ...], PromptTable] = {}
    problems: dict[str, PromptTable] = {}
    for suite in suites:
        if suite.grader == CODE:
            check_code_allowed(allow_code)
        assert suite.columns is not None
        source = Source(
            paths=suite.prompts,
            columns=suite.columns,
            template=suite.template,
            answer_template=answer_template(suite.answer_template, code=suite.code if suite.grader == CODE else None),
            system=suite.system,
        )
        key = (source, suite.max_problems)
        if key not in read:
            limits = Limits(
                max_prompt_tokens=data.max_prompt_tokens,
                max_rows=suite.max_problems,
                max_left_out=data.max_left_out,
            )
            read[key] = _read(data, [source], tokenizer, limits)
        problems[suite.name] = read[key]
        check_problem_answers(suite, problems[suite.name], allow_code=allow_code)
    return problems


def check_training_lengths(config: RunConfig, prompts: PromptTable, models: Mapping[str, Architecture]) -> None:
    """Raise ConfigError when a prompt and a response of full length have more tokens than a model has positions."""
    for role, architecture in models.items():
        own = role.startswith("teacher")  # whose prompts may be longer
        _check_length(
            prompts, config.rollout.max_new_tokens, architecture, role=role, key="rollout.max_new_tokens", own=own
        )


def check_problem_lengths(
    suites: Sequence[SuiteConfig], problems: Mapping[str, PromptTable], models: Mapping[str, Architecture]
) -> None:
    """Check the problems of every (complete) suite likewise. ``models`` by role, those that answer them."""
    for role, architecture in models.items():
        for suite in suites:
            key, budget = f"max_new_tokens of the suite {suite.name!r}", suite.max_new_tokens
            assert budget is not None
            _check_length(problems[suite.name], budget, architecture, role=role, key=key)


def _check_length(
    prompts: PromptTable, budget: int, architecture: Architecture, *, role: str, key: str, own: bool = False
) -> None:
    limit = architecture.max_positions
    length_N = prompts.teacher_prompt_lengths() if own else prompts.prompt_lengths()
    if not len(prompts) or length_N.max() + budget <= limit:
        return
    row = int(np.argmax(length_N))
    length = int(length_N[row])
    raise ConfigError(
        f"the prompt at {prompts.place(row)} has {length} tokens; with {key} = {budget} a sequence may have "
        f"{length + budget}, but the {role} has {limit} positions ({_limit_name(architecture)}). "
        + (f"Lower {key} to {limit - length} or less." if length < limit else "Lower data.max_prompt_tokens.")
    )


def data_identity(data: DataConfig, prompts: PromptTable) -> dict[str, Any]:
    """Return what determines the walk through the prompts, by config key."""
    sources = {name: len(rows_N) for name, rows_N in prompts.sources().items() if name}
    return {
        "data.prompts": f"{len(prompts)} prompts, {prompts.fingerprint()[:16]}",
        "data.shuffle": data.shuffle,
        "data.sources": [
            [s.name, s.weight, sources[s.name], *([s.teacher] if s.teacher else [])] for s in data.sources
        ],
    }


def _limit_name(architecture: Architecture) -> str:
    if architecture.sliding_window is None:
        return "max_position_embeddings"
    return "sliding_window: beyond it, attention forgets, which is not supported"
