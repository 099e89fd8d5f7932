"""Measure a sampler on suites of graded problems, with intervals. Collective: ranks share the grading."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megatron_tropd.config.sections import CodeExecution, DataConfig, SuiteConfig
from megatron_tropd.data.tokenizer import Tokenizer
from megatron_tropd.errors import DataError, SandboxError
from megatron_tropd.evaluate.grader_pool import Grade, Item, shared_pool
from megatron_tropd.evaluate.intervals import accuracy_interval, pass_at_k_interval
from megatron_tropd.evaluate.rules import GradingRule
from megatron_tropd.evaluate.thinking import opened_thinking
from megatron_tropd.progress.phases import Phase
from megatron_tropd.report.records import AnswerRecord, Evaluation, record_answers
from megatron_tropd.rollout.guidance import make_requests
from megatron_tropd.rollout.protocol import Sampler, check_finite
from megatron_tropd.types import LOSS_REGIONS, Prompt, Rollout, SamplingParams

logger = logging.getLogger(__name__)

# evaluation draws come from a seed of their own, so that training does not depend on when it is evaluated
_SEED_OFFSET = 1 << 40
_PROMPT_END = 16  # tokens: as many as a mark of thinking may have


def answer_text(rollout: Rollout, tokenizer: Tokenizer) -> str:
    """Return what the models wrote as text, turn by turn up to its end: a tool's answer is not one of theirs.

    Special tokens (``<think>``, ``[TOOL_CALLS]``) are part of it.
    """
    written = np.flatnonzero(np.isin(rollout.region_L, LOSS_REGIONS))
    turns = np.split(written, np.flatnonzero(np.diff(written) > 1) + 1)
    return "".join(tokenizer.response_text(rollout.token_ids[turn].tolist()) for turn in turns)


def training_rule(data: DataConfig, prompt: Prompt) -> GradingRule:
    """Return the rule that grades responses to a training prompt: its source's own, or that of all."""
    return rule_of_source(data, prompt.source)


def rule_of_source(data: DataConfig, name: str) -> GradingRule:
    """Return the rule that grades responses to the prompts of a source: its own, or what ``data`` says of all."""
    source = next((source for source in data.sources if source.name == name), None)
    extract = source.extract if source and source.extract is not None else data.extract
    return GradingRule(
        kind=(source.grader if source else None) or data.grader,
        extract=extract,
        blocks=((source.code if source else None) or data.code).blocks,
    )


