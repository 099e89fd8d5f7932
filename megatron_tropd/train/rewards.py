"""Rewards of a batch's answers: by the graders of the data, or by a function of the user's; and their advantages.

An answer whose reward is not known (its grader gave up, the function raised, or gave what is no number) is not worth 0:
it is named, counted, in no group, and without an advantage.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_tropd.errors import DataError
from megatron_tropd.evaluate.suites import answer_text, grades, marks_of, training_rule
from megatron_tropd.losses.advantages import advantages
from megatron_tropd.progress.phases import Phase
from megatron_tropd.setup.build import Run
from megatron_tropd.setup.rewards import RewardFunction
from megatron_tropd.types import Prompt, Region, Rollout

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BatchRewards:
    """The rewards of a batch, equal on every rank, by sequence id; answers without a reward are in neither."""

    rewards: Mapping[int, float] = field(default_factory=dict)
    advantages: Mapping[int, float] = field(default_factory=dict)  # of the student's own answers
    missing: int = 0  # answers without a reward
    marks: np.ndarray | None = None  # [answered prompts, samples] grades of the student's own; None: not graded here

    @property
    def own(self) -> list[float]:
        """Return the rewards of the student's own answers."""
        return [self.rewards[sequence] for sequence in self.advantages]


@dataclass(frozen=True, slots=True)
class _Found:
    """Rewards of all answers, nan where there is none, and why, in words; marks as of BatchRewards."""

    reward_PS: np.ndarray
    faults: Sequence[str]
    marks: np.ndarray | None = None
    failed: bool = False  # whether the function failed for every prompt


def reward_batch(run: Run, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], *, step: int | None) -> BatchRewards:
    """Reward every answer, if the method looks at rewards. Collective; equal on every rank.

    All ranks have all answers, so that a group whose answers are learned from on several replicas is one group. Answers
    that begin with a teacher's prefix have a reward, which gates look at, but are in no group and have no advantage.

    Args:
        step: that learns from them; None: they are only shown.

    Raises:
        DataError: the user's function failed for every prompt of a step.
    """
    if not run.method.needs.reward:
        return BatchRewards()
    per_prompt, own = len(rollouts) // len(prompts), _own_samples(run, prompts, rollouts)
    answers = [rollouts[number * per_prompt : (number + 1) * per_prompt] for number in range(len(prompts))]
    with Phase(f"rewarding {len(rollouts):,} answers"):
        if run.reward_function is None:
            found = _by_grader(run, prompts, rollouts, own)
        else:
            found = _by_function(run, run.reward_function, prompts, answers, own)
    if found.failed and step is not None:
        raise DataError(
            f"reward.function={run.reward.function} rewarded no answer to any of {len(prompts)} prompts: "
            f"{found.faults[0]}. Mend the function; the run resumes from its newest checkpoint."
        )
    if found.faults and dist.get_rank() == 0:
        _name(found.faults, "answers shown" if step is None else f"step {step + 1}")
    advantage_PS = advantages(found.reward_PS[:, :own], run.reward.advantage)
    ids_PS = np.array([[one.sequence_id for one in group] for group in answers])
    known_PS = ~np.isnan(found.reward_PS)
    mine_PS = known_PS[:, :own]
    return BatchRewards(
        rewards=dict(zip(ids_PS[known_PS].tolist(), found.reward_PS[known_PS].tolist(), strict=True)),
        advantages=dict(zip(ids_PS[:, :own][mine_PS].tolist(), advantage_PS[mine_PS].tolist(), strict=True)),
        missing=int((~known_PS).sum()),
        marks=found.marks,
    )


