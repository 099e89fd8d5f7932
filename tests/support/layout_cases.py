"""Trains a tiny student under any layout, through the loop's own functions, and hands back what can be compared.

What ``run_cases`` does runs on every rank of ``run_on_ranks``; a ``Case`` says everything about one training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch.distributed as dist
from torch import Tensor

from megatron_tropd.config.loading import parse_config
from megatron_tropd.config.run import RunConfig
from megatron_tropd.config.sections import Layout
from megatron_tropd.engine.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from megatron_tropd.engine.model import Model
from megatron_tropd.engine.optimizer import Optimization, optimize
from megatron_tropd.engine.step import Trainer, means_over_tokens
from megatron_tropd.engine.weights import hf_tensors, local_table
from megatron_tropd.errors import SelfCheckError
from megatron_tropd.methods import base
from megatron_tropd.parallel.groups import GroupBuilder, initialize_distributed
from megatron_tropd.report.stopwatch import Stopwatch
from megatron_tropd.setup.build import (
    DTYPES,
    Run,
    World,
    check_method,
    load_frozen,
    load_model,
    output_weight_for,
    sections_of,
    with_others,
)
from megatron_tropd.setup.self_check import SelfCheck, check_self
from megatron_tropd.teacher.engines.megatron import MegatronTeacher
from megatron_tropd.teacher.protocol import TeacherRequest
from megatron_tropd.train.loop import score_and_pack
from megatron_tropd.train.rollout_queue import score_rollouts
from megatron_tropd.types import Rollout
from tests.support.tiny_models import (
    STUDENT,
    TEACHER,
    Objective,
    grouped_rollouts,
    random_rollouts,
    save_qwen3,
    with_turns,
)

# ids that both models know: what their vocabularies have beyond it must carry nothing
VOCAB = min(STUDENT["vocab_size"], TEACHER["vocab_size"])
STEPS = 3  # the learning rate rises, is at its peak, and falls
CERTAIN = 0.01  # the student's probability that counts as certain here: random models are never surer than a little
TROPD = Objective()
# Adam divides a gradient by its size: far below this eps it would turn the rounding of a vanishing one into whole steps
ADAM = {"lr": 4e-3, "min_lr": 1e-3, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-6, "clip_grad": 0.7}
# here a step is the gradient itself: what differs in it, differs in the weights
SGD = {"name": "sgd", "lr": 0.5, "min_lr": 0.1, "weight_decay": 0.1, "clip_grad": 0.7}
WARMUP = 2  # steps to the peak, then linearly down


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training: how it is laid out, what it optimizes, how its batch is cut."""

    name: str
    ranks: int = 1
    student: dict[str, Any] = field(default_factory=dict)  # the keys of student.parallel
    teacher: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] | None = None  # the keys of base.parallel, for a base model of its own; None: the default
    objective: Objective = TROPD
    method: dict[str, Any] | None = None  # replaces the objective's method section
    tied: bool = False
    deep: bool = False  # four layers instead of three, for two stages of two chunks
    pack_tokens: int = 4096
    minibatches: int = 1
    recompute: str = "none"
    dtype: str = "fp32"
    distributed_optimizer: bool = False
    offload: bool = False  # of the frozen models and of the optimizer
    overlap: bool = False  # in buckets of a few parameters
    sgd: bool = False  # instead of Adam
    adam_eps: float = ADAM["eps"]
    models: tuple[str, str] | None = None  # directories of student and teacher, where they are not the usual ones
    sequences: int = 11
    turns: bool = False  # responses of several turns, with observations
    groups: bool = False  # samples of prompts, which begin alike
    share: bool = False  # what begins alike is computed once
    balance: float = 0.0  # coefficient of the load-balancing loss, for students of experts
    steps: int = STEPS

    @property
    def key(self) -> tuple[object, ...]:
        """Cases with one key must have one outcome."""
        same = (self.objective, self.base is None, self.tied, self.deep, self.minibatches, self.sequences, self.turns)
        return (*same, self.steps)


def learning_rates(minibatches: int, steps: int = STEPS) -> list[float]:
    """Of every update, by hand: up in WARMUP steps, then down so that the update after the last would be at min_lr."""
    updates, rising = steps * minibatches, WARMUP * minibatches
    up = [ADAM["lr"] * (i + 1) / rising for i in range(rising)]
    down = [(i + 1) / (updates - rising + 1) for i in range(updates - rising)]
    return up + [ADAM["lr"] + share * (ADAM["min_lr"] - ADAM["lr"]) for share in down]


