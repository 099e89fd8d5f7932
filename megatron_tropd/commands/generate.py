"""Write a model's own answers to a file: ``tropd generate``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from rich.console import Console

from megatron_tropd.convert.hf import HFWeights, read_architecture
from megatron_tropd.data.files import find_files, read_rows
from megatron_tropd.data.prompts import read_prompts
from megatron_tropd.data.rows import Columns
from megatron_tropd.data.table import PromptTable
from megatron_tropd.data.tokenizer import Tokenizer, load_tokenizer
from megatron_tropd.engine.weights import load_weights
from megatron_tropd.errors import ConfigError
from megatron_tropd.evaluate.suites import answer_text
from megatron_tropd.parallel.groups import GroupBuilder, Groups, Layout, initialize_distributed
from megatron_tropd.rollout.engines.megatron import MegatronSampler
from megatron_tropd.rollout.guidance import make_requests
from megatron_tropd.setup.datasets import check_ids
from megatron_tropd.setup.validate import DTYPES, why_not_written
from megatron_tropd.storage.write_aside import write_aside
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
    sampler = sampler_of(model, GroupBuilder().build(Layout()), dtype=DTYPES[dtype], device=device)
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

    def write(file: BinaryIO) -> None:
        for index, row in _numbered_rows(source):
            for text in answers.get(index, ()):
                # a table may hold dates and the like, which JSON writes as text
                line = json.dumps({**row, column: text}, ensure_ascii=False, default=str)
                file.write(line.encode() + b"\n")

    write_aside(out, write)


def _numbered_rows(source: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows by ``Prompt.index``."""
    before = 0
    for path in find_files(source):
        number = 0
        for number, content in ((row.number, row.content) for row in read_rows(path, columns=None)):
            if isinstance(content, dict):
                yield before + number - 1, content
        before += number


def sampler_of(
    path: Path, groups: Groups, *, dtype: torch.dtype, device: torch.device, vocab_size: int | None = None
) -> MegatronSampler:
    """A sampler with the weights of a Hugging Face directory."""
    sampler = MegatronSampler(
        read_architecture(path), groups, dtype=dtype, device=device, batch_size=_BATCH, vocab_size=vocab_size
    )
    load_weights(sampler.model, HFWeights(path))
    return sampler
