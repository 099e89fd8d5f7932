"""The program on one page: sample, pack, score, learn, publish, report, save.

The queue samples, packs, and has the student score what it sampled with the weights that wrote it; the teacher's
scores are waited for here. All scoring happens before the first update of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path

from megatron_tropd.engine.batch import BatchFacts, batch_entropy_threshold, batch_weights, train_packs
from megatron_tropd.engine.checkpoint import save_checkpoint
from megatron_tropd.engine.offload import wait_for_device
from megatron_tropd.engine.step import StepResult
from megatron_tropd.engine.views import TrainPack
from megatron_tropd.losses import gates
from megatron_tropd.report.progress import TrainingProgress
from megatron_tropd.report.sinks import MetricsWriter
from megatron_tropd.report.stalls import StallMonitor
from megatron_tropd.report.stopwatch import Stopwatch
from megatron_tropd.report.stuck import StuckMonitor
from megatron_tropd.rollout.mismatch import MismatchMonitor
from megatron_tropd.setup.build import Run
from megatron_tropd.train.hooks import Hooks
from megatron_tropd.train.metrics import step_metrics
from megatron_tropd.train.rewards import BatchRewards, reward_batch
from megatron_tropd.train.rollout_queue import RolloutQueue, ScoredRollouts
from megatron_tropd.weight_sync.interface import ProbeableSampler
from megatron_tropd.weight_sync.publishers import WeightStream
from megatron_tropd.weight_sync.verify import probe_of, verify_publish


def train(
    run: Run, queue: RolloutQueue, *, first_step: int, writer: MetricsWriter | None, hooks: Hooks | None = None
) -> int:
    """Train from ``first_step`` to the end; return the number of finished steps. Collective.

    ``writer``: on the first rank only.
    """
    hooks, watch = hooks or Hooks(), Stopwatch(partial(wait_for_device, run.world.device))
    moves = run.method.teaches_certain_students or not run.method.distills
    stuck = StuckMonitor(run.method.name, teaches_certain_students=moves)
    monitors = (MismatchMonitor(run.dtype, run.rollout.gap_warning), stuck, StallMonitor())
    hidden = ("outlier_fraction",) if run.method.gate in (gates.ALL, gates.NOTHING) else ()
    with TrainingProgress(run.train.steps, done=first_step, enabled=run.world.is_first, hidden=hidden) as progress:
        for step in range(first_step, run.train.steps):
            if hooks.is_over(step):
                return step
            watch.reset()
            run.world.offload_stats.take_seconds()  # what checkpoints and evaluations have moved is not this step's
            queue.start(step, watch=watch)
            batch = queue.get(step, watch=watch, hooks=hooks)
            hooks.rollouts_ready(step + 1, batch.prompts, batch.scored.rollouts)
            rewards = reward_batch(run, batch.prompts, batch.scored.rollouts, step=step)
            minibatches = score_and_pack(run, batch.scored, step=step, watch=watch, rewards=rewards)
            hooks.batch_scored(step + 1, batch.prompts, batch.scored.rollouts)
            results = learn(run, queue, minibatches, step=step, watch=watch, hooks=hooks)
            if run.moving is not None:
                run.moving.follow(step + 1)
            with watch("publish"):
                publish(run, step + 1)
            metrics = step_metrics(run, queue, batch, results, step=step, watch=watch, rewards=rewards)
            if writer is not None:
                writer.write(metrics)
                for monitor in monitors:
                    monitor.check(metrics)
            progress.update(metrics)
            hooks.step_measured(step + 1, metrics)
            # before the checkpoint: a run killed in between repeats what follows the step, instead of leaving it out
            hooks.step_finished(step + 1)
            last = step + 1 if hooks.is_over(step + 1) else run.train.steps
            if is_due(step + 1, every=run.checkpoint.every, last=last):
                hooks.checkpoint_saved(step + 1, save(run, queue, step + 1))
            hooks.may_leave(step + 1)
    return run.train.steps


def learn(
    run: Run,
    queue: RolloutQueue,
    minibatches: Sequence[Sequence[TrainPack]],
    *,
    step: int,
    watch: Stopwatch,
    hooks: Hooks,
) -> list[StepResult]:
    """Update the student once per minibatch; what its present weights are sampling is waited for before they change."""
    wait = partial(queue.wait_for_all, step=step, watch=watch, hooks=hooks)
    with watch("train"):
        results = [
            run.trainer.step(packs, update=step * run.train.minibatches + number, before_update=wait)
            for number, packs in enumerate(minibatches)
        ]
        run.trainer.end_step()
    return results


def publish(run: Run, version: int) -> None:
    """Hand the student's weights to the sampler and make sure that they have arrived. Collective."""
    rollout = run.rollout
    run.sampler.update_weights(WeightStream(run.student), version=version)
    if isinstance(run.sampler, ProbeableSampler) and rollout.verify:
        longest = run.data.max_prompt_tokens + rollout.max_new_tokens
        probe = probe_of(run.prompts.prompts[0], longest)
        verify_publish(run.student, run.sampler, probe, rollout.verify_tolerance)


def score_and_pack(
    run: Run, scored: ScoredRollouts, *, step: int, watch: Stopwatch, rewards: BatchRewards | None = None
) -> list[list[TrainPack]]:
    """Pack this replica's share of every minibatch, scored by the teacher.

    All scoring happens before the first update, so gates and old log-probs belong to the weights that sampled.
    ``rewards``: of the answers, for methods that look at them.
    """
    with watch("teacher"):
        outputs = [pending() for pending in scored.pending_scores]
        if run.moving is not None and run.teacher_request.hidden_states:
            run.trainer.use_teacher_weight(run.moving.output_weight())
    facts = BatchFacts(
        seed=run.seed,
        step=step,
        progress=step / run.train.steps,
        special_token_ids=tuple(run.tokenizer.eos_ids),
        entropy_threshold=batch_entropy_threshold([*chain(*scored.scores)], run.method, run.world.student),
        rewards=None if rewards is None or not run.method.needs.reward else rewards.rewards,
        advantages={} if rewards is None else rewards.advantages,
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


def is_due(step: int, *, every: int, last: int) -> bool:
    """Say whether ``step`` finished steps are a whole number of ``every``, or all; never with ``every=0``."""
    return every > 0 and (step % every == 0 or step == last)


def save(run: Run, queue: RolloutQueue, step: int) -> Path:
    """Write a checkpoint of ``step`` finished steps; return where it is."""
    return save_checkpoint(
        run.run_dir / "checkpoints",
        run.student,
        run.trainer.optimization,
        step=step,
        state={"run": run.identity, **queue.state()},
        keep=run.checkpoint.keep,
        beside_it=partial(queue.save, step=step),
        average=None if run.moving is None else run.moving.average,
    )