def grades(
    rollouts: Sequence[Rollout],
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    rule: Callable[[Prompt], GradingRule],
    *,
    allow_code: CodeExecution,
) -> list[Grade]:
    """Grade every rollout, in order; every prompt has as many of them as the others. Collective.

    An answer cut off by the budget is graded as it stands.

    Raises:
        DataError: a problem has no reference answer.
    """
    per_prompt = len(rollouts) // len(prompts)
    items = []
    for number, rollout in enumerate(rollouts):
        prompt = prompts[number // per_prompt]
        if prompt.answer is None:
            raise DataError(
                f"problem {prompt.index} has no reference answer to grade against. Give data.columns.answer the name "
                "of the column that holds it."
            )
        response = _graded_text(rollout, prompt, tokenizer)
        items.append(Item(rule=rule(prompt), response=response, answer=prompt.answer))
    return _shared_out(items, allow_code=allow_code)


def _graded_text(rollout: Rollout, prompt: Prompt, tokenizer: Tokenizer) -> str:
    """Return a response as text, with the mark before it where the prompt ends in one that opens the thinking."""
    prompt_end = "".join(tokenizer.tokens(prompt.token_ids[-_PROMPT_END:].tolist()))
    return opened_thinking(prompt_end) + answer_text(rollout, tokenizer)


def _shared_out(items: Sequence[Item], *, allow_code: CodeExecution) -> list[Grade]:
    """Grade this rank's part of what takes long and exchange it: all know the same, none does the work of others."""
    pool = shared_pool(allow_code)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return pool.grade(items)
    rank, world = dist.get_rank(), dist.get_world_size()
    parts: list[list[Grade] | None] = [None] * world
    dist.all_gather_object(parts, pool.grade(items[rank::world]))
    found = [iter(part or ()) for part in parts]
    return [next(found[number % world]) for number in range(len(items))]


def correctness(
    rollouts: Sequence[Rollout],
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    rule: Callable[[Prompt], GradingRule],
    *,
    allow_code: CodeExecution,
) -> np.ndarray:
    """Return ``[prompts, samples]`` of 0 and 1, by ``grades``; nan as ``marks_of`` has it."""
    found = grades(rollouts, prompts, tokenizer, rule, allow_code=allow_code)
    unrun = [grade.note for grade in found if grade.unrun]
    if unrun and _is_first():
        logger.warning("%d of %d answers count neither as right nor as wrong: %s", len(unrun), len(found), unrun[0])
    return marks_of(found, prompts=len(prompts))


def marks_of(found: Sequence[Grade], *, prompts: int) -> np.ndarray:
    """Return ``[prompts, samples]`` of 0 and 1; nan where the reference cannot be graded against, or a program run."""
    marks = [np.nan if grade.bad_reference or grade.unrun else float(grade.correct) for grade in found]
    return np.array(marks, dtype=np.float64).reshape(prompts, -1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One suite's graded answers."""

    right: np.ndarray  # [problems, samples] of 0 and 1
    mean_length: float  # tokens per answer
    finished: float = 1.0  # share of answers that ended by themselves
    timed_out: int = 0  # answers whose grading was given up
    left_out: int = 0  # problems that were not posed
    answers: tuple[AnswerRecord, ...] = ()

    @property
    def solved(self) -> float:
        """Return the share of problems with at least one right answer: pass@n of n samples."""
        return float((self.right.max(axis=1) > 0).mean())


def answer_suite(
    sampler: Sampler,
    suite: SuiteConfig,
    problems: Sequence[Prompt],
    tokenizer: Tokenizer,
    *,
    seed: int,
    allow_code: CodeExecution = False,
) -> Answered:
    """Sample and grade the answers of one complete suite (``setup.datasets.complete_suites``). Collective.

    Raises:
        SandboxError: on every rank, when a program could not be run.
    """
    assert suite.max_new_tokens is not None and suite.grader is not None
    budget = suite.max_new_tokens
    requests = make_requests(problems, samples=suite.samples, guided=0, fraction=0.0, max_new_tokens=budget)
    params = SamplingParams(
        max_new_tokens=budget,
        temperature=suite.temperature,
        top_p=suite.top_p,
        top_k=suite.top_k,
        stop_token_ids=tuple(tokenizer.eos_ids),
    )
    what = f"{len(requests):,} answers of at most {budget:,} tokens to the suite {suite.name!r}"
    with Phase(what):
        rollouts = sampler.generate(requests, params, seed=seed + _SEED_OFFSET, step=0)
    check_finite(rollouts, params, f"the model answering the suite {suite.name!r}")
    blocks = "definitions" if suite.code is None else suite.code.blocks
    rule = GradingRule(kind=suite.grader, extract=suite.extract, seconds=suite.timeout_s, blocks=blocks)
    with Phase(f"grading the suite {suite.name!r}"):
        found = grades(rollouts, problems, tokenizer, lambda _: rule, allow_code=allow_code)
    _check_all_ran(suite.name, found)
    _warn_of_ungraded(suite.name, found)
    return Answered(
        right=np.array([grade.correct for grade in found], dtype=np.float64).reshape(len(problems), -1),
        mean_length=float(np.mean([r.response_length for r in rollouts])),
        finished=float(np.mean([rollout.finished for rollout in rollouts])),
        timed_out=sum(grade.timed_out for grade in found),
        left_out=getattr(problems, "left_out", 0),
        answers=_answer_records(rollouts, problems, found, tokenizer),
    )


def _answer_records(
    rollouts: Sequence[Rollout], problems: Sequence[Prompt], found: Sequence[Grade], tokenizer: Tokenizer
) -> tuple[AnswerRecord, ...]:
    samples = len(rollouts) // len(problems)
    records = []
    for number, (rollout, grade) in enumerate(zip(rollouts, found, strict=True)):
        problem = problems[number // samples]
        record = AnswerRecord(
            problem=problem.index,
            sample=number % samples,
            prompt=problem.text,
            reference=problem.answer or "",
            answer=_graded_text(rollout, problem, tokenizer),
            correct=grade.correct,
            note=grade.note,
            finished=rollout.finished,
            tokens=rollout.response_length,
        )
        records.append(record)
    return tuple(records)


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def _check_all_ran(suite: str, found: Sequence[Grade]) -> None:
    unrun = [grade.note for grade in found if grade.unrun]
    if unrun:
        raise SandboxError(f"{suite}: of {len(found)} answers {len(unrun)} cannot be graded: {unrun[0]}")


def _warn_of_ungraded(suite: str, found: Sequence[Grade]) -> None:
    bad = [grade.note for grade in found if grade.bad_reference]
    if bad:
        logger.warning("%s: %d answers count as wrong for want of a reference: %s", suite, len(bad), bad[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluatedModel:
    """Whose answers are graded, and where they are kept."""

    name: str  # ``Evaluation.model``
    step: int | None = None  # training steps done
    answers_dir: Path | None = None  # directory for a file of the answers of each suite; None keeps none


def answer_suites(
    sampler: Sampler,
    suites: Sequence[SuiteConfig],
    problems: Mapping[str, Sequence[Prompt]],
    tokenizer: Tokenizer,
    *,
    model: EvaluatedModel,
    seed: int,
    allow_code: CodeExecution,
) -> list[Evaluation]:
    """Answer and grade every suite in turn, and summarize it. Collective."""
    results = []
    for suite in suites:
        answered = answer_suite(sampler, suite, problems[suite.name], tokenizer, seed=seed, allow_code=allow_code)
        if model.answers_dir is not None and _is_first():
            record_answers(model.answers_dir, model=model.name, suite=suite.name, answers=answered.answers)
        results.append(summarize(answered, suite, model=model.name, step=model.step))
    return results


def summarize(answered: Answered, suite: SuiteConfig, *, model: str, step: int | None = None) -> Evaluation:
    """Return accuracy, mean over samples, and pass@k of one suite with their 95 % intervals."""
    right = answered.right
    interval = accuracy_interval(right[:, 0] if suite.samples == 1 else right)
    return Evaluation(
        model=model,
        suite=suite.name,
        accuracy=interval.mean,
        low=interval.low,
        high=interval.high,
        problems=len(right),
        samples=suite.samples,
        mean_length=answered.mean_length,
        step=step,
        pass_at={str(k): list(pass_at_k_interval(right, k)) for k in suite.pass_at},
        finished=answered.finished,
        timed_out=answered.timed_out,
        left_out=answered.left_out,
    )
