"""The metrics of a step, from what was sampled, what was learned and how long it took (``report.metrics`` explains)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial

import numpy as np

from megatron_tropd.engine.rows import computed_rows
from megatron_tropd.engine.step import StepResult, means_over_tokens
from megatron_tropd.evaluate.suites import correctness, training_rule
from megatron_tropd.report.metrics import of_source
from megatron_tropd.report.stopwatch import Stopwatch
from megatron_tropd.rollout.dispatch import versions_of
from megatron_tropd.setup.build import Run
from megatron_tropd.train.rewards import BatchRewards
from megatron_tropd.train.rollout_queue import Batch, RolloutQueue
from megatron_tropd.types import Prompt, Region, Rollout


def step_metrics(
    run: Run,
    queue: RolloutQueue,
    batch: Batch,
    results: Sequence[StepResult],
    *,
    step: int,
    watch: Stopwatch,
    rewards: BatchRewards,
) -> dict[str, float]:
    """Collect the metrics of ``step``: its batch, its updates, and the seconds of its parts."""
    metrics = describe(run, step, batch, results, rewards) | watch.metrics()
    metrics["time_optimizer"] = sum(result.optimizer_seconds for result in results)
    if run.offloads:
        metrics["time_offload"] = run.world.offload_stats.take_seconds()
    if run.rollout.ahead:
        metrics["time_rollout_hidden"] = queue.hidden_seconds()
    metrics["tokens_per_second"] = metrics["tokens"] / metrics["time_step"]
    return metrics


def describe(
    run: Run, step: int, batch: Batch, results: Sequence[StepResult], rewards: BatchRewards
) -> dict[str, float]:
    """Describe what was sampled and learned."""
    prompts, rollouts = batch.prompts, batch.scored.rollouts
    responses = [r.response_length for r in rollouts]
    prefixes, observed = ([r.count(region) for r in rollouts] for region in (Region.PREFIX, Region.OBSERVATION))
    loss, stats = means_over_tokens(results)
    metrics: dict[str, float] = {
        "step": step + 1,
        "sequences": len(rollouts),
        "tokens": sum(result.predictions for result in results),
        "rows_fraction": _rows_fraction(batch),
        "loss": loss,
        "grad_norm": float(np.mean([result.grad_norm for result in results])),
        "lr": results[-1].lr,
        "response_length": float(np.mean(responses)),
        "continuation_length": float(np.mean(np.subtract(responses, prefixes))),
        "finished_fraction": float(np.mean([r.finished for r in rollouts])),
    }
    if any(observed):
        metrics["observation_length"] = float(np.mean(observed))
    metrics |= stats
    if run.method.guided and run.rollout.guided_per_prompt:
        guided = run.rollout.guided_per_prompt
        metrics["prefix_fraction"] = batch.fraction
        metrics["prefix_length"] = sum(prefixes) / (len(prompts) * guided)
    if run.rollout.ahead:
        metrics |= _staleness(rollouts, step)
    metrics |= _training_accuracy(run, prompts, rollouts, rewards.marks)
    metrics |= of_rewards(rewards) if run.method.needs.reward else {}
    return metrics | _length_by_source(prompts, rollouts)


def of_rewards(rewards: BatchRewards) -> dict[str, float]:
    """Average the rewards of the student's own answers, and say how much their advantages leave to learn from."""
    found = {"reward_missing": float(rewards.missing)}
    if rewards.advantages:
        found["reward_mean"] = float(np.mean(rewards.own))
        found["reward_advantage"] = float(np.mean(np.abs([*rewards.advantages.values()])))
    return found


def _rows_fraction(batch: Batch) -> float:
    """Return the share of the packs' tokens, padding included, that is computed."""
    packs = [one for minibatch in batch.scored.packs for replica in minibatch for one in replica]
    return sum(map(computed_rows, packs)) / sum(len(one.token_T) for one in packs)


def _staleness(rollouts: Sequence[Rollout], step: int) -> dict[str, float]:
    """Count how many steps ago the weights were new that wrote the tokens."""
    empty = np.empty(0, np.int64)
    versions = np.concatenate([empty, *(versions_of(rollout) for rollout in rollouts)])
    ages = step - versions
    return {"staleness_mean": float(ages.mean()), "staleness_max": float(ages.max())} if len(ages) else {}


def _length_by_source(prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Count sequences and average response lengths of every source, where there are several."""
    lengths: dict[str, list[int]] = {}
    per_prompt = len(rollouts) // len(prompts)
    for number, rollout in enumerate(rollouts):
        source = prompts[number // per_prompt].source
        lengths.setdefault(source, []).append(rollout.response_length)
    metrics: dict[str, float] = {}
    for source, found in sorted(lengths.items()):
        if source:
            metrics[of_source("sequences", source)] = len(found)
            metrics[of_source("response_length", source)] = float(np.mean(found))
    return metrics


def _training_accuracy(
    run: Run, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], marks: np.ndarray | None
) -> dict[str, float]:
    """Grade the fully on-policy responses: of all prompts, and of every source, where each has answers.

    ``marks``: their grades, where rewards have needed them already.
    Prompts without an answer that they can be graded against are left out; the start of the run has counted them.
    """
    samples = run.rollout.samples_per_prompt
    per_prompt = len(rollouts) // len(prompts)
    answered = [number for number, prompt in enumerate(prompts) if prompt.answer is not None]
    if not samples or not answered:
        return {}
    posed = [prompts[number] for number in answered]
    if marks is None:
        alone = [rollouts[number * per_prompt + sample] for number in answered for sample in range(samples)]
        allowed = run.evaluate.code_execution
        marks = correctness(alone, posed, run.tokenizer, partial(training_rule, run.data), allow_code=allowed)
    return _accuracy_by_source(marks, [prompt.source for prompt in posed], {prompt.source for prompt in prompts})


def _accuracy_by_source(right: np.ndarray, sources: Sequence[str], of: Collection[str]) -> dict[str, float]:
    """Average ``right``: [prompts, samples] of 0 and 1, nan where it is unknown; ``of``: the sources of all prompts."""
    usable = ~np.isnan(right).any(axis=1)
    marks = {source: right[usable & (np.array(sources) == source)] for source in sources}
    found = {source: marks[source].mean() for source in sorted(marks) if len(marks[source])}
    metrics = {"accuracy_train": float(right[usable].mean())} if found.keys() == set(of) else {}
    return metrics | {of_source("accuracy_train", source): float(mean) for source, mean in found.items() if source}
