"""The program on one page: sample, pack, grade, learn, publish, report, save."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from itertools import chain

import numpy as np

from megatron_tropd.engine.batch import BatchFacts, batch_entropy_threshold, batch_weights, train_packs
from megatron_tropd.engine.checkpoint import save_checkpoint
from megatron_tropd.engine.step import StepResult
from megatron_tropd.engine.views import TrainPack
from megatron_tropd.evaluate.suites import correctness, training_rule
from megatron_tropd.report.metrics import of_source
from megatron_tropd.report.progress import TrainingProgress
from megatron_tropd.report.sinks import MetricsWriter
from megatron_tropd.report.stopwatch import Stopwatch
from megatron_tropd.rollout.dispatch import versions_of
from megatron_tropd.rollout.mismatch import MismatchMonitor
from megatron_tropd.setup.build import Run
from megatron_tropd.train.rollout_queue import Batch, Batches, ScoredRollouts
from megatron_tropd.types import Prompt, Region, Rollout
from megatron_tropd.weight_sync.interface import ProbeableSampler
from megatron_tropd.weight_sync.publishers import WeightStream
from megatron_tropd.weight_sync.verify import probe_of, verify_publish

AfterStep = Callable[[int], None]  # told the number of finished steps
Pause = Callable[[int], None]  # the same, wherever the weights are those of that many steps: it may leave by raising


def train(
    run: Run,
    batches: Batches,
    *,
    first_step: int,
    writer: MetricsWriter | None,
    after_step: AfterStep | None = None,
    pause: Pause | None = None,
) -> None:
    """Trains from ``first_step`` to the end. Collective; ``writer`` on the first rank only.

    ``pause`` is called after every step, and within a step after rollouts, which are the longest part of it.
    """
    watch = Stopwatch()
    gaps = MismatchMonitor(run.dtype, run.rollout.gap_warning)
    with TrainingProgress(run.train.steps, done=first_step, enabled=run.world.is_first) as progress:
        for step in range(first_step, run.train.steps):
            watch.reset()
            run.world.moves.take_seconds()  # what checkpoints and evaluations have moved is not this step's
            collected = _nothing if pause is None else partial(pause, step)
            batches.begin(step, watch=watch)
            batch = batches.take(step, watch=watch, collected=collected)
            minibatches = score_and_pack(run, batch.scored, step=step, watch=watch)
            # what is sampled with these weights is waited for before they change
            settle = partial(batches.settle, watch=watch, collected=collected)
            with watch("train"):
                results = [
                    run.trainer.step(packs, update=step * run.train.minibatches + number, before_update=settle)
                    for number, packs in enumerate(minibatches)
                ]
                run.trainer.rest()
            with watch("publish"):
                publish(run, step + 1)
            metrics = describe(run, step, batch, results) | watch.metrics()
            metrics["time_optimizer"] = sum(result.optimizer_seconds for result in results)
            if run.offloads:
                metrics["time_offload"] = run.world.moves.take_seconds()
            metrics["tokens_per_second"] = metrics["tokens"] / metrics["time_step"]
            if run.rollout.ahead:
                metrics["time_rollout_hidden"] = batches.hidden_seconds()
            if writer is not None:
                writer.write(metrics)
                gaps.look(metrics)
            progress.update(metrics)
            # before the checkpoint: a run killed in between repeats what follows the step, instead of leaving it out
            if after_step is not None:
                after_step(step + 1)
            if is_due(step + 1, every=run.checkpoint.every, last=run.train.steps):
                save(run, batches, step + 1)
            if pause is not None:
                pause(step + 1)


def _nothing() -> None:
    """What is done after rollouts where nobody may ask the run to stop."""


def publish(run: Run, version: int) -> None:
    """Hands the student's weights to the sampler and makes sure that they have arrived. Collective."""
    rollout = run.rollout
    run.sampler.update_weights(WeightStream(run.student), version=version)
    if isinstance(run.sampler, ProbeableSampler) and rollout.verify:
        longest = run.data.max_prompt_tokens + rollout.max_new_tokens
        probe = probe_of(run.prompts.prompts[0], longest)
        verify_publish(run.student, run.sampler, probe, rollout.verify_tolerance)


def score_and_pack(run: Run, scored: ScoredRollouts, *, step: int, watch: Stopwatch) -> list[list[TrainPack]]:
    """Pack this replica's share of every minibatch, scored by the teacher.

    All scoring happens before the first update, so gates and old log-probs belong to the weights that sampled.
    """
    with watch("teacher"):
        outputs = [pending() for pending in scored.grades]
    facts = BatchFacts(
        seed=run.seed,
        step=step,
        progress=step / run.train.steps,
        special_token_ids=tuple(run.tokenizer.eos_ids),
        entropy_threshold=batch_entropy_threshold([*chain(*scored.scores)], run.method, run.world.student),
    )
    by_id = {rollout.sequence_id: rollout for rollout in scored.rollouts}
    with watch("pack"):
        return [
            train_packs(
                packs[run.world.student.replica],
                batch_weights(packs, run.method, facts, run.world.student),
                output,
                score,
                rollouts=by_id,
                method=run.method,
                facts=facts,
                model=run.student,
            )
            for packs, output, score in zip(scored.packs, outputs, scored.scores, strict=True)
        ]


