"""A model's own answers: written to a file, or graded. What ``tropd generate`` and ``tropd evaluate`` do."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from megatron_tropd.config import RunConfig
from megatron_tropd.convert.hf import HFWeights, read_architecture
from megatron_tropd.data.prompts import Columns, read_prompts
from megatron_tropd.data.tokenizer import Tokenizer, load_tokenizer
from megatron_tropd.engine.weights import load_weights
from megatron_tropd.errors import ConfigError
from megatron_tropd.evaluation import answer_suite, answer_text, summarise
from megatron_tropd.inputs import (
    DTYPES,
    check_ids,
    check_layouts,
    check_problem_lengths,
    read_architectures,
    read_problems,
    read_tokenizer,
    why_not_written,
)
from megatron_tropd.parallel.groups import GroupBuilder, Groups, Layout, initialize_distributed
from megatron_tropd.report.records import BEFORE, TEACHER, Evaluation, record_evaluations
from megatron_tropd.report.table import accuracy_table
from megatron_tropd.rollout.guidance import make_requests
from megatron_tropd.rollout.megatron import MegatronSampler
from megatron_tropd.types import Prompt, Rollout, SamplingParams

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
    check_ids({"prompt": found}, tokenizer, vocab_sizes={"model": architecture.vocab_size})
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


def _read_prompts(path: Path, tokenizer: Tokenizer, column: str) -> tuple[Prompt, ...]:
    # responses and answers that the file may have are copied, not read: any kind will do
    unread = "\0"
    return read_prompts(path, tokenizer, columns=Columns(prompt=column, response=unread, answer=unread)).prompts


def _check_room(prompts: Sequence[Prompt], budget: int, positions: int) -> None:
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    room = positions - len(longest.token_ids)
    if budget > room:
        raise ConfigError(
            f"the prompt on line {longest.index + 1} has {len(longest.token_ids)} tokens and the model {positions} "
            f"positions (max_position_embeddings): there is room for {max(room, 0)} more, not for --max-new-tokens "
            f"{budget}. " + (f"Give --max-new-tokens {room} or less." if room > 0 else "Leave that prompt out.")
        )


def _write_rows(source: Path, out: Path, rollouts: Sequence[Rollout], texts: Sequence[str], column: str) -> None:
    lines = source.read_text(encoding="utf-8-sig").split("\n")
    partial = out.with_name(out.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for rollout, text in zip(rollouts, texts, strict=True):
            row = json.loads(lines[rollout.prompt_index]) | {column: text}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(partial, out)


def evaluate_models(config: RunConfig) -> None:
    """Grades the student and, with ``evaluate.teacher``, the teacher; prints tables, records accuracies. Collective.

    In the directory of a training run nothing is recorded: its own results stay as they were measured.
    """
    device = initialize_distributed()
    student, teacher = read_architectures(config)
    check_layouts(config, student, teacher)
    tokenizer, vocab_size = read_tokenizer(config), min(student.vocab_size, teacher.vocab_size)
    problems = read_problems(config, tokenizer)
    sizes = {"student": student.vocab_size, "teacher": teacher.vocab_size}
    check_ids({"problem": problems}, tokenizer, vocab_sizes=sizes)
    check_problem_lengths(config, problems, {"student": student, "teacher": teacher})
    groups = GroupBuilder().build(Layout(tensor=config.rollout.parallel.tensor))
    models = {BEFORE: config.student.model}
    if config.evaluate.teacher:
        models[TEACHER] = config.teacher.model
    results: list[Evaluation] = []
    solved: list[tuple[str, str, int, float]] = []
    for name, path in models.items():
        sampler = _sampler(path, groups, dtype=DTYPES[config.dtype], device=device, vocab_size=vocab_size)
        for suite in config.evaluate.suites:
            answered = answer_suite(sampler, suite, problems, tokenizer, config=config)
            results.append(summarise(answered, suite, model=name, step=0 if name == BEFORE else None))
            solved.append((name, suite.name, suite.samples, answered.solved))
    if dist.get_rank() == 0:
        _show_results(config, results, solved)


def _show_results(
    config: RunConfig, results: Sequence[Evaluation], solved: Sequence[tuple[str, str, int, float]]
) -> None:
    console = Console()
    console.print(accuracy_table(results))
    for model, suite, samples, share in solved:
        if samples > 1:
            solved_by = f"{share:.1%} of problems solved by one of {samples} answers (pass@{samples})"
            console.print(f"{model}, {suite}: {solved_by}", highlight=False, soft_wrap=True)
    if (config.run_dir / "metrics.jsonl").exists():
        kept = f"{config.run_dir} holds a training run: its own evaluation.json is left as it is"
        console.print(kept, highlight=False, soft_wrap=True)
        return
    config.run_dir.mkdir(parents=True, exist_ok=True)
    record_evaluations(config.run_dir, results)


def _sampler(
    path: Path, groups: Groups, *, dtype: torch.dtype, device: torch.device, vocab_size: int | None = None
) -> MegatronSampler:
    """A sampler with the weights of a Hugging Face directory."""
    sampler = MegatronSampler(
        read_architecture(path), groups, dtype=dtype, device=device, batch_size=_BATCH, vocab_size=vocab_size
    )
    load_weights(sampler.model, HFWeights(path))
    return sampler
