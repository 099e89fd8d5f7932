"""Write a model's own answers to a file, batch by batch: ``tropd generate``."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_tropd.config.run import RunConfig
from megatron_tropd.config.sections import ColumnsConfig, Layout, RolloutConfig, VLLMConfig
from megatron_tropd.convert.hf import check_weights
from megatron_tropd.convert.source import (
    ModelPath,
    as_source,
    open_weights,
    source_architecture,
    source_files,
    source_fingerprint,
    source_tokenizer,
)
from megatron_tropd.data.prompts import Limits, OnBadRow, read_sources
from megatron_tropd.data.response_file import ResponseFile, numbered_rows
from megatron_tropd.data.rows import Source, ids_digest, tokenizer_digest
from megatron_tropd.data.table import PromptTable
from megatron_tropd.data.tokenizer import Tokenizer, load_tokenizer
from megatron_tropd.engine.weights import load_weights
from megatron_tropd.errors import ConfigError
from megatron_tropd.parallel.groups import GroupBuilder, Groups, initialize_distributed
from megatron_tropd.progress.phases import Phase
from megatron_tropd.report.progress import TrainingProgress
from megatron_tropd.report.terminal import say
from megatron_tropd.rollout.engines.megatron import MegatronSampler
from megatron_tropd.rollout.engines.registry import EMBEDDED, ROLLOUT_ENGINES, SamplerContext
from megatron_tropd.rollout.guidance import make_requests
from megatron_tropd.rollout.protocol import Sampler, check_finite
from megatron_tropd.setup.claims import claimed, target
from megatron_tropd.setup.datasets import check_ids, read_tokenizer, sources_of, teacher_tokenizer
from megatron_tropd.setup.validate import DTYPES
from megatron_tropd.storage.write_aside import why_not_written
from megatron_tropd.types import Architecture, ModelSource, Prompt, Rollout, SamplingParams

_BATCH = 64
_BLOCK = 256  # sequences sampled, and written, at a time: whatever the number of ranks, so that all write the same
_UNREAD = "\0"  # responses and answers that the file may have are copied, not read: any kind will do


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """The settings under which a model, whoever it is, writes responses."""

    params: SamplingParams  # without stop tokens: those are the tokenizer's
    samples: int = 1
    seed: int = 0
    dtype: str = "bf16"
    tensor: int = 1
    engine: str = EMBEDDED
    vllm: VLLMConfig | None = None  # None: its defaults
    limit: int | None = None  # prompts of every source


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """One model that answers one source into one file."""

    model: ModelSource
    source: Source
    out: Path
    column: str
    tokenizer: Tokenizer
    stops: tuple[int, ...]
    limits: Limits
    on_bad_row: OnBadRow
    vocab_size: int | None = None
    only: Missing | None = None  # rows to write; None: all that can be used


def generate_responses(
    model: ModelPath, source: Source, out: Path, *, sampling: Sampling, options: Mapping[str, Any] | None = None
) -> None:
    """Copy the rows of ``source`` to ``out`` with the model's responses. Collective; the first rank writes.

    Args:
        source: ``columns.response`` is the column that is written.
        options: variables of the chat template.

    Raises:
        ConfigError, DataError, CheckpointError, TokenizerError: what is wrong with the arguments and files.
    """
    _check_arguments(sampling, out)
    source_architecture(model)
    tokenizer = load_tokenizer(source_tokenizer(model), template_options=options)
    job = _Job(
        model=as_source(model),
        source=_unanswered(source),
        out=out,
        column=source.columns.response,
        tokenizer=tokenizer,
        stops=tuple(tokenizer.eos_ids),
        limits=Limits(max_rows=sampling.limit),
        on_bad_row="skip",
    )
    _run([job], sampling)


def generate_from_config(config: RunConfig, out: Path, *, sampling: Sampling) -> None:
    """Have the teachers of a configuration answer the prompts of training. Collective; the first rank writes.

    With ``data.sources`` ``out`` is a directory with one file per source. Prompts are rendered as the teacher scores
    them in training (``teacher.chat_template``), and a response ends at an end token of either model.
    """
    several = bool(config.data.sources)
    files = {source.name: out / f"{source.name}.jsonl" if several else out for source in sources_of(config.data)}
    _run(jobs_of(config, files, sampling=sampling), sampling)


@dataclass(frozen=True, slots=True)
class Missing:
    """The rows of one source that are written to a file: the given ones as they are, the others with a response."""

    out: Path
    rows: frozenset[str]  # by ``PromptTable.place``
    given: frozenset[str] = frozenset()  # of ``rows``, those that have a response


def write_missing(config: RunConfig, sources: Mapping[str, Missing], *, sampling: Sampling) -> None:
    """Have the teachers answer what has no response yet, by the name of its source. Collective."""
    jobs = jobs_of(config, {name: missing.out for name, missing in sources.items()}, sampling=sampling)
    _run(
        [replace(job, only=sources[job.source.name]) for job in jobs],
        sampling,
        title="teacher's responses",
    )


def jobs_of(config: RunConfig, files: Mapping[str, Path], *, sampling: Sampling) -> list[_Job]:
    """List what the teachers of a configuration have to answer, of the sources that ``files`` names."""
    sources = [source for source in sources_of(config.data) if source.name in files]
    for source in sources:
        if source.columns.response in (source.columns.answer, source.columns.prompt):
            raise ConfigError(
                f"data.columns.response = {source.columns.response!r} is also the column of the prompt or the answer, "
                "which the responses would replace. Give responses a column of their own."
            )
    jobs = []
    for source in sources:
        model = next((t.source for t in config.teachers if t.name == source.teacher), config.teacher.source)
        student, own = read_tokenizer(config), teacher_tokenizer(config, model)
        shared = min(source_architecture(model).vocab_size, source_architecture(config.student.source).vocab_size)
        prompted = own if config.teacher.chat_template == "own" else student
        file = files[source.name]
        _check_arguments(sampling, file)
        jobs.append(
            _Job(
                model=model,
                source=_unanswered(source),
                out=file,
                column=source.columns.response,
                tokenizer=prompted,
                stops=tuple(dict.fromkeys((*prompted.eos_ids, *own.eos_ids))),
                limits=Limits(
                    max_prompt_tokens=config.data.max_prompt_tokens,
                    max_rows=sampling.limit,
                    max_left_out=config.data.max_left_out,
                ),
                on_bad_row=config.data.on_bad_row,
                vocab_size=shared,
            )
        )
    return jobs


def _unanswered(source: Source) -> Source:
    columns = source.columns.model_copy(update={"response": _UNREAD, "answer": _UNREAD, "teacher_prompt": None})
    return replace(source, columns=columns, answer_template=None, teacher_template=None, teacher_system=None)


def _check_arguments(sampling: Sampling, out: Path) -> None:
    params = sampling.params
    for name, value, valid, rule in (
        ("--dtype", sampling.dtype, sampling.dtype in DTYPES, f"use one of {', '.join(DTYPES)}"),
        ("--samples", sampling.samples, sampling.samples >= 1, "ask for at least 1 response per prompt"),
        ("--max-new-tokens", params.max_new_tokens, params.max_new_tokens >= 1, "allow at least 1 token"),
        ("--temperature", params.temperature, params.temperature >= 0, "0 is greedy, 1 the model's own distribution"),
        ("--top-p", params.top_p, 0 < params.top_p <= 1, "give a probability above 0, up to 1"),
        ("--tensor", sampling.tensor, sampling.tensor >= 1, "ask for at least 1 rank"),
        ("--limit", sampling.limit, sampling.limit is None or sampling.limit >= 1, "answer at least 1 prompt"),
    ):
        if not valid:
            raise ConfigError(f"{name} is {value}: {rule}.")
    if params.temperature == 0 and sampling.samples > 1:
        raise ConfigError(
            f"--samples is {sampling.samples}: at temperature 0 all would be the same. Raise --temperature."
        )
    row = ROLLOUT_ENGINES.get(sampling.engine)
    usable = [name for name, row in ROLLOUT_ENGINES.items() if row.generates and row.colocated]
    if row is None or sampling.engine not in usable:
        raise ConfigError(f"--engine is {sampling.engine}: use one of {', '.join(usable)}.")
    row.check()
    if out.is_dir():
        raise ConfigError(f"{out.absolute()} is a directory: give the file to write.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write {out.absolute()} ({why_not_written(error)}). Name another file.") from error


# --------------------------------------------------------------------------- the work


def _run(jobs: Sequence[_Job], sampling: Sampling, *, title: str = "generate") -> None:
    """Answer every source in turn; everything is read and checked before the first model is loaded."""
    device = initialize_distributed()
    with claimed(*(target(job.out, "OUT") for job in jobs)):
        _answer_all(jobs, sampling, device, title)


def _answer_all(jobs: Sequence[_Job], sampling: Sampling, device: torch.device, title: str) -> None:
    found = [_read(job, sampling) for job in jobs]
    groups = GroupBuilder().build(Layout(tensor=sampling.tensor))
    sampler, loaded = None, None
    for job, prompts in zip(jobs, found, strict=True):
        if sampler is None or loaded != job.model:
            if sampler is not None:
                sampler.close()
            longest = int(prompts.prompt_lengths().max()) + sampling.params.max_new_tokens
            sampler, loaded = _build_sampler(job, sampling, groups, device, longest), job.model
        _answer(job, prompts, sampler, sampling, title)
    if sampler is not None:
        sampler.close()


def _read(job: _Job, sampling: Sampling) -> PromptTable:
    architecture = source_architecture(job.model)
    reading = read_sources([job.source], job.tokenizer, limits=job.limits, on_bad_row=job.on_bad_row)
    check_ids({"prompt": [reading.prompts]}, job.tokenizer, vocab_sizes={"model": architecture.vocab_size})
    _check_room(reading.prompts, sampling.params.max_new_tokens, architecture.max_positions)
    return reading.prompts


def _check_room(prompts: PromptTable, budget: int, positions: int) -> None:
    length_N = prompts.prompt_lengths()
    row = int(length_N.argmax())
    room = positions - int(length_N[row])
    if budget > room:
        raise ConfigError(
            f"the prompt at {prompts.place(row)} has {length_N[row]} tokens and the model {positions} "
            f"positions (max_position_embeddings): there is room for {max(room, 0)} more, not for --max-new-tokens "
            f"{budget}. " + (f"Give --max-new-tokens {room} or less." if room > 0 else "Leave that prompt out.")
        )


def _answer(job: _Job, table: PromptTable, sampler: Sampler, sampling: Sampling, title: str) -> None:
    params = replace(sampling.params, stop_token_ids=job.stops)
    per_block = max(1, _BLOCK // sampling.samples)
    prompts, given = _chosen(table, job.only)
    blocks = [range(start, min(start + per_block, len(prompts))) for start in range(0, len(prompts), per_block)]
    first = dist.get_rank() == 0
    file = ResponseFile(job.out, _description(job, table, sampling)) if first else None
    done: list[int] = [0 if file is None else file.resume(per_block * sampling.samples)]
    dist.broadcast_object_list(done, src=0)
    rows = numbered_rows(job.source.paths)
    answered = min(done[0] * per_block, len(prompts))
    with TrainingProgress(len(prompts), done=answered, enabled=first, name=title) as progress:
        if done[0]:
            progress.say(f"{job.out}.partial has the responses to {answered} prompts: continued from there")
        for block in blocks[done[0] :]:
            posed = [prompts[i] for i in block]
            requests = _requests(posed, block.start, sampling)
            wanted = [request for request in requests if request.prompt_index not in given]
            rollouts = sampler.generate(wanted, params, seed=sampling.seed, step=0) if wanted else []
            check_finite(rollouts, params, str(job.model.weights))
            if file is not None:
                file.append(list(_written(job, posed, rollouts, rows, given, sampling.samples)))
            progress.advance(len(block))
    if file is not None:
        _conclude(file, (len(prompts) - len(given)) * sampling.samples, job.column)


def _chosen(table: PromptTable, only: Missing | None) -> tuple[Sequence[Prompt], frozenset[int]]:
    """Return the prompts to write, and by ``Prompt.index`` those of them that have a response."""
    if only is None:
        return table, frozenset()
    places = [(i, place) for i in range(len(table)) if (place := table.place(i)) in only.rows]
    prompts = [table[i] for i, _ in places]
    pairs = zip(prompts, places, strict=True)
    return prompts, frozenset(prompt.index for prompt, (_, place) in pairs if place in only.given)


def _requests(prompts: Sequence[Prompt], start: int, sampling: Sampling) -> list[Any]:
    """Build requests numbered through all blocks: the numbers key the random ones."""
    budget = sampling.params.max_new_tokens
    requests = make_requests(prompts, samples=sampling.samples, guided=0, fraction=0.0, max_new_tokens=budget)
    return [replace(r, sequence_id=start * sampling.samples + r.sequence_id) for r in requests]


def _written(
    job: _Job,
    prompts: Sequence[Prompt],
    rollouts: Sequence[Rollout],
    rows: Iterator[tuple[int, dict[str, Any]]],
    given: Collection[int],
    samples: int,
) -> Iterator[dict[str, Any]]:
    """Yield every row that was answered, whole, once per answer. ``rows`` is read on to where the prompts are."""
    digest, columns, answers = tokenizer_digest(job.tokenizer), ColumnsConfig(response=job.column), iter(rollouts)
    for prompt in prompts:
        row = next(row for index, row in rows if index == prompt.index)
        if prompt.index in given:
            yield row
            continue
        for rollout in islice(answers, samples):
            ids = [int(i) for i in rollout.token_ids[rollout.prompt_length :]]
            kept = {"ids": ids, "prompt": ids_digest(prompt.token_ids), "tokenizer": digest}
            yield {
                **row,
                job.column: job.tokenizer.response_text(ids[:-1] if rollout.finished else ids),
                columns.finished: rollout.finished,
                columns.generated: kept,
            }


def _description(job: _Job, prompts: PromptTable, sampling: Sampling) -> dict[str, Any]:
    """Name what shapes the rows of a file."""
    return {
        "model": str(job.model.weights),
        "weights": source_fingerprint(job.model),
        "prompts": prompts.fingerprint()[:16],
        "column": job.column,
        "params": repr(replace(sampling.params, stop_token_ids=job.stops)),
        "samples": sampling.samples,
        "seed": sampling.seed,
        "dtype": sampling.dtype,
        "engine": sampling.engine,
        **({} if job.only is None else {"rows": hashlib.sha256(repr(sorted(job.only.rows)).encode()).hexdigest()[:16]}),
    }


def _conclude(file: ResponseFile, count: int, column: str) -> None:
    out = file.out
    kept = file.finish()
    finished = ColumnsConfig(response=column).finished
    cut = sum(not row.get(finished, True) for _, row in numbered_rows([out]))
    facts = f"{count} responses in {out} ({cut} cut off by max_new_tokens)"
    say(facts)
    if kept is not None:
        say(f"the file that was there is kept as {kept}")


def _build_sampler(job: _Job, sampling: Sampling, groups: Groups, device: torch.device, longest: int) -> Sampler:
    """Build the sampler of ``--engine``, with the model's weights."""
    dtype, architecture = DTYPES[sampling.dtype], source_architecture(job.model)
    if ROLLOUT_ENGINES[sampling.engine].exact_vocabulary:
        return sampler_of(job.model, groups, dtype=dtype, device=device, vocab_size=job.vocab_size)
    context = _context(job, sampling, architecture, groups, device, longest)
    with Phase(f"starting {sampling.engine}"):
        sampler = ROLLOUT_ENGINES[sampling.engine].build(context)
    weights = open_weights(job.model)
    with Phase("handing on the weights", total=len(weights)) as phase:
        named = phase.watch((name, weights[name][:].to(dtype)) for name in weights)
        sampler.update_weights(named, version=0)
    return sampler


def _context(
    job: _Job, sampling: Sampling, architecture: Architecture, groups: Groups, device: torch.device, longest: int
) -> SamplerContext:
    section = RolloutConfig.model_construct(
        engine=sampling.engine, batch_size=_BATCH, vllm=sampling.vllm or VLLMConfig()
    )
    return SamplerContext(
        section=section,
        model=source_files(job.model),
        architecture=architecture,
        groups=groups,
        dtype=DTYPES[sampling.dtype],
        device=device,
        max_tokens=longest,
        vocab_size=job.vocab_size,
        run_dir=job.out.parent,
    )


def sampler_of(
    source: ModelPath, groups: Groups, *, dtype: torch.dtype, device: torch.device, vocab_size: int | None = None
) -> MegatronSampler:
    """Build a sampler with the weights of a Hugging Face directory or a checkpoint of Megatron."""
    architecture, weights = source_architecture(source), open_weights(source)
    check_weights(weights, architecture)  # a wrong config.json may give a model of any size
    sampler = MegatronSampler(
        architecture, groups, dtype=dtype, device=device, batch_size=_BATCH, vocab_size=vocab_size
    )
    load_weights(sampler.model, weights)
    return sampler