def describe(run: Run, step: int, batch: Batch, results: Sequence[StepResult]) -> dict[str, float]:
    """The step in numbers (``report.metrics`` says what each means)."""
    prompts, rollouts = batch.prompts, batch.scored.rollouts
    responses = [r.response_length for r in rollouts]
    prefixes, observed = ([r.count(region) for r in rollouts] for region in (Region.PREFIX, Region.OBSERVATION))
    metrics: dict[str, float] = {
        "step": step + 1,
        "sequences": len(rollouts),
        "tokens": sum(responses),
        "loss": float(np.mean([result.loss for result in results])),
        "grad_norm": float(np.mean([result.grad_norm for result in results])),
        "lr": results[-1].lr,
        "response_length": float(np.mean(responses)),
        "continuation_length": float(np.mean(np.subtract(responses, prefixes))),
        "finished_fraction": float(np.mean([r.finished for r in rollouts])),
    }
    if any(observed):
        metrics["observation_length"] = float(np.mean(observed))
    names = set().union(*(result.stats for result in results))
    metrics |= {n: float(np.mean([r.stats[n] for r in results if n in r.stats])) for n in sorted(names)}
    if run.method.guided and run.rollout.guided_per_prompt:
        guided = run.rollout.guided_per_prompt
        metrics["prefix_fraction"] = batch.fraction
        metrics["prefix_length"] = sum(prefixes) / (len(prompts) * guided)
    if run.rollout.ahead:
        metrics |= _staleness(rollouts, step)
    metrics |= _training_accuracy(run, prompts, rollouts)
    return metrics | _length_by_source(prompts, rollouts)


def _staleness(rollouts: Sequence[Rollout], step: int) -> dict[str, float]:
    """How many steps ago the weights were new that wrote the tokens."""
    empty = np.empty(0, np.int64)
    versions = np.concatenate([empty, *(versions_of(rollout) for rollout in rollouts)])
    ages = step - versions
    return {"staleness_mean": float(ages.mean()), "staleness_max": float(ages.max())} if len(ages) else {}


def _length_by_source(prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Sequences and mean response length of every source, where there are several."""
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


def _training_accuracy(run: Run, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Share of correct fully on-policy responses: of all prompts, and of every source, where each has answers.

    Prompts without an answer that they can be graded against are left out; the start of the run has counted them.
    """
    samples = run.rollout.samples_per_prompt
    per_prompt = len(rollouts) // len(prompts)
    answered = [number for number, prompt in enumerate(prompts) if prompt.answer is not None]
    if not samples or not answered:
        return {}
    alone = [rollouts[number * per_prompt + sample] for number in answered for sample in range(samples)]
    graded = [prompts[number] for number in answered]
    allowed = run.evaluate.allow_code_execution
    right = correctness(alone, graded, run.tokenizer, partial(training_rule, run.data), allow_code=allowed)
    return _accuracy_by_source(right, [prompt.source for prompt in graded], {prompt.source for prompt in prompts})


def _accuracy_by_source(right: np.ndarray, sources: Sequence[str], of: Collection[str]) -> dict[str, float]:
    """``right``: [prompts, samples] of 0 and 1, nan where it cannot be told; ``of``: the sources of all prompts."""
    usable = ~np.isnan(right).any(axis=1)
    marks = {source: right[usable & (np.array(sources) == source)] for source in sources}
    found = {source: marks[source].mean() for source in sorted(marks) if len(marks[source])}
    metrics = {"accuracy_train": float(right[usable].mean())} if found.keys() == set(of) else {}
    return metrics | {of_source("accuracy_train", source): float(mean) for source, mean in found.items() if source}


def is_due(step: int, *, every: int, last: int) -> bool:
    """Whether ``step`` finished steps are a whole number of ``every``, or all there will be; never with ``every=0``."""
    return every > 0 and (step % every == 0 or step == last)


def save(run: Run, batches: Batches, step: int) -> None:
    """A checkpoint after ``step`` finished steps."""
    save_checkpoint(
        run.run_dir / "checkpoints",
        run.student,
        run.trainer.optimization,
        step=step,
        state={"run": run.identity},
        keep=run.checkpoint.keep,
        beside_it=partial(batches.save, step=step),
    )
