"""From a configuration to the objects of a run. Everything that can be wrong is found before work begins."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.config.run import RunConfig
from megatron_tropd.config.sections import (
    CheckpointConfig,
    DataConfig,
    Dtype,
    EvaluateConfig,
    Layout,
    RewardConfig,
    RolloutConfig,
    TrainConfig,
)
from megatron_tropd.convert.hf import check_weights
from megatron_tropd.convert.source import (
    ModelPath,
    as_source,
    open_weights,
    source_architecture,
    source_files,
    source_fingerprint,
)
from megatron_tropd.data.packing import pack, pack_for_both
from megatron_tropd.data.stream import PromptStream
from megatron_tropd.data.table import PromptTable
from megatron_tropd.data.tokenizer import Tokenizer
from megatron_tropd.engine.model import Model, build_model, padded_vocab_size
from megatron_tropd.engine.offload import OffloadStats
from megatron_tropd.engine.optimizer import optimize
from megatron_tropd.engine.step import Trainer
from megatron_tropd.engine.weights import load_weights
from megatron_tropd.errors import ConfigError
from megatron_tropd.methods import Method
from megatron_tropd.models.name_table import output_entry
from megatron_tropd.models.rules import RULES, TensorShard, fill
from megatron_tropd.parallel.groups import GroupBuilder, Groups, initialize_distributed
from megatron_tropd.parallel.partition import CrossWorldLink
from megatron_tropd.progress.phases import Phase
from megatron_tropd.rollout.engines.megatron import MegatronSampler
from megatron_tropd.rollout.engines.registry import ROLLOUT_ENGINES, SamplerContext, build_embedded
from megatron_tropd.rollout.protocol import Sampler
from megatron_tropd.setup.adapters import base_serves, with_adapters
from megatron_tropd.setup.datasets import shares_of
from megatron_tropd.setup.rewards import RewardFunction, reward_function
from megatron_tropd.setup.validate import (
    DTYPES,
    Inputs,
    check_method,
    identity,
    longest_sequence,
    longest_training_sequence,
    most_alternatives,
    teacher_request,
)
from megatron_tropd.teacher.engines.megatron import MegatronTeacher
from megatron_tropd.teacher.engines.recorded import RecordingTeacher
from megatron_tropd.teacher.engines.registry import TeacherContext, scoring_engine
from megatron_tropd.teacher.engines.remote import RankSplit
from megatron_tropd.teacher.moving import MovingTeacher
from megatron_tropd.teacher.protocol import Teacher, TeacherRequest
from megatron_tropd.teacher.recording import FILE, check_facts
from megatron_tropd.teacher.routing import RoutedTeacher, TeacherWithBase
from megatron_tropd.types import Architecture, Pack, Rollout

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
    "load_model",
    "load_teacher",
    "output_weight_for",
    "pack_for",
    "rank_split",
    "sections_of",
    "with_others",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process's device and the layouts over all processes."""

    device: torch.device
    student: Groups
    teacher: Groups | None  # None where the teacher has ranks of its own
    sampler: Groups
    base: Groups | None = None  # None without a base model
    teachers: Mapping[str, Groups] = field(default_factory=dict)  # of those beside the teacher, by name
    offload_stats: OffloadStats = field(default_factory=OffloadStats)  # between this process's device and host memory
    remote: Layout | None = None  # of a teacher that has ranks of its own
    share_prefixes: bool = False  # whether packs are forests

    @property
    def is_first(self) -> bool:
        return dist.get_rank() == 0

    @property
    def pack_multiple(self) -> int:
        """Return what the length of a pack must be a multiple of: all models run the same packs, each by its layout."""
        models = (self.student, self.teacher, self.base, *self.teachers.values())
        layouts = [groups.layout for groups in models if groups is not None]
        layouts += [] if self.remote is None else [self.remote]
        return 2 * math.lcm(*(layout.tensor * layout.context for layout in layouts))


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Everything ``loop.train`` works with."""

    run_dir: Path
    seed: int
    dtype: Dtype
    data: DataConfig
    rollout: RolloutConfig
    reward: RewardConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    evaluate: EvaluateConfig
    offloads: bool  # whether something is moved between the device and host memory
    scores_new: bool  # whether the teacher scores what it has not seen, which a recording does not
    world: World
    tokenizer: Tokenizer
    prompts: PromptStream
    problems: Mapping[str, PromptTable]  # held out, by suite; empty when nothing is evaluated
    method: Method
    vocab_size: int  # ids all models know
    student: Model
    trainer: Trainer
    teacher_model: Model | None  # None where vLLM, a recording or other ranks stand in for it
    teacher: Teacher
    sampler: Sampler
    teacher_request: TeacherRequest
    moving: MovingTeacher | None = None  # a teacher whose weights follow the student's
    reward_function: RewardFunction | None = None  # None: answers are graded
    identity: Mapping[str, Any] = field(default_factory=dict)  # what a checkpoint must share: see validate.identity


def build_run(
    config: RunConfig,
    inputs: Inputs,
    bridge: CrossWorldLink | None = None,
    *,
    known: Mapping[str, Any] | None = None,
) -> Run:
    """Build the run from inputs that fit it (``validate.read_inputs``). Collective.

    ``bridge``: to the teacher's own ranks, with ``teacher.ranks``. ``known``: its identity, where that has been found.

    Raises:
        TropdError: weights or a recording cannot be used.
    """
    device = initialize_distributed()
    method = inputs.method
    world = build_world(config, device, base=inputs.base is not None)
    student = load_student(config, world)
    request = teacher_request(config, method)
    moving = moving_teacher(config, world, student)
    teacher = load_teacher(config, world, student) if moving is None else moving.model
    trainer = Trainer(
        student,
        optimize(
            student,
            config.optimizer,
            steps=config.train.steps,
            minibatches=config.train.minibatches,
            offload_stats=world.offload_stats,
        ),
        method,
        vocab_size=inputs.vocab_size,
        # one that moves is taken at every step
        teacher_weight_vE=output_weight_for(config.teacher.source, inputs.teacher, student)
        if request.hidden_states
        else None,
        keep_logits_bytes=int(config.train.keep_logits_gb * 2**30),
    )
    # an engine in these processes takes a share of what it finds free: what is offloaded leaves before it comes
    trainer.end_step()
    return Run(
        **sections_of(config),
        world=world,
        tokenizer=inputs.tokenizer,
        prompts=PromptStream(
            inputs.prompts, config.seed, shuffle=config.data.shuffle, shares=shares_of(config.data, inputs.prompts)
        ),
        problems=inputs.problems,
        method=method,
        vocab_size=inputs.vocab_size,
        student=student,
        trainer=trainer,
        teacher_model=teacher,
        teacher=build_teacher(config, inputs, teacher, world, bridge, student=student),
        sampler=build_sampler(config, student.architecture, world, inputs.vocab_size),
        teacher_request=request,
        moving=moving,
        identity=identity(config, inputs) if known is None else known,
    )


def sections_of(config: RunConfig) -> dict[str, Any]:
    """Return what a :class:`Run` has of the configuration itself."""
    names = ("run_dir", "seed", "dtype", "data", "rollout", "reward", "train", "checkpoint", "evaluate")
    facts = {
        "offloads": config.teacher.offload or config.optimizer.offload,
        "scores_new": scoring_engine(config.teacher).scores_new,
        "reward_function": reward_function(config.reward.function),
    }
    return {name: getattr(config, name) for name in names} | facts


def build_teacher(
    config: RunConfig,
    inputs: Inputs,
    model: Model | None,
    world: World,
    bridge: CrossWorldLink | None = None,
    *,
    student: Model | None = None,
) -> Teacher:
    """Build the teacher: live or recorded, recording itself on request, with a base model beside it if there is one.

    ``model``: what :func:`load_teacher` has loaded. ``bridge``: to the teacher's own ranks, with ``teacher.ranks``.
    ``student``: as of :func:`load_frozen`.
    """
    engine = scoring_engine(config.teacher)
    context = TeacherContext(
        section=config.teacher,
        architecture=inputs.teacher,
        student=world.student,
        dtype=DTYPES[config.dtype],
        device=world.device,
        vocab_size=inputs.vocab_size,
        temperature=inputs.method.temperature,
        max_tokens=longest_training_sequence(config),
        top_k=most_alternatives(config, inputs.method, inputs.teacher),
        groups=world.teacher,
        model=model,
        link=bridge,
        split=None if bridge is None else rank_split(config, dist.get_world_size()),
        facts=recorded_facts(config, inputs),
    )
    with Phase(f"starting the teacher ({config.teacher.engine})"):
        own = engine.build(context)
    if not engine.scores_new:
        return own
    live = with_others(
        config, own, world, vocab_size=context.vocab_size, temperature=context.temperature, student=student
    )
    if config.teacher.record is None:
        return live
    return RecordingTeacher(
        live, config.teacher.record, world.student, facts=context.facts, values=config.teacher.record_values
    )


def recorded_facts(config: RunConfig, inputs: Inputs) -> dict[str, Any]:
    """Return what a recording of the teacher's scores must share with the run that replays it."""
    facts: dict[str, Any] = {
        "architecture": asdict(inputs.teacher),
        "vocab_size": inputs.vocab_size,
        "temperature": inputs.method.temperature,
        "dtype": config.dtype,
        "tokenizer": inputs.tokenizer.fingerprint(),
        "end tokens": sorted(inputs.tokenizer.eos_ids),
        "ends counted as one": list(inputs.method.end_ids),
        "chat template": None if inputs.tokenizer.chat is None else inputs.tokenizer.chat.fingerprint(),
        "budget": {"prompt": config.data.max_prompt_tokens, "response": config.rollout.max_new_tokens},
        **({} if inputs.base is None else {"base model": asdict(inputs.base)}),
    }
    if config.teacher.record is None and config.teacher.recorded_from is None:
        return facts
    models = {"teacher weights": config.teacher.source}
    models |= {} if inputs.base is None else {"base model weights": config.base_source}
    prints = {name: source_fingerprint(source) for name, source in models.items()}
    # a model that is not there any more cannot be compared
    return facts | {name: found for name, found in prints.items() if found is not None}


