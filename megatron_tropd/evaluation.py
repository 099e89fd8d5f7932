"""Accuracy of a sampler on graded problems, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_tropd.config import RunConfig, SuiteConfig
from megatron_tropd.data.grading import accuracy_interval, grade
from megatron_tropd.data.tokenizer import Tokenizer
from megatron_tropd.errors import DataError
from megatron_tropd.report.records import Evaluation
from megatron_tropd.rollout.guidance import make_requests
from megatron_tropd.rollout.sampler import Sampler
from megatron_tropd.types import Prompt, Rollout, SamplingParams

# evaluation draws come from a seed of their own, so that training does not depend on when it is evaluated
_SEED_OFFSET = 1 << 40


def answer_text(rollout: Rollout, tokenizer: Tokenizer) -> str:
    """The response as text, without special tokens."""
    return tokenizer.decode(rollout.token_ids[rollout.prompt_length :].tolist())


def correctness(
    rollouts: Sequence[Rollout], prompts: Sequence[Prompt], tokenizer: Tokenizer, grader: str, samples: int
) -> np.ndarray:
    """``[problems, samples]`` of 0 and 1. An answer cut off by the budget is graded as it stands.

    Raises:
        DataError: a problem has no reference answer.
    """
    right = np.zeros((len(prompts), samples))
    for number, rollout in enumerate(rollouts):
        prompt = prompts[number // samples]
        if prompt.answer is None:
            raise DataError(
                f"problem {prompt.index} has no reference answer to grade against. Give data.columns.answer the name "
                "of the column that holds it."
            )
        right[number // samples, number % samples] = grade(grader, answer_text(rollout, tokenizer), prompt.answer)
    return right


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """One suite's graded answers."""

    right: np.ndarray  # [problems, samples] of 0 and 1
    mean_length: float  # tokens per answer

    @property
    def solved(self) -> float:
        """Share of problems with at least one right answer: pass@n of n samples."""
        return float((self.right.max(axis=1) > 0).mean())


def answer_suite(
    sampler: Sampler, suite: SuiteConfig, problems: Sequence[Prompt], tokenizer: Tokenizer, *, config: RunConfig
) -> Answered:
    """Samples and grades the answers of one suite. Collective over the sampler's ranks."""
    budget = suite.max_new_tokens or config.rollout.max_new_tokens
    requests = make_requests(problems, samples=suite.samples, guided=0, fraction=0.0, max_new_tokens=budget)
    params = SamplingParams(
        max_new_tokens=budget,
        temperature=suite.temperature,
        top_p=suite.top_p,
        top_k=suite.top_k,
        stop_token_ids=tuple(tokenizer.eos_ids),
    )
    rollouts = sampler.generate(requests, params, seed=config.seed + _SEED_OFFSET, step=0)
    return Answered(
        right=correctness(rollouts, problems, tokenizer, config.data.grader, suite.samples),
        mean_length=float(np.mean([len(r.token_ids) - r.prompt_length for r in rollouts])),
    )


def summarise(answered: Answered, suite: SuiteConfig, *, model: str, step: int | None = None) -> Evaluation:
    """Accuracy of one suite with its 95 % interval."""
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
    )
