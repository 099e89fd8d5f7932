"""From a configuration to the objects of a run. Everything that can be wrong is found before work begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.config import RunConfig
from megatron_tropd.convert.families import EMBEDDING, OUTPUT
from megatron_tropd.convert.hf import HFWeights, read_architecture
from megatron_tropd.convert.rules import RULES, Cut
from megatron_tropd.data.prompts import PromptStream
from megatron_tropd.data.tokenizer import Tokenizer
from megatron_tropd.engine.model import Model, build_model, padded_vocab_size
from megatron_tropd.engine.optimizer import OptimizerSettings, optimize
from megatron_tropd.engine.step import Trainer
from megatron_tropd.engine.weights import hf_tensors, load_weights
from megatron_tropd.inputs import DTYPES, Inputs, check_method, identity, layout_of
from megatron_tropd.methods import Method
from megatron_tropd.parallel.groups import GroupBuilder, Groups, Layout, initialize_distributed
from megatron_tropd.rollout.megatron import MegatronSampler
from megatron_tropd.rollout.recorded import RecordedSampler
from megatron_tropd.rollout.sampler import Sampler
from megatron_tropd.teacher.megatron import MegatronTeacher
from megatron_tropd.teacher.protocol import SignalSpec, Teacher
from megatron_tropd.teacher.recorded import RecordedTeacher, RecordingTeacher
from megatron_tropd.types import Architecture, Prompt

__all__ = [
    "DTYPES",
    "Run",
    "World",
    "build_run",
    "build_sampler",
    "build_teacher",
    "build_world",
    "check_method",
    "embedded_sampler",
    "layout_of",
    "load_model",
    "optimizer_settings",
    "output_weight_for",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process's device and the layouts over all processes."""

    device: torch.device
    student: Groups
    teacher: Groups
    sampler: Groups

    @property
    def is_first(self) -> bool:
        return dist.get_rank() == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Everything ``loop.train`` works with."""

    config: RunConfig
    world: World
    tokenizer: Tokenizer
    prompts: PromptStream
    problems: tuple[Prompt, ...]  # held out, for evaluation; empty when there is none
    method: Method
    vocab_size: int  # ids both models know
    student: Model
    trainer: Trainer
    teacher_model: Model | None  # None where a recording stands in and nothing else asks for the model
    teacher: Teacher
    sampler: Sampler
    signal: SignalSpec
    identity: Mapping[str, Any] = field(default_factory=dict)  # what a checkpoint must share: see inputs.identity


def build_run(config: RunConfig, inputs: Inputs) -> Run:
    """Builds the run from inputs that fit it (``inputs.read_inputs``). Collective.

    Raises:
        TropdError: weights or a recording cannot be used.
    """
    device = initialize_distributed()
    method, world, dtype = inputs.method, build_world(config, device), DTYPES[config.dtype]
    student = load_model(
        config.student.model, world.student, dtype=dtype, device=device, recompute=config.student.recompute
    )
    signal = SignalSpec(top_k=method.needs.top_k, entropy=True, hidden_states=method.needs.hidden_states)
    teacher = None
    if needs_teacher_model(config, inputs, signal):
        teacher = load_model(config.teacher.model, world.teacher, dtype=dtype, device=device).freeze()
    trainer = Trainer(
        student,
        optimize(student, optimizer_settings(config)),
        method,
        vocab_size=inputs.vocab_size,
        teacher_weight_vE=output_weight_for(teacher, student) if teacher and signal.hidden_states else None,
    )
    return Run(
        config=config,
        world=world,
        tokenizer=inputs.tokenizer,
        prompts=PromptStream(inputs.prompts, config.seed),
        problems=inputs.problems,
        method=method,
        vocab_size=inputs.vocab_size,
        student=student,
        trainer=trainer,
        teacher_model=teacher,
        teacher=build_teacher(config, inputs, teacher, world),
        sampler=build_sampler(config, student.architecture, world, inputs.vocab_size),
        signal=signal,
        identity=identity(config, inputs),
    )


def needs_teacher_model(config: RunConfig, inputs: Inputs, signal: SignalSpec) -> bool:
    """Whether someone will ask the teacher: to grade, for its output weight, or to be evaluated."""
    evaluated = config.evaluate.teacher and bool(inputs.problems)
    return config.teacher.recorded_from is None or signal.hidden_states or evaluated


def build_teacher(config: RunConfig, inputs: Inputs, model: Model | None, world: World) -> Teacher:
    """The teacher, live or recorded, recording itself when asked to."""
    facts = {
        "architecture": asdict(inputs.teacher),
        "vocab_size": inputs.vocab_size,
        "temperature": inputs.method.temperature,
    }
    if config.teacher.recorded_from is not None:
        return RecordedTeacher(config.teacher.recorded_from, world.student, world.device, facts=facts)
    assert model is not None
    live = MegatronTeacher(model, world.student, vocab_size=inputs.vocab_size, temperature=inputs.method.temperature)
    if config.teacher.record is None:
        return live
    return RecordingTeacher(live, config.teacher.record, world.student, facts=facts)


def build_world(config: RunConfig, device: torch.device) -> World:
    """Process groups of the three layouts, made in the same order on every rank."""
    builder = GroupBuilder()
    return World(
        device=device,
        student=builder.build(layout_of(config.student.parallel)),
        teacher=builder.build(layout_of(config.teacher.parallel)),
        sampler=builder.build(Layout(tensor=config.rollout.parallel.tensor)),
    )


def load_model(
    path: str | Path, groups: Groups, *, dtype: torch.dtype, device: torch.device, recompute: str = "none"
) -> Model:
    """A model with the weights of a Hugging Face directory."""
    model = build_model(read_architecture(path), groups, dtype=dtype, device=device, recompute=recompute)
    load_weights(model, HFWeights(path))
    return model


def optimizer_settings(config: RunConfig) -> OptimizerSettings:
    """``optimizer.*`` counts steps; the engine counts updates."""
    options = config.optimizer.model_dump()
    updates = config.train.minibatches
    return OptimizerSettings(
        total_updates=config.train.steps * updates, warmup_updates=options.pop("warmup_steps") * updates, **options
    )


def build_sampler(config: RunConfig, architecture: Architecture, world: World, vocab_size: int) -> Sampler:
    """The sampler ``rollout.engine`` names."""
    if config.rollout.engine == "recorded":
        assert config.rollout.recorded_from is not None  # config.py sees to it
        return RecordedSampler(config.rollout.recorded_from)
    return embedded_sampler(config, architecture, world, vocab_size)


def embedded_sampler(
    config: RunConfig, architecture: Architecture, world: World, vocab_size: int | None = None
) -> MegatronSampler:
    """A sampler over its own copy of the weights."""
    return MegatronSampler(
        architecture,
        world.sampler,
        dtype=DTYPES[config.dtype],
        device=world.device,
        batch_size=config.rollout.batch_size,
        vocab_size=vocab_size,
    )


def output_weight_for(teacher: Model, student: Model) -> Tensor:
    """``[v, E]``: the teacher's output weight under the student's vocabulary partition. Collective.

    The partition is that of the *student's* padded vocabulary: the teacher's own size, and so its padding, may differ.
    """
    name = (EMBEDDING if teacher.architecture.tied_embeddings else OUTPUT).hf[0]
    whole = next(tensor for tensor in _only(teacher, name))
    tensor = student.groups.layout.tensor
    padded = padded_vocab_size(student.architecture.vocab_size, tensor)
    cut = Cut(teacher.architecture, student.groups.tensor_rank, tensor, padded)
    return RULES[OUTPUT.rule].cut([whole], cut).clone()


def _only(model: Model, name: str) -> Sequence[Tensor]:
    # the stream is collective, so it runs to its end whatever is kept of it
    return [tensor for key, tensor in hf_tensors(model) if key == name]
