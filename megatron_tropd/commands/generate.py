"""A model's own answers: written to a file, or graded. What ``tropd generate`` and ``tropd evaluate`` do."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from megatron_tropd.config.run import RunConfig
from megatron_tropd.config.sections import DataConfig, EvaluateConfig, SuiteConfig
from megatron_tropd.convert.hf import HFWeights, read_architecture
from megatron_tropd.data.files import find_files, read_rows
from megatron_tropd.data.prompts import Columns, read_prompts
from megatron_tropd.data.table import PromptTable
from megatron_tropd.data.tokenizer import Tokenizer, load_tokenizer
from megatron_tropd.engine.weights import load_weights
from megatron_tropd.errors import ConfigError
from megatron_tropd.evaluate.suites import answer_suites, answer_text
from megatron_tropd.parallel.groups import GroupBuilder, Groups, Layout, initialize_distributed
from megatron_tropd.report.records import BEFORE, TEACHER, Evaluation, record_evaluations
from megatron_tropd.report.table import accuracy_table
from megatron_tropd.rollout.engines.megatron import MegatronSampler
from megatron_tropd.rollout.guidance import make_requests
from megatron_tropd.setup.datasets import (
    check_ids,
    check_problem_lengths,
    complete_suites,
    read_problems,
    read_tokenizer,
    suites_of,
)
from megatron_tropd.setup.validate import DTYPES, check_layouts, read_architectures, why_not_written
from megatron_tropd.types import Rollout, SamplingParams

_BATCH = 64


def generate_responses(
    model: Path,
    prompts: Path,
    out: Path,
    *,
    params: SamplingParams,
    samples: int,
    seed: int,
    dtype: str,
    columns: tuple[str, str] = ("prompt", "response"),
) -> None:
    """Copies the rows of ``prompts`` to ``out`` with the model's responses. Collective; the first rank writes.

    Args:
        columns: names of the prompt column read and of the response column written.

    Raises:
        ConfigError, DataError, CheckpointError, TokenizerError: what is wrong with the arguments and files.
    """
    _check_arguments(params, samples=samples, dtype=dtype, out=out)
    device = initialize_distributed()
    architecture, tokenizer = read_architecture(model), load_tokenizer(model)
    found = _read_prompts(prompts, tokenizer, columns[0])
    check_ids({"prompt": [found]}, tokenizer, vocab_sizes={"model": architecture.vocab_size})
    _check_room(found, params.max_new_tokens, architecture.max_positions)
    sampler = _sampler(model, GroupBuilder().build(Layout()), dtype=DTYPES[dtype], device=device)
    requests = make_requests(found, samples=samples, guided=0, fraction=0.0, max_new_tokens=params.max_new_tokens)
    params = SamplingParams(
        max_new_tokens=params.max_new_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        stop_token_ids=tuple(tokenizer.eos_ids),
    )
    rollouts = sampler.generate(requests, params, seed=seed, step=0)
    if dist.get_rank() == 0:
        texts = [answer_text(rollout, tokenizer) for rollout in rollouts]
        _write_rows(prompts, out, rollouts, texts, columns[1])
        cut = sum(not rollout.finished for rollout in rollouts)
        Console().print(
            f"{len(texts)} responses in {out} ({cut} cut off by max_new_tokens)", highlight=False, soft_wrap=True
        )


def _check_arguments(params: SamplingParams, *, samples: int, dtype: str, out: Path) -> None:
    for name, value, valid, rule in (
        ("--dtype", dtype, dtype in DTYPES, f"use one of {', '.join(DTYPES)}"),
        ("--samples", samples, samples >= 1, "ask for at least 1 response per prompt"),
        ("--max-new-tokens", params.max_new_tokens, params.max_new_tokens >= 1, "allow at least 1 token"),
        ("--temperature", params.temperature, params.temperature >= 0, "0 is greedy, 1 the model's own distribution"),
        ("--top-p", params.top_p, 0 < params.top_p <= 1, "give a probability above 0, up to 1"),
    ):
        if not valid:
            raise ConfigError(f"{name} is {value}: {rule}.")
    if params.temperature == 0 and samples > 1:
        raise ConfigError(f"--samples is {samples}: at temperature 0 all would be the same. Raise --temperature.")
    if out.is_dir():
        raise ConfigError(f"{out.absolute()} is a directory: give the file to write.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write {out.absolute()} ({why_not_written(error)}). Name another file.") from error


def _read_prompts(path: Path, tokenizer: Tokenizer, column: str) -> PromptTable:
    # responses and answers that the file may have are copied, not read: any kind will do
    unread = "\0"
    return read_prompts(path, tokenizer, columns=Columns(prompt=column, response=unread, answer=unread)).prompts


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


def _write_rows(source: Path, out: Path, rollouts: Sequence[Rollout], texts: Sequence[str], column: str) -> None:
    """Every row that was answered, whole, once per answer."""
    answers: dict[int, list[str]] = {}
    for rollout, text in zip(rollouts, texts, strict=True):
        answers.setdefault(rollout.prompt_index, []).append(text)
    partial = out.with_name(out.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for index, row in _numbered_rows(source):
            for text in answers.get(index, ()):
                # a table may hold dates and the like, which JSON writes as text
                file.write(json.dumps({**row, column: text}, ensure_ascii=False, default=str) + "\n")
    os.replace(partial, out)


def _numbered_rows(source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows by ``Prompt.index``."""
    before = 0
    for path in find_files(source):
        number = 0
        for number, content in ((row.number, row.content) for row in read_rows(path, columns=None)):
            if isinstance(content, dict):
                yield before + number - 1, content
        before += number