def check_teacher_recording(config: RunConfig, inputs: Inputs) -> None:
    """Raise DataError when scores cannot be recorded beside those that are there, or replayed, before work begins."""
    facts = recorded_facts(config, inputs)
    if config.teacher.record is not None and (config.teacher.record / FILE).exists():
        check_facts(config.teacher.record, facts, fix="Record into another directory", adding=True, quiet=True)
    if config.teacher.recorded_from is not None:
        check_facts(config.teacher.recorded_from, facts, fix="Use the models and method of the recording", quiet=True)


def with_others(
    config: RunConfig,
    teacher: Teacher,
    world: World,
    *,
    vocab_size: int,
    temperature: float,
    student: Model | None = None,
) -> Teacher:
    """Put ``teacher`` together with the other teachers, and with the base model where the world has a place for one.

    ``student``: as of :func:`load_frozen`.
    """
    if config.teachers:
        teacher = RoutedTeacher({"": teacher, **_other_teachers(config, world, vocab_size, temperature, student)})
    if world.base is None:
        return teacher
    base = load_frozen(config, config.base_source, world.base, world, student)
    beside = MegatronTeacher(base, world.student, vocab_size=vocab_size, temperature=temperature, role="base model")
    return TeacherWithBase(teacher, beside)


def rank_split(config: RunConfig, student_ranks: int) -> RankSplit:
    """Describe how a launch is divided between the student and a teacher with ranks of its own."""
    return RankSplit(
        student=config.student.parallel,
        student_ranks=student_ranks,
        teacher=config.teacher.parallel,
        teacher_ranks=config.teacher.ranks,
    )