def _own_samples(run: Run, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> int:
    """Count the answers to each prompt, the first ones, that the student writes by itself."""
    return min(run.rollout.samples_per_prompt, len(rollouts) // len(prompts))


def _name(faults: Sequence[str], where: str) -> None:
    """Say which answers have no reward, the first of them in words."""
    more = f"; and {len(faults) - 1} more faults" if len(faults) > 1 else ""
    logger.warning("%s: answers without a reward, which teach nothing of it: %s%s", where, faults[0], more)


# --------------------------------------------------------------------------- by the graders


def _by_grader(run: Run, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], own: int) -> _Found:
    """Grade the answers, 1 right and 0 wrong; nan where there is nothing to grade against, or the grader gave up.

    Prompts without a reference answer have been counted at the start of the run: they are no fault of a step.
    """
    per_prompt = len(rollouts) // len(prompts)
    reward_PS = np.full((len(prompts), per_prompt), np.nan)
    answered = [number for number, prompt in enumerate(prompts) if prompt.answer is not None]
    if not answered:
        return _Found(reward_PS, ())
    posed = [prompts[number] for number in answered]
    flat = [rollouts[number * per_prompt + i] for number in answered for i in range(per_prompt)]
    rule, allowed = partial(training_rule, run.data), run.evaluate.code_execution
    found = grades(flat, posed, run.tokenizer, rule, allow_code=allowed)
    unknown = [number for number, grade in enumerate(found) if grade.bad_reference or grade.given_up]
    marks = marks_of(found, prompts=len(posed))
    known = marks.reshape(-1).copy()
    known[unknown] = np.nan
    reward_PS[answered] = known.reshape(marks.shape)
    faults = [f"{_place(posed[number // per_prompt])}: {found[number].note}" for number in unknown]
    return _Found(reward_PS, faults, marks[:, :own] if own else None)


def _place(prompt: Prompt) -> str:
    return f"prompt {prompt.index}{f' of {prompt.source}' if prompt.source else ''}"


# --------------------------------------------------------------------------- by a function


def _by_function(
    run: Run, function: RewardFunction, prompts: Sequence[Prompt], answers: Sequence[Sequence[Rollout]], own: int
) -> _Found:
    """Call the user's function once per prompt, each rank for its share of them; every rank is told all results."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = [_called(run, function, prompts[i], answers[i], own) for i in range(rank, len(prompts), world)]
    everyone: list[list[tuple[list[float] | None, list[str]]]] = [[]] * world
    dist.all_gather_object(everyone, mine)
    shares = [iter(share) for share in everyone]
    found = [next(shares[number % world]) for number in range(len(prompts))]
    faults = [fault for _, said in found for fault in said]
    unknown = [math.nan] * len(answers[0])
    reward_PS = np.array([unknown if rewards is None else rewards for rewards, _ in found])
    return _Found(reward_PS, faults, failed=all(rewards is None for rewards, _ in found))


def _called(
    run: Run, function: RewardFunction, prompt: Prompt, answers: Sequence[Rollout], own: int
) -> tuple[list[float] | None, list[str]]:
    """Return a reward per answer, nan where it is no finite number, and what was wrong; None where the call failed."""
    given: dict[str, Any] = {
        "prompt": prompt.text,
        "answer": prompt.answer,
        "source": prompt.source,
        "responses": [answer_text(one, run.tokenizer) for one in answers],
        "finished": [one.finished for one in answers],
        "tokens": [one.response_length for one in answers],
        "guided": [number >= own or bool(one.count(Region.PREFIX)) for number, one in enumerate(answers)],
    }
    place = f"all {len(answers)} answers to {_place(prompt)}"
    try:
        said = function.call(**{name: given[name] for name in function.takes})
        values = list(said)
    except (Exception, SystemExit) as error:  # the user's code may raise anything; all ranks are to hear of it
        return None, [f"{place}: {function.written} raised {type(error).__name__}: {error}"]
    if isinstance(said, str | bytes | Mapping) or len(values) != len(answers):
        kind = f"a {type(said).__name__} of {len(values)}"
        return None, [f"{place}: {function.written} returned {kind}, not a reward for each of the responses"]
    rewards = [_number(value) for value in values]
    bad = [number for number, reward in enumerate(rewards) if math.isnan(reward)]
    return rewards, [
        f"answer {number + 1} to {_place(prompt)}: {function.written} returned {values[number]!r}, no finite number"
        for number in bad
    ]


def _number(value: Any) -> float:
    """Return a finite number as it is, nan for anything else."""
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # RuntimeError: a tensor of several numbers
        return math.nan
    return number if math.isfinite(number) else math.nan