def evaluate_models(config: RunConfig) -> None:
    """Grades the student and, with ``evaluate.teacher``, the teacher; prints tables, records accuracies. Collective.

    In the directory of a training run nothing is recorded: its own results stay as they were measured.
    """
    device = initialize_distributed()
    student, teacher = read_architectures(config)
    check_layouts(config, student, teacher)
    tokenizer, vocab_size = read_tokenizer(config), min(student.vocab_size, teacher.vocab_size)
    suites, allowed = suites_of(config), config.evaluate.allow_code_execution
    problems = read_problems(suites, config.data, tokenizer, allow_code=allowed)
    sizes = {"student": student.vocab_size, "teacher": teacher.vocab_size}
    check_ids({"problem": problems.values()}, tokenizer, vocab_sizes=sizes)
    models, answering = {BEFORE: config.student.model}, {"student": student}
    if config.evaluate.teacher:
        models[TEACHER], answering["teacher"] = config.teacher.model, teacher
    check_problem_lengths(suites, problems, answering)
    groups = GroupBuilder().build(Layout(tensor=config.rollout.parallel.tensor))
    results: list[Evaluation] = []
    for name, path in models.items():
        sampler = _sampler(path, groups, dtype=DTYPES[config.dtype], device=device, vocab_size=vocab_size)
        step = 0 if name == BEFORE else None
        results += answer_suites(
            sampler, suites, problems, tokenizer, model=name, step=step, seed=config.seed, allow_code=allowed
        )
    if dist.get_rank() == 0:
        show_results(results)
        if (config.run_dir / "metrics.jsonl").exists():
            kept = f"{config.run_dir} holds a training run: its own evaluation.json is left as it is"
            Console().print(kept, highlight=False, soft_wrap=True)
        else:
            record_evaluations(config.run_dir, results)


def evaluate_model(
    model: Path,
    suites: Sequence[SuiteConfig],
    *,
    seed: int,
    dtype: str,
    tensor: int,
    max_new_tokens: int,
    out: Path | None,
    allow_code: bool,
) -> None:
    """Grades one Hugging Face directory on suites that name their problems; prints a table. Collective.

    Args:
        max_new_tokens: for suites that do not say.
        out: directory for ``evaluation.json``.

    Raises:
        TropdError: what is wrong with the arguments, the model, or the data.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype is {dtype}: use one of {', '.join(DTYPES)}.")
    device = initialize_distributed()
    architecture, tokenizer = read_architecture(model), load_tokenizer(model)
    # of a training configuration only the defaults of ``data`` count here
    data = DataConfig(prompts=(Path("none"),), max_prompt_tokens=architecture.max_positions)
    whole = complete_suites(EvaluateConfig(suites=tuple(suites)), data, budget=max_new_tokens)
    without = [suite.name for suite in suites if not suite.prompts]
    if without:
        raise ConfigError(
            f"the suite {without[0]!r} names no problems. Give it prompts=FILE, in its file or after MODEL."
        )
    problems = read_problems(whole, data, tokenizer, allow_code=allow_code)
    check_ids({"problem": problems.values()}, tokenizer, vocab_sizes={"model": architecture.vocab_size})
    check_problem_lengths(whole, problems, {"model": architecture})
    groups = GroupBuilder().build(Layout(tensor=tensor))
    sampler = _sampler(model, groups, dtype=DTYPES[dtype], device=device)
    results = answer_suites(
        sampler, whole, problems, tokenizer, model=model.absolute().name, step=None, seed=seed, allow_code=allow_code
    )
    if dist.get_rank() == 0:
        show_results(results)
        if out is not None:
            record_evaluations(out, results)


def show_results(results: Sequence[Evaluation]) -> None:
    """The table of accuracies, and a line for every suite with more to say."""
    console = Console()
    console.print(accuracy_table(results))
    for result in results:
        facts = [f"mean length {result.mean_length:.0f} tokens"]
        if result.finished is not None:
            facts.append(f"{result.finished:.1%} ended by themselves")
        facts += [
            f"pass@{k} {100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
            for k, (mean, low, high) in result.pass_at.items()
        ]
        if result.timed_out:
            facts.append(f"{result.timed_out} answers took too long to grade and count as wrong")
        console.print(
            f"{result.model}, {result.suite}: {', '.join(facts)}", highlight=False, soft_wrap=True, markup=False
        )


def _sampler(
    path: Path, groups: Groups, *, dtype: torch.dtype, device: torch.device, vocab_size: int | None = None
) -> MegatronSampler:
    """A sampler with the weights of a Hugging Face directory."""
    sampler = MegatronSampler(
        read_architecture(path), groups, dtype=dtype, device=device, batch_size=_BATCH, vocab_size=vocab_size
    )
    load_weights(sampler.model, HFWeights(path))
    return sampler