def _other_teachers(
    config: RunConfig, world: World, vocab_size: int, temperature: float, student: Model | None
) -> dict[str, Teacher]:
    found: dict[str, Teacher] = {}
    for one in config.teachers:
        model = load_frozen(config, one.source, world.teachers[one.name], world, student)
        role = f"teacher {one.name!r}"
        found[one.name] = MegatronTeacher(
            model, world.student, vocab_size=vocab_size, temperature=temperature, role=role
        )
    return found


def build_world(config: RunConfig, device: torch.device, *, base: bool = False) -> World:
    """Build the process groups of all layouts, in the same order on every rank."""
    builder = GroupBuilder(timeout_s=config.collective_timeout_s)
    student = builder.build(config.student.parallel)
    shared = student if config.teacher.moves else None  # weights that follow the student's are laid out as they are
    return World(
        device=device,
        student=student,
        teacher=None if config.teacher.ranks else shared or builder.build(config.teacher.parallel),
        sampler=builder.build(Layout(tensor=config.rollout.parallel.tensor)),
        base=builder.build(config.base_parallel) if base else None,
        teachers={one.name: builder.build(one.parallel) for one in config.teachers},
        remote=config.teacher.parallel if config.teacher.ranks else None,
        share_prefixes=config.train.share_prefixes == "auto",
    )


def pack_for(world: World, rollouts: Sequence[Rollout], *, pack_tokens: int, hidden_size: int) -> list[list[Pack]]:
    """Pack rollouts for every student replica; ``hidden_size``: the student's.

    No pack mixes teachers, and pack by pack all replicas have the same one. Where the teacher reads prompts of its own,
    each has a second pack that it reads.
    """
    replicas: list[list[Pack]] = [[] for _ in range(world.student.num_replicas)]
    for teacher in sorted({rollout.teacher for rollout in rollouts}):
        own = [rollout for rollout in rollouts if rollout.teacher == teacher]
        packer = pack if all(rollout.teacher_prompt_ids is None for rollout in own) else pack_for_both
        packs = packer(
            own,
            max_tokens=pack_tokens,
            multiple_of=world.pack_multiple,
            num_replicas=len(replicas),
            linear_work=12 * hidden_size,
            share_prefixes=world.share_prefixes,
        )
        for replica, mine in zip(replicas, packs, strict=True):
            replica += [replace(one, teacher=teacher) for one in mine] if teacher else mine
    return replicas


