"""The program on one page: sample, pack, grade, learn, publish, report, save."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

from megatron_tropd.build import Run
from megatron_tropd.data.packing import pack
from megatron_tropd.engine.batch import BatchFacts, StudentScores, batch_weights, train_packs
from megatron_tropd.engine.checkpoint import save_checkpoint
from megatron_tropd.engine.score import score_packs
from megatron_tropd.engine.step import StepResult, TrainPack
from megatron_tropd.engine.weights import hf_tensors
from megatron_tropd.evaluation import correctness
from megatron_tropd.losses.reduce import entropy_threshold
from megatron_tropd.parallel.arrays import all_gather_arrays
from megatron_tropd.report.progress import TrainingProgress
from megatron_tropd.report.sinks import MetricsWriter
from megatron_tropd.rollout.guidance import make_requests
from megatron_tropd.rollout.recorded import write_rollouts
from megatron_tropd.types import Pack, Prompt, Rollout, SamplingParams

AfterStep = Callable[[int], None]  # told the number of finished steps


def train(run: Run, *, first_step: int, writer: MetricsWriter | None, after_step: AfterStep | None = None) -> None:
    """Trains from ``first_step`` to the end. Collective; ``writer`` on the first rank only."""
    config, watch = run.config, Stopwatch()
    with TrainingProgress(config.train.steps, done=first_step, enabled=run.world.is_first) as progress:
        for step in range(first_step, config.train.steps):
            watch.reset()
            prompts = run.prompts.batch(step, config.train.prompts_per_step)
            fraction = run.method.schedule.fraction(step, config.train.steps) if run.method.guided else 0.0
            with watch("rollout"):
                rollouts = sample_rollouts(run, prompts, step=step, fraction=fraction)
            minibatches = grade_rollouts(run, rollouts, step=step, watch=watch)
            with watch("train"):
                results = [
                    run.trainer.step(packs, update=step * config.train.minibatches + number)
                    for number, packs in enumerate(minibatches)
                ]
            with watch("publish"):
                run.sampler.update_weights(hf_tensors(run.student), version=step + 1)
            metrics = describe(run, step, prompts, rollouts, results, fraction) | watch.metrics()
            metrics["tokens_per_second"] = metrics["tokens"] / metrics["time_step"]
            if writer is not None:
                writer.write(metrics)
            progress.update(metrics)
            # before the checkpoint: a run killed in between repeats what follows the step, instead of leaving it out
            if after_step is not None:
                after_step(step + 1)
            if is_due(step + 1, every=config.checkpoint.every, last=config.train.steps):
                save(run, step + 1)


def sample_rollouts(run: Run, prompts: Sequence[Prompt], *, step: int, fraction: float) -> list[Rollout]:
    """The step's sequences, the same on every rank, recorded when asked for."""
    rollout = run.config.rollout
    guided = rollout.guided_per_prompt if run.method.guided else 0
    requests = make_requests(
        prompts,
        samples=rollout.samples_per_prompt,
        guided=guided,
        fraction=fraction,
        max_new_tokens=rollout.max_new_tokens,
    )
    rollouts = run.sampler.generate(requests, sampling_params(run), seed=run.config.seed, step=step)
    if rollout.record is not None and run.world.is_first:
        write_rollouts(rollout.record, step, rollouts)
    return rollouts


def sampling_params(run: Run) -> SamplingParams:
    """How training rollouts are drawn."""
    rollout = run.config.rollout
    return SamplingParams(
        max_new_tokens=rollout.max_new_tokens,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        top_k=rollout.top_k,
        stop_token_ids=tuple(run.tokenizer.eos_ids),
    )


def grade_rollouts(run: Run, rollouts: Sequence[Rollout], *, step: int, watch: Stopwatch) -> list[list[TrainPack]]:
    """This replica's packs of every minibatch, graded by the teacher and, where needed, scored by the student.

    All scoring happens before the first update, so gates and old log-probs belong to the weights that sampled.
    """
    config = run.config
    with watch("pack"):
        minibatches = [pack_rollouts(run, part) for part in split_evenly(rollouts, config.train.minibatches)]
    with watch("student"):
        scores = [student_scores(run, packs) for packs in minibatches]
    with watch("teacher"):
        signals = [run.teacher.score(packs, run.signal) for packs in minibatches]
    facts = BatchFacts(
        seed=config.seed,
        step=step,
        progress=step / config.train.steps,
        special_token_ids=tuple(run.tokenizer.eos_ids),
        entropy_threshold=batch_entropy_threshold(run, scores),
    )
    by_id = {rollout.sequence_id: rollout for rollout in rollouts}
    with watch("pack"):
        return [
            train_packs(
                packs[run.world.student.replica],
                batch_weights(packs, run.method, facts)[run.world.student.replica],
                signal,
                score,
                rollouts=by_id,
                method=run.method,
                facts=facts,
                device=run.world.device,
            )
            for packs, signal, score in zip(minibatches, signals, scores, strict=True)
        ]


