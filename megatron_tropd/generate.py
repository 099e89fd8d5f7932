"""A model's own answers: written to a file, or graded. What ``tropd generate`` and ``tropd evaluate`` do."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from megatron_tropd.build import DTYPES, read_problems, read_tokenizers
from megatron_tropd.config import RunConfig
from megatron_tropd.convert.hf import HFWeights, read_architecture
from megatron_tropd.data.prompts import Columns, read_prompts
from megatron_tropd.data.tokenizer import load_tokenizer
from megatron_tropd.engine.weights import load_weights
from megatron_tropd.errors import ConfigError
from megatron_tropd.evaluation import answer_text, evaluate_suite
from megatron_tropd.parallel.groups import GroupBuilder, Groups, Layout, initialize_distributed
from megatron_tropd.report.records import BEFORE, TEACHER, Evaluation, record_evaluations
from megatron_tropd.report.table import accuracy_table
from megatron_tropd.rollout.guidance import make_requests
from megatron_tropd.rollout.megatron import MegatronSampler
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
    if dtype not in DTYPES:
        raise ConfigError(f"dtype is {dtype!r}: use one of {', '.join(DTYPES)}.")
    if samples < 1:
        raise ConfigError(f"samples is {samples}: ask for at least 1 response per prompt.")
    device = initialize_distributed()
    tokenizer = load_tokenizer(model)
    found = read_prompts(prompts, tokenizer, columns=Columns(prompt=columns[0])).prompts
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
        Console().print(f"{len(texts)} responses in {out} ({cut} cut off by max_new_tokens)", highlight=False)


def _write_rows(source: Path, out: Path, rollouts: Sequence[Rollout], texts: Sequence[str], column: str) -> None:
    lines = source.read_text(encoding="utf-8").split("\n")
    partial = out.with_name(out.name + ".partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("w", encoding="utf-8") as file:
        for rollout, text in zip(rollouts, texts, strict=True):
            row = json.loads(lines[rollout.prompt_index]) | {column: text}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(partial, out)


def evaluate_models(config: RunConfig) -> None:
    """Evaluates the student and, with ``evaluate.teacher``, the teacher; prints the table and records it. Collective."""
    device = initialize_distributed()
    tokenizer, vocab_size = read_tokenizers(config)
    problems = read_problems(config, tokenizer)
    groups = GroupBuilder().build(Layout(tensor=config.rollout.parallel.tensor))
    models = {BEFORE: config.student.model}
    if config.evaluate.teacher:
        models[TEACHER] = config.teacher.model
    results: list[Evaluation] = []
    for name, path in models.items():
        sampler = _sampler(path, groups, dtype=DTYPES[config.dtype], device=device, vocab_size=vocab_size)
        results += [
            evaluate_suite(
                sampler,
                suite,
                problems,
                tokenizer,
                grader=config.data.grader,
                max_new_tokens=config.rollout.max_new_tokens,
                seed=config.seed,
                model=name,
                step=0 if name == BEFORE else None,
            )
            for suite in config.evaluate.suites
        ]
    if dist.get_rank() == 0:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        record_evaluations(config.run_dir, results)
        Console().print(accuracy_table(results))


def _sampler(
    path: Path, groups: Groups, *, dtype: torch.dtype, device: torch.device, vocab_size: int | None = None
) -> MegatronSampler:
    """A sampler with the weights of a Hugging Face directory."""
    sampler = MegatronSampler(
        read_architecture(path), groups, dtype=dtype, device=device, batch_size=_BATCH, vocab_size=vocab_size
    )
    load_weights(sampler.model, HFWeights(path))
    return sampler