def load_model(source: ModelPath, groups: Groups, *, dtype: torch.dtype, device: torch.device, **options: Any) -> Model:
    """Build a model with the weights of a Hugging Face directory or a checkpoint of Megatron.

    ``options``: those of ``build_model``.
    """
    architecture, weights = source_architecture(source), open_weights(source)
    check_weights(weights, architecture)  # a wrong config.json may give a model of any size
    with Phase("building the model"):
        model = build_model(architecture, groups, dtype=dtype, device=device, initialize=False, **options)
    load_weights(model, weights)
    return model


def load_student(config: RunConfig, world: World) -> Model:
    """Load the model that is trained, with adapters where ``student.lora`` requests them."""
    model = load_model(
        config.student.source,
        world.student,
        dtype=DTYPES[config.dtype],
        device=world.device,
        recompute=config.student.recompute,
        balance=config.student.router_aux_loss,
    )
    return with_adapters(config, model)


def load_teacher(config: RunConfig, world: World, student: Model | None = None) -> Model | None:
    """Load the teacher's model; None where vLLM, a recording or other ranks stand in for it.

    ``student``: as of :func:`load_frozen`.
    """
    if world.teacher is None or not scoring_engine(config.teacher).loads_model:
        return None
    return load_frozen(config, config.teacher.source, world.teacher, world, student)


def moving_teacher(config: RunConfig, world: World, student: Model) -> MovingTeacher | None:
    """Build the teacher whose weights follow the student's; None where it has weights of its own."""
    section = config.teacher
    if not section.moves:
        return None
    if section.update == "live":
        return MovingTeacher(student=student)
    source, groups, device = config.student.source, world.student, world.device
    average = load_model(source, groups, dtype=torch.float32, device=device).freeze()
    scoring = average if student.dtype == torch.float32 else load_frozen(config, source, groups, world)
    if scoring is average and section.offload:
        raise ConfigError(
            "teacher.offload=true moves a teacher that is the same at every step; with dtype=fp32 the moving average "
            "itself scores. Set it to false."
        )
    return MovingTeacher(
        student=student, average=average, scoring=scoring, decay=section.ema_decay, every=section.ema_every
    )


def load_frozen(
    config: RunConfig, source: ModelPath, groups: Groups, world: World, student: Model | None = None
) -> Model:
    """Load a model that only scores: on the device throughout, or with ``teacher.offload`` while it scores.

    ``student``: if it has adapters and is made from this very model, its frozen base is used, and nothing loaded.
    """
    if student is not None and base_serves(config, as_source(source), groups.layout):
        return student.frozen_base()
    model = load_model(source, groups, dtype=DTYPES[config.dtype], device=world.device).freeze()
    return model.with_offload(world.offload_stats) if config.teacher.offload else model


def build_sampler(config: RunConfig, architecture: Architecture, world: World, vocab_size: int) -> Sampler:
    """Build the sampler that ``rollout.engine`` names."""
    context = _sampler_context(config, architecture, world, vocab_size)
    with Phase(f"starting the sampler ({config.rollout.engine})"):
        return ROLLOUT_ENGINES[config.rollout.engine].build(context)


def embedded_sampler(
    config: RunConfig, architecture: Architecture, world: World, vocab_size: int | None = None
) -> MegatronSampler:
    """Build a sampler over its own copy of the weights."""
    return build_embedded(_sampler_context(config, architecture, world, vocab_size))


def _sampler_context(
    config: RunConfig, architecture: Architecture, world: World, vocab_size: int | None
) -> SamplerContext:
    return SamplerContext(
        section=config.rollout,
        model=source_files(config.student.source),
        architecture=architecture,
        groups=world.sampler,
        dtype=DTYPES[config.dtype],
        device=world.device,
        max_tokens=longest_sequence(config),
        vocab_size=vocab_size,
        run_dir=config.run_dir,
    )


def output_weight_for(source: ModelPath, teacher: Architecture, student: Model) -> Tensor:
    """Read, ``[v, E]``, the output weight of the teacher ``source`` under the student's vocabulary partition.

    The partition is that of the *student's* padded vocabulary: the teacher's own size, and so its padding, may differ.

    Raises:
        CheckpointError: the teacher's weights cannot be used.
    """
    entry = output_entry(teacher)
    tensor = student.groups.layout.tensor
    padded = padded_vocab_size(student.architecture.vocab_size, tensor)
    cut = TensorShard(teacher, student.groups.tensor_rank, tensor, padded)
    weight = torch.empty(RULES[entry.rule].shard_shape(entry.shapes, cut), dtype=student.dtype, device=student.device)
    fill(entry.rule, weight, {0: open_weights(source)[entry.hf[0]]}, entry.shapes, cut)
    return weight