def config_of(case: Case, models: Path) -> RunConfig:
    return parse_config(
        {
            "run_dir": "unused",
            "seed": case.objective.seed,
            "dtype": case.dtype,
            "student": {
                "model": str(models / student_directory(case)),
                "parallel": case.student,
                "recompute": case.recompute,
                "router_aux_loss": case.balance,
            },
            "teacher": {
                "model": str(models / (case.models[1] if case.models else "teacher")),
                "parallel": case.teacher,
                "offload": case.offload,
            },
            "base": {} if case.base is None else {"model": str(models / "base"), "parallel": case.base},
            "data": {"prompts": "unused", "max_prompt_tokens": 20},
            "rollout": {"max_new_tokens": 20},
            "method": case.method or case.objective.options(),
            "train": {
                "steps": case.steps,
                "pack_tokens": case.pack_tokens,
                "minibatches": case.minibatches,
                "share_prefixes": "auto" if case.share else "off",
            },
            "optimizer": {
                **(SGD if case.sgd else ADAM | {"eps": case.adam_eps}),
                "schedule": "linear",
                "warmup_steps": WARMUP,
                "distributed": case.distributed_optimizer,
                "offload": case.offload,
                "overlap": case.overlap,
            },
        }
    )


def batch_of(case: Case, step: int) -> list[Rollout]:
    """The rollouts of a step."""
    if case.groups:
        return grouped_rollouts(step, vocab_size=VOCAB)
    rollouts = random_rollouts(step, vocab_size=VOCAB, count=case.sequences)
    return with_turns(rollouts, seed=step) if case.turns else rollouts


def save_models(directory: Path) -> Path:
    """What cases are of: students that `student_directory` names, the teacher and the base model."""
    deep = STUDENT | {"num_hidden_layers": 4}
    save_qwen3(directory / "untied", STUDENT, seed=1)
    save_qwen3(directory / "tied", STUDENT, tied=True, seed=2)
    save_qwen3(directory / "deep-untied", deep, seed=4)
    save_qwen3(directory / "deep-tied", deep, tied=True, seed=5)
    save_qwen3(directory / "teacher", TEACHER, seed=3)
    # one more vocabulary, larger than what the others share
    save_qwen3(directory / "base", TEACHER | {"vocab_size": 103, "num_hidden_layers": 3}, seed=6)
    return directory


def student_directory(case: Case) -> str:
    if case.models:
        return case.models[0]
    return ("deep-" if case.deep else "") + ("tied" if case.tied else "untied")


_BUCKET = 3000  # elements, where there are buckets: several of them


def assemble(config: RunConfig, builder: GroupBuilder, *, ends: tuple[int, ...] = ()) -> Run:
    """``build_run`` without tokenizers, data and sampler."""
    device = initialize_distributed()
    method, dtype = replace(check_method(config), end_ids=ends), DTYPES[config.dtype]
    layouts = [config.student.parallel, config.teacher.parallel, Layout()]
    student_groups, teacher_groups, sampler_groups = [builder.build(layout) for layout in layouts]
    base_groups = builder.build(config.base_parallel) if method.needs.base_model else None
    world = World(
        device=device,
        student=student_groups,
        teacher=teacher_groups,
        sampler=sampler_groups,
        base=base_groups,
        share_prefixes=config.train.share_prefixes == "auto",
    )
    student = load_model(
        config.student.model,
        student_groups,
        dtype=dtype,
        device=device,
        recompute=config.student.recompute,
        balance=config.student.router_aux_loss,
    )
    teacher = load_frozen(config, config.teacher.model, teacher_groups, world)
    request = TeacherRequest.of(method.needs)
    weight = output_weight_for(config.teacher.model, teacher.architecture, student) if request.hidden_states else None
    optimization = optimize(
        student,
        config.optimizer,
        steps=config.train.steps,
        minibatches=config.train.minibatches,
        offload_stats=world.offload_stats,
        bucket_elements=_BUCKET,
    )
    own = MegatronTeacher(teacher, student_groups, vocab_size=VOCAB, temperature=method.temperature)
    nothing: Any = None
    tokenizer: Any = SimpleNamespace(eos_ids=(0,))
    return Run(
        **sections_of(config),
        world=world,
        tokenizer=tokenizer,
        prompts=nothing,
        problems=(),
        method=method,
        vocab_size=VOCAB,
        student=student,
        trainer=Trainer(student, optimization, method, vocab_size=VOCAB, teacher_weight_vE=weight),
        teacher_model=teacher,
        teacher=with_others(config, own, world, vocab_size=VOCAB, temperature=method.temperature),
        sampler=nothing,
        teacher_request=request,
    )


def run_cases(cases: Sequence[Case], models: str) -> dict[str, dict[str, Any]]:
    """Every case's losses, gradient norms and statistics by step, and its first gradient under HF names."""
    builder = GroupBuilder()
    base.LOG_CERTAIN = math.log(CERTAIN)  # in this process alone
    return {
        case.name: _train(case, assemble(config_of(case, Path(models)), builder, ends=case.objective.ends))
        for case in cases
    }