def split_evenly(rollouts: Sequence[Rollout], parts: int) -> list[Sequence[Rollout]]:
    """Consecutive parts whose sizes differ by at most one."""
    ends = np.linspace(0, len(rollouts), parts + 1).astype(int)
    return [rollouts[start:end] for start, end in pairwise(ends)]


def pack_rollouts(run: Run, rollouts: Sequence[Rollout]) -> list[list[Pack]]:
    """Packs for every student replica."""
    layout = run.world.student.layout
    # the teacher runs the same packs, so their length must suit both layouts
    multiple = int(np.lcm(layout.tensor * layout.context, run.world.teacher.layout.tensor)) * 2
    return pack(
        rollouts,
        max_tokens=run.config.train.pack_tokens,
        multiple_of=multiple,
        num_replicas=run.world.student.num_replicas,
        linear_work=12 * run.student.architecture.hidden_size,
    )


def student_scores(run: Run, packs: Sequence[Sequence[Pack]]) -> Sequence[StudentScores | None]:
    """Old log-probs and entropies, when the method needs them or the rollouts serve several updates."""
    mine = packs[run.world.student.replica]
    needs = run.method.needs
    if not (needs.old_logprob or needs.entropy_top or run.config.train.minibatches > 1):
        return [None] * len(mine)
    return score_packs(run.student, mine, vocab_size=run.vocab_size, temperature=run.method.temperature)


def batch_entropy_threshold(run: Run, scores: Sequence[Sequence[StudentScores | None]]) -> float:
    """The student entropy above which the method's share of all tokens of the step lies."""
    share = run.method.needs.entropy_top
    if not share:
        return 0.0
    groups = run.world.student
    own = [score.entropy_N.cpu().numpy() for minibatch in scores for score in minibatch if score is not None]
    mine = np.concatenate([np.empty(0, np.float32), *own]).astype(np.float32)
    everyone = all_gather_arrays(mine, groups.pg.dp)
    # only last stages have scores; the others hear from theirs
    everyone = all_gather_arrays(np.concatenate(everyone), groups.pg.pp)
    return entropy_threshold(everyone[-1], fraction=share)


def describe(
    run: Run,
    step: int,
    prompts: Sequence[Prompt],
    rollouts: Sequence[Rollout],
    results: Sequence[StepResult],
    fraction: float,
) -> dict[str, float]:
    """The step in numbers (``report.metrics`` says what each means)."""
    responses = [len(r.token_ids) - r.prompt_length for r in rollouts]
    prefixes = [r.prefix_length for r in rollouts]
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
    names = set().union(*(result.stats for result in results))
    metrics |= {n: float(np.mean([r.stats[n] for r in results if n in r.stats])) for n in sorted(names)}
    if run.method.guided and run.config.rollout.guided_per_prompt:
        guided = run.config.rollout.guided_per_prompt
        metrics["prefix_fraction"] = fraction
        metrics["prefix_length"] = sum(prefixes) / (len(prompts) * guided)
    metrics |= _training_accuracy(run, prompts, rollouts)
    return metrics


def _training_accuracy(run: Run, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Share of correct fully on-policy responses, where the prompts have answers."""
    samples = run.config.rollout.samples_per_prompt
    if not samples or any(prompt.answer is None for prompt in prompts):
        return {}
    per_prompt = len(rollouts) // len(prompts)
    alone = [r for number, r in enumerate(rollouts) if number % per_prompt < samples]
    right = correctness(alone, prompts, run.tokenizer, run.config.data.grader, samples)
    return {"accuracy_train": float(right.mean())}


def is_due(step: int, *, every: int, last: int) -> bool:
    """Whether ``step`` finished steps are a whole number of ``every``, or all there will be; never with ``every=0``."""
    return every > 0 and (step % every == 0 or step == last)


def save(run: Run, step: int) -> None:
    """A checkpoint after ``step`` finished steps."""
    save_checkpoint(
        run.config.run_dir / "checkpoints",
        run.student,
        run.trainer.optimization,
        step=step,
        state={"run": run.identity},
        keep=run.config.checkpoint.keep,
    )


@dataclass(slots=True)
class Stopwatch:
    """Seconds spent in the parts of a step."""

    started: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)

    def reset(self) -> None:
        self.started, self.parts = time.perf_counter(), {}

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self.parts[part] = self.parts.get(part, 0.0) + time.perf_counter() - before

    def metrics(self) -> dict[str, float]:
        """``time_*`` of the step; what no part claims is ``time_other``."""
        total = time.perf_counter() - self.started
        named = {f"time_{part}": seconds for part, seconds in self.parts.items()}
        return named | {"time_step": total, "time_other": total - sum(self.parts.values())}
