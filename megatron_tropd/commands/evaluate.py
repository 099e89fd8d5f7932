"""Grade models on suites of problems: ``tropd evaluate``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from megatron_tropd.commands.generate import sampler_of
from megatron_tropd.config.run import RunConfig
from megatron_tropd.config.sections import CodeExecution, DataConfig, EvaluateConfig, Layout, SuiteConfig
from megatron_tropd.convert.source import ModelPath, as_source, source_architecture, source_tokenizer
from megatron_tropd.data.tokenizer import Tokenizer, load_tokenizer
from megatron_tropd.engine.weights import hf_tensors
from megatron_tropd.errors import ConfigError, StorageError
from megatron_tropd.evaluate.suites import EvaluatedModel, answer_suites
from megatron_tropd.parallel.groups import GroupBuilder, initialize_distributed
from megatron_tropd.report.records import BEFORE, TEACHER, Evaluation, record_evaluations
from megatron_tropd.report.table import print_accuracies
from megatron_tropd.report.terminal import say
from megatron_tropd.rollout.engines.megatron import MegatronSampler
from megatron_tropd.rollout.guidance import make_requests
from megatron_tropd.rollout.protocol import check_finite
from megatron_tropd.setup.adapters import with_adapters
from megatron_tropd.setup.build import load_model
from megatron_tropd.setup.chat_templates import teacher_problems
from megatron_tropd.setup.claims import held_here, run_directory
from megatron_tropd.setup.datasets import (
    check_ids,
    check_problem_lengths,
    complete_suites,
    read_problems,
    read_tokenizers,
    suites_of,
)
from megatron_tropd.setup.ends import STUDENT, response_ends, stopping_at, tell_ends
from megatron_tropd.setup.validate import DTYPES, check_layouts, check_method, read_architectures
from megatron_tropd.types import Prompt, SamplingParams


def evaluate_models(config: RunConfig, *, limit: int | None = None) -> list[Evaluation]:
    """Grade the student and, with ``evaluate.teacher``, the teacher; print tables, record accuracies. Collective.

    In the directory of a training run nothing is recorded: its own results stay as they were measured.

    Args:
        limit: pose the first so many problems of every suite.
    """
    device = initialize_distributed()
    student, teacher = read_architectures(config)
    check_layouts(config, student, teacher)
    tokenizers, vocab_size = read_tokenizers(config), min(student.vocab_size, teacher.vocab_size)
    ends = response_ends(tokenizers, check_method(config).settings.end_tokens, vocab_size=vocab_size)
    tokenizer = stopping_at(tokenizers[STUDENT], ends.ids)
    tell_ends(ends, enabled=dist.get_rank() == 0)
    suites, allowed = limited(suites_of(config), limit), config.evaluate.code_execution
    problems = read_problems(suites, config.data, tokenizer, allow_code=allowed)
    sizes = {"student": student.vocab_size, "teacher": teacher.vocab_size}
    check_ids({"problem": problems.values()}, tokenizer, vocab_sizes=sizes)
    models, answering = {BEFORE: config.student.source}, {"student": student}
    if config.evaluate.teacher:
        models[TEACHER], answering["teacher"] = config.teacher.source, teacher
    check_problem_lengths(suites, problems, answering)
    posed = {BEFORE: (tokenizer, problems), TEACHER: teacher_problems(config, suites, tokenizer, problems)}
    if config.evaluate.teacher:
        check_problem_lengths(suites, posed[TEACHER][1], {"teacher": teacher})
    kept = None if is_of_training(config.run_dir) else config.run_dir
    for name in models:
        announce(name, suites, posed[name][1])
    groups = GroupBuilder().build(Layout(tensor=config.rollout.parallel.tensor))
    results: list[Evaluation] = []
    for name, source in models.items():
        step, (own, own_problems) = 0 if name == BEFORE else None, posed[name]
        sampler = sampler_of(source, groups, dtype=DTYPES[config.dtype], device=device, vocab_size=vocab_size)
        if name == BEFORE and config.student.lora_path is not None:  # what training would start from
            student_model = load_model(source, groups, dtype=DTYPES[config.dtype], device=device)
            sampler.update_weights(hf_tensors(with_adapters(config, student_model)), version=0)
        check_numbers(sampler, own_problems, own, name)
        results += answer_suites(
            sampler,
            suites,
            own_problems,
            own,
            model=EvaluatedModel(name=name, step=step, answers_dir=kept),
            seed=config.seed,
            allow_code=allowed,
        )
    if dist.get_rank() == 0:
        show_results(results)
        _record(config.run_dir, results)
    return results


def is_of_training(run_dir: Path) -> bool:
    """Say whether a directory is that of a training run, be it one that has only just started."""
    return any((run_dir / name).exists() for name in ("config.yaml", "metrics.jsonl"))


def _record(run_dir: Path, results: Sequence[Evaluation]) -> None:
    """Add to ``evaluation.json``, unless the directory is that of a training run, or has become it meanwhile."""
    why = "holds a training run"
    with ExitStack() as held:
        try:
            held.enter_context(held_here(run_directory(run_dir)))
        except StorageError as error:
            why = f"is not to be had ({error})"
        else:
            if not is_of_training(run_dir):
                record_evaluations(run_dir, results)
                return
    say(f"{run_dir} {why}: its own evaluation.json is left as it is")


def limited(suites: Sequence[SuiteConfig], limit: int | None) -> tuple[SuiteConfig, ...]:
    """Return the suites with at most so many problems each."""
    if limit is None:
        return tuple(suites)
    return tuple(suite.model_copy(update={"max_problems": min(suite.max_problems or limit, limit)}) for suite in suites)


def announce(model: str, suites: Sequence[SuiteConfig], problems: Mapping[str, Sequence[Prompt]]) -> None:
    """Say how many answers a model is about to give, before it is loaded."""
    if dist.get_rank():
        return
    counts = [len(problems[suite.name]) * suite.samples for suite in suites]
    longest = max(suite.max_new_tokens or 0 for suite in suites)
    parts = ", ".join(
        f"{suite.name}: {len(problems[suite.name]):,} problems x {suite.samples} x {suite.max_new_tokens:,} tokens"
        for suite in suites
    )
    text = f"{model}: {sum(counts):,} answers of at most {longest:,} tokens ({parts})"
    say(text)


def check_numbers(
    sampler: MegatronSampler, problems: Mapping[str, Sequence[Prompt]], tokenizer: Tokenizer, model: str
) -> None:
    """Sample one token: EngineError when the model gives no numbers, before thousands of answers. Collective."""
    first = [next(iter(problems.values()))[0]]
    requests = make_requests(first, samples=1, guided=0, fraction=0.0, max_new_tokens=1)
    params = SamplingParams(max_new_tokens=1, temperature=0.0, stop_token_ids=tuple(tokenizer.eos_ids))
    check_finite(sampler.generate(requests, params, seed=0, step=0), params, model)


def evaluate_model(
    model: ModelPath,
    suites: Sequence[SuiteConfig],
    *,
    seed: int,
    dtype: str,
    tensor: int,
    max_new_tokens: int,
    out: Path | None,
    allow_code: CodeExecution,
) -> None:
    """Grade one model on suites that name their problems; print a table. Collective.

    Args:
        max_new_tokens: for suites that do not say.
        out: directory for ``evaluation.json`` and the answers.

    Raises:
        TropdError: what is wrong with the arguments, the model, or the data.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype is {dtype}: use one of {', '.join(DTYPES)}.")
    device = initialize_distributed()
    architecture, tokenizer = source_architecture(model), load_tokenizer(source_tokenizer(model))
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
    name = as_source(model).weights.absolute().name
    announce(name, whole, problems)
    groups = GroupBuilder().build(Layout(tensor=tensor))
    sampler = sampler_of(model, groups, dtype=DTYPES[dtype], device=device)
    check_numbers(sampler, problems, tokenizer, str(as_source(model).weights))
    results = answer_suites(
        sampler,
        whole,
        problems,
        tokenizer,
        model=EvaluatedModel(name=name, answers_dir=out),
        seed=seed,
        allow_code=allow_code,
    )
    if dist.get_rank() == 0:
        show_results(results)
        if out is not None:
            record_evaluations(out, results)


def show_results(results: Sequence[Evaluation]) -> None:
    """Print the table of accuracies, and a line for every suite with more to say."""
    console = Console()
    print_accuracies(console, results)
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
        if result.left_out:
            facts.append(f"{result.left_out} problems left out (too long, or bad rows)")
        say(f"{result.model}, {result.suite}: {', '.join(facts)}", console=console)
