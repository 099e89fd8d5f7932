"""From a configuration to the objects of a run. Everything that can be wrong is found here, before work begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.config import ParallelConfig, RunConfig
from megatron_tropd.convert.families import EMBEDDING, OUTPUT
from megatron_tropd.convert.hf import HFWeights, read_architecture
from megatron_tropd.convert.rules import RULES, Cut
from megatron_tropd.data.prompts import Columns, PromptStream, read_prompts
from megatron_tropd.data.tokenizer import Tokenizer, check_same_vocabulary, load_tokenizer
from megatron_tropd.engine.model import Model, build_model, padded_vocab_size
from megatron_tropd.engine.optimizer import OptimizerSettings, optimize
from megatron_tropd.engine.step import Trainer
from megatron_tropd.engine.weights import hf_tensors, load_weights
from megatron_tropd.errors import ConfigError
from megatron_tropd.methods import Method, build_method
from megatron_tropd.parallel.groups import GroupBuilder, Groups, Layout, initialize_distributed
from megatron_tropd.rollout.megatron import MegatronSampler
from megatron_tropd.rollout.recorded import RecordedSampler
from megatron_tropd.rollout.sampler import Sampler
from megatron_tropd.teacher.megatron import MegatronTeacher
from megatron_tropd.teacher.protocol import SignalSpec, Teacher
from megatron_tropd.types import Architecture, Prompt

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
    teacher_model: Model
    teacher: Teacher
    sampler: Sampler
    signal: SignalSpec


def build_run(config: RunConfig) -> Run:
    """Builds the run. Collective.

    Raises:
        TropdError: whatever the config, data, tokenizers or checkpoints have wrong, in that order.
    """
    device = initialize_distributed()
    method = check_method(config)
    check_available(config)
    config.check_world(dist.get_world_size())
    tokenizer, vocab_size = read_tokenizers(config)
    prompts, problems = read_data(config, tokenizer, method)
    world = build_world(config, device)
    dtype = DTYPES[config.dtype]
    student = load_model(
        config.student.model, world.student, dtype=dtype, device=device, recompute=config.student.recompute
    )
    teacher = load_model(config.teacher.model, world.teacher, dtype=dtype, device=device).freeze()
    signal = SignalSpec(top_k=method.needs.top_k, entropy=True, hidden_states=method.needs.hidden_states)
    trainer = Trainer(
        student,
        optimize(student, optimizer_settings(config)),
        method,
        vocab_size=vocab_size,
        teacher_weight_vE=output_weight_for(teacher, world.student) if signal.hidden_states else None,
    )
    return Run(
        config=config,
        world=world,
        tokenizer=tokenizer,
        prompts=PromptStream(prompts, config.seed),
        problems=problems,
        method=method,
        vocab_size=vocab_size,
        student=student,
        trainer=trainer,
        teacher_model=teacher,
        teacher=MegatronTeacher(teacher, world.student, vocab_size=vocab_size, temperature=method.temperature),
        sampler=build_sampler(config, student.architecture, world, vocab_size),
        signal=signal,
    )


def check_method(config: RunConfig) -> Method:
    """The method; ConfigError for an unknown name or option, or a need this version cannot serve."""
    method = build_method(config.method.name, **config.method.options)
    if method.needs.base_model:
        raise ConfigError(f"method.name={config.method.name!r} needs a base model, which is not available yet.")
    if method.needs.support not in ("teacher", "teacher_and_sampled"):
        raise ConfigError(
            f"method support={method.needs.support!r} is not available yet; use 'teacher' or 'teacher_and_sampled'."
        )
    return method


def check_available(config: RunConfig) -> None:
    """Refuses what the configuration knows and this version does not run yet."""
    if config.rollout.engine in ("vllm", "vllm_server"):
        raise ConfigError(f"rollout.engine={config.rollout.engine} is not available yet; use megatron or recorded.")
    if config.rollout.ahead:
        raise ConfigError(f"rollout.ahead={config.rollout.ahead} is not available yet; use 0.")
    for role, parallel in (("student", config.student.parallel), ("teacher", config.teacher.parallel)):
        for axis in ("context", "expert", "virtual_pipeline"):
            if getattr(parallel, axis) > 1:
                raise ConfigError(f"{role}.parallel.{axis}={getattr(parallel, axis)} is not available yet; use 1.")
    for role, section in (("student", config.student), ("teacher", config.teacher)):
        if section.attention == "te":
            raise ConfigError(f"{role}.attention=te is not available yet; use sdpa or auto.")


def read_tokenizers(config: RunConfig) -> tuple[Tokenizer, int]:
    """The student's tokenizer, and the number of ids both models know."""
    tokenizer = load_tokenizer(config.student.model, chat_template=config.data.chat_template)
    teacher = load_tokenizer(config.teacher.model, chat_template=config.data.chat_template)
    check_same_vocabulary(tokenizer, teacher)
    sizes = [read_architecture(path).vocab_size for path in (config.student.model, config.teacher.model)]
    return tokenizer, min(sizes)


def read_data(config: RunConfig, tokenizer: Tokenizer, method: Method) -> tuple[tuple[Prompt, ...], tuple[Prompt, ...]]:
    """Training prompts and evaluation problems."""
    data, columns = config.data, Columns(**config.data.columns.model_dump())
    prompts = read_prompts(
        data.prompts,
        tokenizer,
        columns=columns,
        max_prompt_tokens=data.max_prompt_tokens,
        require_response=config.rollout.guided_per_prompt > 0 and method.guided,
        on_bad_row=data.on_bad_row,
    ).prompts
    return prompts, read_problems(config, tokenizer)


def read_problems(config: RunConfig, tokenizer: Tokenizer) -> tuple[Prompt, ...]:
    """The evaluation problems, none when ``evaluate.prompts`` is null."""
    if config.evaluate.prompts is None:
        return ()
    problems = read_prompts(
        config.evaluate.prompts,
        tokenizer,
        columns=Columns(**config.data.columns.model_dump()),
        max_prompt_tokens=config.data.max_prompt_tokens,
        on_bad_row=config.data.on_bad_row,
    ).prompts
    return problems[: config.evaluate.max_problems]


def layout_of(parallel: ParallelConfig) -> Layout:
    """The layout a config section asks for."""
    return Layout(**parallel.model_dump())


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


def output_weight_for(teacher: Model, student: Groups) -> Tensor:
    """``[v, E]``: the teacher's output weight under the student's vocabulary partition. Collective."""
    name = (EMBEDDING if teacher.architecture.tied_embeddings else OUTPUT).hf[0]
    whole = next(tensor for tensor in _only(teacher, name))
    layout = student.layout
    padded = padded_vocab_size(teacher.architecture.vocab_size, layout.tensor)
    cut = Cut(teacher.architecture, student.tensor_rank, layout.tensor, padded)
    return RULES[OUTPUT.rule].cut([whole], cut).clone()


def _only(model: Model, name: str) -> Sequence[Tensor]:
    # the stream is collective, so it runs to its end whatever is kept of it
    return [tensor for key, tensor in hf_tensors(model) if key == name]
