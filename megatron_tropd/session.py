"""A whole training session around the loop: resume, evaluate, train, evaluate again, export, report."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console

from megatron_tropd import loop
from megatron_tropd.build import Run, build_run, embedded_sampler
from megatron_tropd.config import RunConfig, dump_config
from megatron_tropd.convert.hf import HFWriter
from megatron_tropd.engine.batch import BatchFacts, token_view
from megatron_tropd.engine.checkpoint import find_checkpoint, load_checkpoint, read_state
from megatron_tropd.engine.score import score_packs
from megatron_tropd.engine.weights import hf_tensors
from megatron_tropd.errors import CheckpointError
from megatron_tropd.evaluation import correctness, evaluate_suite
from megatron_tropd.report.html import write_report
from megatron_tropd.report.records import (
    AFTER,
    BEFORE,
    DURING,
    TEACHER,
    Evaluation,
    Sample,
    SampleToken,
    read_evaluations,
    record_evaluations,
    record_samples,
)
from megatron_tropd.report.sinks import MetricsWriter, open_sinks
from megatron_tropd.report.table import accuracy_table
from megatron_tropd.rollout.guidance import make_requests
from megatron_tropd.rollout.megatron import MegatronSampler
from megatron_tropd.selfcheck import check_self
from megatron_tropd.types import Pack, Region, Rollout, Signal, StudentView, TeacherView

# how much of the teacher's response the guided samples of the report start with
_SHOWN_PREFIX = 0.5


def run_training(config: RunConfig) -> Run:
    """Trains as ``config`` says, from the newest checkpoint if there is one. Collective."""
    run = build_run(config)
    first_step = _resume(run)
    if first_step == 0:
        check_self(run.student, run.trainer.optimization, run.method, vocab_size=run.vocab_size, seed=config.seed)
    if run.world.is_first:
        config.run_dir.mkdir(parents=True, exist_ok=True)
        dump_config(config, config.run_dir / "config.yaml")
    run.sampler.update_weights(hf_tensors(run.student), version=first_step)
    evaluator = Evaluator(run)
    if first_step == 0:
        evaluator.before()
    with _metrics_writer(run, first_step) as writer:
        loop.train(run, first_step=first_step, writer=writer, after_step=evaluator.during)
    evaluator.after()
    if config.checkpoint.every and first_step < config.train.steps and config.train.steps % config.checkpoint.every:
        loop.save(run, config.train.steps)
    if config.export.hf is not None:
        export_student(run, config.export.hf)
    if run.world.is_first:
        _conclude(run)
    dist.barrier()
    return run


def _resume(run: Run) -> int:
    """Restores the run from a checkpoint; the number of steps already done."""
    config = run.config
    if config.checkpoint.resume == "never":
        return 0
    if config.checkpoint.resume == "auto":
        checkpoint = find_checkpoint(config.run_dir / "checkpoints")
        if checkpoint is None:
            return 0
    else:
        checkpoint = Path(config.checkpoint.resume)
    state = read_state(checkpoint)
    expected = {"seed": config.seed, "method": config.method.name}
    for key, value in expected.items():
        if state.get(key) != value:
            raise CheckpointError(
                f"{checkpoint.absolute()} was written with {key}={state.get(key)!r}, this run has {value!r}. "
                "Use another run_dir, or checkpoint.resume=never to start over."
            )
    load_checkpoint(checkpoint, run.student, run.trainer.optimization)
    if run.world.is_first:
        Console().print(f"going on from {checkpoint} ({state['step']} steps done)", highlight=False)
    return int(state["step"])


@contextmanager
def _metrics_writer(run: Run, first_step: int) -> Iterator[MetricsWriter | None]:
    """The metrics file, cut back to what the checkpoint knows; None off the first rank."""
    if not run.world.is_first:
        yield None
        return
    config = run.config
    sinks = open_sinks(
        config.run_dir,
        tensorboard=config.report.tensorboard,
        wandb=config.report.wandb,
        config=config.model_dump(mode="json"),
    )
    with MetricsWriter(config.run_dir / "metrics.jsonl", sinks=sinks) as writer:
        writer.truncate_after(first_step if first_step else -1)
        yield writer


class Evaluator:
    """Accuracy and sample answers before, during and after training, in ``RUN/evaluation.json`` and ``samples.jsonl``."""

    def __init__(self, run: Run) -> None:
        self._run = run
        # a recording cannot answer new questions, so evaluation then has a sampler of its own
        self._own = isinstance(run.sampler, MegatronSampler)
        self._sampler = run.sampler if self._own else None

    def before(self) -> None:
        """The student as it came, and the teacher."""
        config = self._run.config.evaluate
        if config.before:
            self._evaluate_student(BEFORE, 0)
        if config.teacher and self._run.problems:
            self._evaluate(self._teacher_sampler(), TEACHER, None)
        self._show("before")

    def during(self, step: int) -> None:
        """Called after every step; evaluates when one is due."""
        every = self._run.config.evaluate.every
        if every and step % every == 0 and step < self._run.config.train.steps:
            self._evaluate_student(DURING, step)

    def after(self) -> None:
        """The trained student."""
        if self._run.config.evaluate.after:
            self._evaluate_student(AFTER, self._run.config.train.steps)
        self._show("after")

    def _student_sampler(self, step: int) -> MegatronSampler:
        run = self._run
        if self._sampler is None:
            self._sampler = embedded_sampler(run.config, run.student.architecture, run.world, run.vocab_size)
        assert isinstance(self._sampler, MegatronSampler)
        if not self._own:
            self._sampler.update_weights(hf_tensors(run.student), version=step)
        return self._sampler

    def _teacher_sampler(self) -> MegatronSampler:
        run = self._run
        sampler = embedded_sampler(run.config, run.teacher_model.architecture, run.world, run.vocab_size)
        sampler.update_weights(hf_tensors(run.teacher_model), version=0)
        return sampler

    def _evaluate_student(self, model: str, step: int) -> None:
        if self._run.problems:
            self._evaluate(self._student_sampler(step), model, step)

    def _evaluate(self, sampler: MegatronSampler, model: str, step: int | None) -> None:
        run = self._run
        results = [
            evaluate_suite(
                sampler,
                suite,
                run.problems,
                run.tokenizer,
                grader=run.config.data.grader,
                max_new_tokens=run.config.rollout.max_new_tokens,
                seed=run.config.seed,
                model=model,
                step=step,
            )
            for suite in run.config.evaluate.suites
        ]
        if run.world.is_first:
            record_evaluations(run.config.run_dir, results)

    def _show(self, when: str) -> None:
        count = self._run.config.report.samples
        if count:
            samples = sample_answers(self._run, self._student_sampler(0), when=when, count=count)
            if self._run.world.is_first:
                record_samples(self._run.config.run_dir, samples)


def sample_answers(run: Run, sampler: MegatronSampler, *, when: str, count: int) -> list[Sample]:
    """Answers to the first training prompts, token by token with region, gate and log ratio. Collective.

    Where the method is guided, each prompt has one answer of the student's own and one that continues the first half
    of the teacher's.
    """
    prompts = list(run.prompts.prompts[:count])
    guided = 1 if run.method.guided and run.config.rollout.guided_per_prompt else 0
    budget = run.config.rollout.max_new_tokens
    requests = make_requests(prompts, samples=1, guided=guided, fraction=_SHOWN_PREFIX, max_new_tokens=budget)
    params = loop.sampling_params(run)
    rollouts = sampler.generate(requests, params, seed=run.config.seed, step=run.config.train.steps)
    gates = _gate_by_sequence(run, rollouts)
    samples = []
    for number, rollout in enumerate(rollouts):
        prompt = prompts[number // (1 + guided)]
        right = None
        if prompt.answer is not None:
            right = bool(correctness([rollout], [prompt], run.tokenizer, run.config.data.grader, 1)[0, 0])
        tokens = _sample_tokens(run, rollout, gates[rollout.sequence_id])
        samples.append(Sample(when=when, prompt=prompt.text, answer=prompt.answer, correct=right, tokens=tokens))
    return samples


def _sample_tokens(run: Run, rollout: Rollout, gate: np.ndarray) -> tuple[SampleToken, ...]:
    pieces = run.tokenizer.tokens(rollout.token_ids[rollout.prompt_length :].tolist())
    tokens = []
    for i, piece in enumerate(pieces):
        prefix = i < rollout.prefix_length
        trusted, log_ratio = gate[i]
        tokens.append(
            SampleToken(
                text=piece,
                region="prefix" if prefix else "continuation",
                trusted=None if prefix else bool(trusted > 0.5),
                log_ratio=float(log_ratio),
            )
        )
    return tuple(tokens)


def _gate_by_sequence(run: Run, rollouts: list[Rollout]) -> dict[int, np.ndarray]:
    """``[response, 2]`` gate weight and log ratio of every response token, on every rank."""
    packs = loop.pack_rollouts(run, rollouts)
    mine = packs[run.world.student.replica]
    signals = run.teacher.score(packs, run.signal)
    scores = score_packs(run.student, mine, vocab_size=run.vocab_size, temperature=run.method.temperature)
    by_id = {rollout.sequence_id: rollout for rollout in rollouts}
    facts = BatchFacts(seed=run.config.seed, step=run.config.train.steps, progress=1.0)
    found: dict[int, np.ndarray] = {}
    for item, signal, score in zip(mine, signals, scores, strict=True):
        if signal is None or score is None or run.world.student.tensor_rank:
            continue
        tokens = token_view(item, by_id, facts, run.world.device)
        student = StudentView(
            logprob_T=score.logprob_N,
            old_logprob_T=score.logprob_N,
            entropy_T=score.entropy_N,
            old_entropy_T=score.entropy_N,
        )
        teacher = _teacher_view(signal)
        weight = run.method.gate_weight(student, teacher, tokens)
        values = torch.stack([weight, signal.logprob_N - score.logprob_N], dim=1).float().cpu().numpy()
        found.update(_split_by_sequence(item, values))
    gathered: list[dict[int, np.ndarray] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    return {key: value for part in gathered if part for key, value in part.items()}


def _teacher_view(signal: Signal) -> TeacherView:
    return TeacherView(
        logprob_T=signal.logprob_N,
        support_ids_TK=signal.topk_ids_NK,
        support_logprob_TK=signal.topk_logprob_NK,
        entropy_T=signal.entropy_N,
    )


def _split_by_sequence(item: Pack, values_N2: np.ndarray) -> dict[int, np.ndarray]:
    valid = (item.region_T == Region.PREFIX) | (item.region_T == Region.CONTINUATION)
    owner_N = item.sequence_T[valid]
    return {int(sequence): values_N2[owner_N == sequence] for sequence in item.sequence_ids}


def export_student(run: Run, target: Path) -> None:
    """Writes the student as a Hugging Face directory, with the tokenizer and config it came with. Collective."""
    writer = None
    if run.world.is_first:
        writer = HFWriter(target, companions_from=run.config.student.model)
    for pair in hf_tensors(run.student):
        if writer is not None:
            writer.write([pair])
    if writer is not None:
        writer.finish()


def _conclude(run: Run) -> None:
    """The table and where to look, for whoever started the run."""
    console, config = Console(), run.config
    evaluations: list[Evaluation] = read_evaluations(config.run_dir)
    if evaluations:
        console.print(accuracy_table(evaluations))
    if config.export.hf is not None:
        console.print(f"trained student: {config.export.hf}", highlight=False)
    if config.report.html:
        console.print(f"report: {write_report(config.run_dir)}", highlight=False)
