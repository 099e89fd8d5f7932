"""A whole training session around the loop: resume, evaluate, train, evaluate again, export, report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from rich.console import Console

from megatron_tropd.config.loading import dump_config
from megatron_tropd.config.run import RunConfig
from megatron_tropd.convert.hub import check_push, push_model
from megatron_tropd.convert.source import open_weights, source_architecture, source_files
from megatron_tropd.data.table import PromptTable
from megatron_tropd.data.tokenizer import Tokenizer
from megatron_tropd.engine.weights import hf_tensors, load_weights
from megatron_tropd.errors import DataError, EngineError
from megatron_tropd.evaluate.suites import EvaluatedModel, answer_suites
from megatron_tropd.parallel.groups import GroupBuilder
from megatron_tropd.parallel.partition import Launch, join_launch
from megatron_tropd.progress.phases import Phase
from megatron_tropd.report.html import write_report
from megatron_tropd.report.records import (
    AFTER,
    BEFORE,
    DURING,
    TEACHER,
    Evaluation,
    read_evaluations,
    record_evaluations,
    record_provenance,
    record_samples,
)
from megatron_tropd.report.sample_text import print_samples
from megatron_tropd.report.sinks import MetricsWriter, open_sinks
from megatron_tropd.report.table import print_accuracies
from megatron_tropd.report.terminal import say
from megatron_tropd.report.trackers import TRACKERS, versions
from megatron_tropd.rollout.engines.megatron import MegatronSampler
from megatron_tropd.rollout.engines.registry import ROLLOUT_ENGINES
from megatron_tropd.rollout.protocol import Sampler
from megatron_tropd.rollout.recording import claim_recording
from megatron_tropd.setup.build import Run, build_run, check_teacher_recording, embedded_sampler, load_model, rank_split
from megatron_tropd.setup.chat_templates import teacher_problems
from megatron_tropd.setup.claims import claimed, exports, run_directory
from megatron_tropd.setup.datasets import check_problem_lengths, data_identity, suites_of
from megatron_tropd.setup.ends import tell_ends
from megatron_tropd.setup.self_check import check_self
from megatron_tropd.setup.validate import (
    DTYPES,
    Inputs,
    check_export,
    check_writable,
    identity,
    read_inputs,
)
from megatron_tropd.teacher.engines.remote import serve_score_requests
from megatron_tropd.train import loop
from megatron_tropd.train.best import BestSoFar, deciding_suite
from megatron_tropd.train.callbacks import Callbacks
from megatron_tropd.train.exports import Exporter
from megatron_tropd.train.hooks import Hooks
from megatron_tropd.train.model_card import CardFacts, model_card
from megatron_tropd.train.preemption import Preempted, StopRequest, leave_if_requested
from megatron_tropd.train.resume import clear_way, confirmed, find_start, restore
from megatron_tropd.train.rollout_queue import RolloutQueue, sampling_of
from megatron_tropd.train.sample_report import sample_answers, training_samples
from megatron_tropd.types import Prompt, Rollout

# what a model card says of the configuration besides the method
_SETTINGS_OF_CARD = (
    *("seed", "dtype", "optimizer.name", "optimizer.lr", "optimizer.schedule", "train.prompts_per_step"),
    *("rollout.samples_per_prompt", "rollout.guided_per_prompt", "rollout.max_new_tokens", "rollout.temperature"),
)

# given a configuration and what was read for it, returns one in which every guided prompt has a teacher response
Responses = Callable[[RunConfig, Inputs], RunConfig]


def run_training(
    config: RunConfig,
    *,
    callbacks: Callbacks | None = None,
    own_process: bool = True,
    responses: Responses | None = None,
) -> Run | None:
    """Train as ``config`` says, from the newest checkpoint if there is one. Collective.

    Args:
        callbacks: what a user's program does meanwhile; ranks that are the teacher's alone do not call it.
        own_process: whether Ctrl-C outside of training ends the process; else it raises KeyboardInterrupt.
        responses: what finds responses for prompts that lack them, on the student's ranks; None: that is an error.

    Returns:
        What was trained; None on ranks that are the teacher's alone.

    Raises:
        Preempted: a signal wants the machines back; there is a checkpoint to resume from.
    """
    with StopRequest(raises=not own_process) as stop:
        launch = join_launch(teacher_ranks=config.teacher.ranks, timeout_s=config.collective_timeout_s)
        config.check_world(launch.world_size)
        if launch.is_teachers:
            _serve_scores(config, launch, stop)
            return None
        return _run_training(config, launch, stop, callbacks or Callbacks(), responses)


def _serve_scores(config: RunConfig, launch: Launch, stop: StopRequest) -> None:
    """Serve the student's score requests on the teacher's own ranks, from the beginning to the end of a run."""
    assert launch.bridge is not None
    groups = GroupBuilder(timeout_s=config.collective_timeout_s).build(config.teacher.parallel)
    model = load_model(config.teacher.source, groups, dtype=DTYPES[config.dtype], device=launch.device).freeze()
    bridge = launch.bridge

    def pass_on() -> None:
        if stop.heard is not None:  # the student's ranks may have heard nothing
            bridge.ask_to_stop(stop.heard)

    with stop.deferred():  # a student that is asked to stop may still need scores
        try:
            if serve_score_requests(model, rank_split(config, launch.student_ranks), bridge, on_request=pass_on):
                raise Preempted("stopped with the student")
        except EngineError:
            stop.leave_if_heard()  # as the student's ranks did
            raise


def _run_training(
    config: RunConfig, launch: Launch, stop: StopRequest, callbacks: Callbacks, responses: Responses | None
) -> Run:
    if dist.get_rank() == 0:
        check_export(config)
        if config.export.push_to_hub is not None:
            check_push(config.export.push_to_hub)
    with claimed(run_directory(config.run_dir), *exports(config.export)):
        inputs = read_inputs(config, may_lack_responses=responses is not None)
        tell_ends(inputs.ends, enabled=dist.get_rank() == 0)
        check_writable(config)
        if responses is not None:
            answered = responses(config, inputs)
            inputs = inputs if answered is config else read_inputs(answered)
            config = answered
        return _train(config, inputs, launch, stop, callbacks)


def _train(config: RunConfig, inputs: Inputs, launch: Launch, stop: StopRequest, callbacks: Callbacks) -> Run:
    facts = _agreed_identity(config, inputs)
    find = partial(find_start, config.checkpoint, facts, run_dir=config.run_dir, steps=config.train.steps)
    start = find()
    check_teacher_recording(config, inputs)
    _claim_recording(config, inputs, facts, resumed=start.checkpoint is not None)
    clear_way(config.run_dir, start.checkpoint)
    run = build_run(config, inputs, launch.bridge, known=facts)
    if launch.bridge is not None and run.world.is_first:
        stop.listen_to(launch.bridge.asked_to_stop)
    queue = RolloutQueue(run)
    # large files of the checkpoint have been read meanwhile
    checkpoint = confirmed(start, lambda torn: find(torn=torn))
    if checkpoint != start.checkpoint:
        clear_way(config.run_dir, checkpoint)
    first_step = restore(run, queue, checkpoint)
    if first_step == 0:
        with Phase("self check"):
            check_self(
                run.student,
                run.trainer.optimization,
                run.method,
                vocab_size=run.vocab_size,
                seed=config.seed,
                share_prefixes=run.world.share_prefixes,
            )
    if run.world.is_first:
        _write_down(config)
    run.trainer.end_step()
    with Phase("handing on the weights"):
        loop.publish(run, first_step)
    exporter = _exporter(run, config)
    evaluator = Evaluator(run, config, callbacks, _best_so_far(config), exporter)
    if first_step == 0:
        evaluator.before()
    with stop.deferred(), _metrics_writer(config, first_step, enabled=run.world.is_first) as writer:
        leave = partial(leave_if_requested, run, queue, stop, first_step=first_step, saved=callbacks.on_checkpoint)
        hooks = SessionHooks(evaluator, callbacks, leave)
        try:
            finished = loop.train(run, queue, first_step=first_step, writer=writer, hooks=hooks)
        except Preempted:
            if launch.bridge is not None:
                launch.bridge.withdraw()
            run.teacher.close()
            raise
    evaluator.after(finished)
    exporter.at_the_end(finished)
    if config.export.hf is not None:
        _push(config, finished)
    if run.world.is_first:
        _conclude(config)
    dist.barrier()
    run.sampler.close()
    run.teacher.close()
    return run


def _write_down(config: RunConfig) -> None:
    """Write what the run is, as its user named it, and what names on the hub have meant."""
    dump_config(config.named, config.run_dir / "config.yaml")
    if config.commits:
        record_provenance(config.run_dir, config.commits)


def _agreed_identity(config: RunConfig, inputs: Inputs) -> dict[str, Any]:
    """Return the identity of the run, for which one rank reads what fingerprints are made of. Collective."""
    found: list[dict[str, Any]] = [identity(config, inputs) if dist.get_rank() == 0 else {}]
    dist.broadcast_object_list(found, src=0)
    _check_same_data(config, inputs)
    return found[0]


def _check_same_data(config: RunConfig, inputs: Inputs) -> None:
    """Raise DataError, on every rank, when ranks have read different prompts. Collective."""
    own: dict[str, Any] = data_identity(config.data, inputs.prompts)
    everyone: list[dict[str, Any]] = [{}] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    others = [rank for rank, found in enumerate(everyone) if found != everyone[0]]
    if others:
        raise DataError(
            f"rank {others[0]} has read {everyone[others[0]]['data.prompts']}, the first rank "
            f"{everyone[0]['data.prompts']} ({len(others)} of {len(everyone)} ranks differ). Give all hosts the same "
            "files, and all ranks the same rows in the same order."
        )


def _claim_recording(config: RunConfig, inputs: Inputs, facts: Mapping[str, Any], *, resumed: bool) -> None:
    """Claim the directory that rollouts are recorded in. Collective."""
    if config.rollout.record is not None:
        sampling = sampling_of(config.rollout, inputs.tokenizer)
        run_dir, directory = config.run_dir, config.rollout.record
        claim_recording(directory, run_dir=run_dir, identity=facts, sampling=sampling, resumed=resumed)


def _best_so_far(config: RunConfig) -> BestSoFar:
    """Take up what the run has measured before it was resumed, as one rank reads it. Collective."""
    earlier: list[list[Evaluation]] = [read_evaluations(config.run_dir) if dist.get_rank() == 0 else []]
    dist.broadcast_object_list(earlier, src=0)
    return BestSoFar(deciding_suite(suites_of(config), config.evaluate.best_by), earlier[0])


def _exporter(run: Run, config: RunConfig) -> Exporter:
    named = config.named
    facts = CardFacts(
        student=str(named.student.model),
        teachers=[str(named.teacher.model), *(str(one.model) for one in named.teachers)],
        data=[*map(str, named.data.prompts), *(str(path) for one in named.data.sources for path in one.prompts)],
        method=named.method.model_dump(),
        settings={key: _setting(named, key) for key in _SETTINGS_OF_CARD},
        steps=config.train.steps,
    )

    def card(step: int) -> str:
        return model_card(facts, read_evaluations(config.run_dir), step=step)

    given, here = named.student.model, config.student.model
    base = str(here.absolute()) if given == here else str(given).partition("@")[0]
    return Exporter(run, config.export, companions_from=source_files(config.student.source), card=card, base=base)


def _push(config: RunConfig, step: int) -> None:
    """Push the export, where that is wanted; the first rank does."""
    target, export = config.export.push_to_hub, config.export.hf
    if target is not None and export is not None and dist.get_rank() == 0:
        message = f"{config.method.name} by megatron_tropd, {step} steps"
        say(f"pushed: {push_model(export, target, private=config.export.private, message=message)}")


def _setting(config: RunConfig, key: str) -> Any:
    """Return the value of a dotted key."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