def _train(case: Case, run: Run) -> dict[str, Any]:
    outcome: dict[str, Any] = {"loss": [], "over_tokens": [], "tokens": [], "grad_norm": [], "stats": [], "packs": []}
    for step in range(case.steps):
        rollouts = batch_of(case, step)
        minibatches = score_and_pack(
            run, score_rollouts(run, rollouts, watch=Stopwatch()), step=step, watch=Stopwatch()
        )
        if step == 0:
            run.trainer.probe(minibatches[0])
            if case.distributed_optimizer:
                gather_gradients(run.trainer.optimization)
            gradients = whole_gradients(run.student)
            outcome["gradients"] = gradients if dist.get_rank() == 0 else {}
        results = [
            run.trainer.step(packs, update=step * case.minibatches + number) for number, packs in enumerate(minibatches)
        ]
        outcome["loss"].append(sum(r.loss for r in results) / len(results))
        outcome["over_tokens"].append(means_over_tokens(results)[0])
        outcome["tokens"].append(sum(r.predictions for r in results))
        outcome["grad_norm"].append(sum(r.grad_norm for r in results) / len(results))
        outcome["stats"].append({name: results[-1].stats[name] for name in sorted(results[-1].stats)})
        outcome["packs"].append([len(packs) for packs in minibatches])
    if case.sgd:
        weights = {name: tensor.clone() for name, tensor in hf_tensors(run.student)}
        outcome["weights"] = weights if dist.get_rank() == 0 else {}
    return outcome


def run_chain(cases: Sequence[Case], models: str, checkpoints: str) -> list[dict[str, Any]]:
    """One training, a step under each case's layout in turn, carried from one to the next by a checkpoint."""
    builder, outcome = GroupBuilder(), []
    for step, case in enumerate(cases):
        run = assemble(config_of(case, Path(models)), builder)
        if step:
            path = find_checkpoint(checkpoints)
            assert path is not None
            assert load_checkpoint(path, run.student, run.trainer.optimization)["step"] == step
        rollouts = random_rollouts(step, vocab_size=VOCAB, count=case.sequences)
        [packs] = score_and_pack(run, score_rollouts(run, rollouts, watch=Stopwatch()), step=step, watch=Stopwatch())
        result = run.trainer.step(packs, update=step)
        outcome.append({"loss": result.loss, "grad_norm": result.grad_norm})
        save_checkpoint(Path(checkpoints), run.student, run.trainer.optimization, step=step + 1, state={})
    return outcome


def gather_gradients(optimization: Optimization) -> None:
    """Completes what the distributed optimizer has reduced and cut: every rank gets the others' shares too."""
    for wrapped in optimization.wrapped:
        for group in (*wrapped.bucket_groups, *wrapped.expert_parallel_bucket_groups):
            ranks = group.intra_distributed_optimizer_instance_group
            for bucket in group.buckets:
                share = bucket.grad_data.chunk(ranks.size())[ranks.rank()].clone()
                dist.all_gather(list(bucket.grad_data.chunk(ranks.size())), share, group=ranks)


def whole_gradients(model: Model) -> dict[str, Tensor]:
    """``main_grad`` of every parameter under its HF name, whole, on every rank: published in the weights' place."""
    with weights_replaced(model):
        return {name: tensor.clone() for name, tensor in hf_tensors(model)}


@contextmanager
def weights_replaced(model: Model) -> Iterator[None]:
    parameters = [parameter for _, parameter in local_table(model)]
    kept = [parameter.detach().clone() for parameter in parameters]
    for parameter in parameters:
        parameter.data.copy_(parameter.main_grad)  # type: ignore[attr-defined]
    yield
    for parameter, value in zip(parameters, kept, strict=True):
        parameter.data.copy_(value)


# --------------------------------------------------------------------------- self check


def self_checks(cases: Sequence[Case], models: str) -> dict[str, dict[str, Any]]:
    """What ``check_self`` measures for a healthy student, and what it says when the teacher's path disagrees."""
    builder = GroupBuilder()
    return {case.name: _self_check(assemble(config_of(case, Path(models)), builder)) for case in cases}


def _self_check(run: Run) -> dict[str, Any]:
    def check() -> SelfCheck:
        return check_self(
            run.student,
            run.trainer.optimization,
            run.method,
            vocab_size=VOCAB,
            share_prefixes=run.world.share_prefixes,
        )

    healthy = check()
    with _teacher_sees_another_norm(run.student):
        try:
            missed = check()
            message = f"loss {missed.loss:.1e}, gradient {missed.gradient:.1e}: not caught"
        except SelfCheckError as error:
            message = str(error)
    return {"loss": healthy.loss, "gradient": healthy.gradient, "applies": healthy.applies, "broken": message}


@contextmanager
def _teacher_sees_another_norm(model: Model) -> Iterator[None]:
    """While a teacher scores, the final norm of the model is 0.3 % larger."""
    scored = MegatronTeacher.score
    norms = [c.decoder.final_layernorm.weight for c in model.chunks if c.post_process]

    def score(self: Any, *args: Any) -> Any:
        for weight in norms:
            weight.data.mul_(1.003)
        try:
            return scored(self, *args)
        finally:
            for weight in norms:
                weight.data.div_(1.003)

    MegatronTeacher.score = score  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        MegatronTeacher.score = scored  # type: ignore[method-assign]