@contextmanager
def _metrics_writer(config: RunConfig, first_step: int, *, enabled: bool) -> Iterator[MetricsWriter | None]:
    """Open the metrics file, cut back to what the checkpoint knows; None off the first rank."""
    if not enabled:
        yield None
        return
    sinks = open_sinks(
        config.run_dir,
        tensorboard=config.report.tensorboard,
        config=config.named.model_dump(mode="json") | {"versions": versions()},
        **{name: getattr(config.report, name) for name in TRACKERS},
    )
    with MetricsWriter(config.run_dir / "metrics.jsonl", sinks=sinks) as writer:
        writer.truncate_after(first_step if first_step else -1)
        yield writer


class Evaluator:
    """Accuracy and sample answers before, during and after training: ``evaluation.json``, ``samples.jsonl``."""

    def __init__(self, run: Run, config: RunConfig, callbacks: Callbacks, best: BestSoFar, exporter: Exporter) -> None:
        self._run, self._config, self._callbacks = run, config, callbacks
        self._best, self._exporter, self._said = best, exporter, False
        # a recording cannot answer new questions, so evaluation then has a sampler of its own
        self._own = ROLLOUT_ENGINES[config.rollout.engine].generates
        self._sampler: Sampler | None = run.sampler if self._own else None

    def before(self) -> None:
        """Evaluate the student as it came, and the teacher."""
        config = self._config.evaluate
        if config.before:
            self._evaluate_student(BEFORE, 0)
        if config.teacher and self._run.problems:
            if config.before and self._config.teacher.source == self._config.student.source:
                if self._run.world.is_first:
                    say("the teacher is the student as it came: it is evaluated once, before training")
            else:
                self._evaluate_teacher()
        self._show("before")

    def during(self, step: int) -> None:
        """Evaluate after a step when that is due; to be called after every one."""
        every = self._config.evaluate.every
        if every and step % every == 0 and step < self._config.train.steps:
            self._evaluate_student(DURING, step)
        self._exporter.during(step)

    def is_over(self, step: int) -> bool:
        """Say whether there has been no gain for as many evaluations as are waited for."""
        patience, waited = self._config.train.stop_after_no_gain, self._best.without_gain
        if not patience or waited < patience or step >= self._config.train.steps:
            return False
        if self._run.world.is_first and not self._said:
            say(
                f"ending after {step} of {self._config.train.steps} steps: {waited} evaluations were no better than "
                f"that after {self._best.step} (train.stop_after_no_gain)"
            )
        self._said = True
        return True

    def after(self, step: int) -> None:
        """Evaluate the trained student, of ``step`` finished steps."""
        if self._config.evaluate.after:
            self._evaluate_student(AFTER, step)
        self._show("after")

    def _student_sampler(self, step: int) -> Sampler:
        run = self._run
        if self._sampler is None:
            self._sampler = embedded_sampler(self._config, run.student.architecture, run.world, run.vocab_size)
        if not self._own:
            self._sampler.update_weights(hf_tensors(run.student), version=step)
        return self._sampler

    def _teacher_sampler(self) -> MegatronSampler:
        run = self._run
        source = self._config.teacher.source
        sampler = embedded_sampler(self._config, source_architecture(source), run.world, run.vocab_size)
        if run.teacher_model is None:  # vLLM or a recording stands in for it
            load_weights(sampler.model, open_weights(source))
        else:
            with run.teacher_model.present():
                sampler.update_weights(hf_tensors(run.teacher_model), version=0)
        return sampler

    def _evaluate_student(self, model: str, step: int) -> None:
        if self._run.problems:
            self._evaluate(self._student_sampler(step), model, step)

    def _evaluate_teacher(self) -> None:
        """Evaluate the teacher under its own chat template and end tokens."""
        run, suites = self._run, suites_of(self._config)
        tokenizer, problems = teacher_problems(self._config, suites, run.tokenizer, run.problems)
        check_problem_lengths(suites, problems, {"teacher": source_architecture(self._config.teacher.source)})
        self._evaluate(self._teacher_sampler(), TEACHER, None, tokenizer=tokenizer, problems=problems)

    def _evaluate(
        self,
        sampler: Sampler,
        model: str,
        step: int | None,
        *,
        tokenizer: Tokenizer | None = None,
        problems: Mapping[str, PromptTable] | None = None,
    ) -> None:
        run = self._run
        with Phase(f"evaluating the {model}"):
            results = answer_suites(
                sampler,
                suites_of(self._config),
                problems or run.problems,
                tokenizer or run.tokenizer,
                model=EvaluatedModel(name=model, step=step),
                seed=run.seed,
                allow_code=run.evaluate.code_execution,
            )
        if run.world.is_first:
            record_evaluations(run.run_dir, results)
        self._callbacks.on_evaluate(results)
        if self._best.add(results) and step is not None:
            self._exporter.best(step)

    def _show(self, when: Literal["before", "after"]) -> None:
        count = self._config.report.samples
        if count:
            with Phase("sample answers for the report"):
                samples = sample_answers(self._run, self._student_sampler(0), when=when, count=count)
            if self._run.world.is_first:
                record_samples(self._config.run_dir, samples)

    def show_step(self, step: int, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> None:
        """Print answers that a step learns from, where that is due."""
        every = self._config.report.samples_every
        if not every or (step - 1) % every:
            return
        samples = training_samples(self._run, prompts, rollouts, step=step)
        if self._run.world.is_first:
            print_samples(samples, step=step)


class SessionHooks(Hooks):
    """Evaluate after a step where that is due, call the user's program, and leave where the machines are wanted
    back.
    """

    def __init__(self, evaluator: Evaluator, callbacks: Callbacks, leave: Callable[[int], None]) -> None:
        self._evaluator, self._callbacks, self._leave = evaluator, callbacks, leave

    def rollouts_ready(self, step: int, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> None:
        self._callbacks.on_rollouts(step, prompts, rollouts)

    def batch_scored(self, step: int, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> None:
        self._evaluator.show_step(step, prompts, rollouts)

    def step_measured(self, step: int, metrics: Mapping[str, float]) -> None:
        self._callbacks.on_step(step, metrics)

    def is_over(self, step: int) -> bool:
        return self._evaluator.is_over(step)

    def checkpoint_saved(self, step: int, checkpoint: Path) -> None:
        self._callbacks.on_checkpoint(step, checkpoint)

    def step_finished(self, step: int) -> None:
        self._evaluator.during(step)

    def may_leave(self, step: int) -> None:
        self._leave(step)


def _conclude(config: RunConfig) -> None:
    """Print the table and where to look, for whoever started the run."""
    console = Console()
    evaluations: list[Evaluation] = read_evaluations(config.run_dir)
    if evaluations:
        print_accuracies(console, evaluations)
    if config.export.hf is not None:
        say(f"trained student: {config.export.hf}", console=console)
    if config.export.adapter is not None:
        say(f"trained adapters: {config.export.adapter}", console=console)
    if config.export.megatron is not None:
        layout = config.export.megatron_layout
        say(f"trained student, as a checkpoint for {layout}: {config.export.megatron}", console=console)
    if config.report.html:
        with Phase("drawing the report"):
            page = write_report(config.run_dir)
        say(f"report: {page}", console=console)
