"""Show what a configuration resolves to, before anything is spent on it: layout, packs, memory, self check."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from megatron_tropd.config.run import RunConfig
from megatron_tropd.config.sections import Layout, OptimizerConfig
from megatron_tropd.data.packing import backend, pack
from megatron_tropd.data.table import PromptTable
from megatron_tropd.engine.model import build_model, padded_vocab_size
from megatron_tropd.engine.optimizer import optimize
from megatron_tropd.losses.vocab_parallel.backends import choose_backend
from megatron_tropd.losses.vocab_parallel.tiles import Shard, plan_tiles
from megatron_tropd.models.adapters import adapter_shapes
from megatron_tropd.parallel.groups import GroupBuilder, initialize_distributed
from megatron_tropd.planning.activations import activation_bytes, per_token_bytes
from megatron_tropd.planning.decoding import advice
from megatron_tropd.planning.parameters import frozen_states, total_parameters, trained_states
from megatron_tropd.planning.phases import by_phase, leaving
from megatron_tropd.progress.phases import Phase
from megatron_tropd.report.table import print_titled
from megatron_tropd.report.terminal import literal, say
from megatron_tropd.rollout.engines.registry import ROLLOUT_ENGINES
from megatron_tropd.setup.adapters import adapter_spec, base_serves
from megatron_tropd.setup.chat_templates import DIFFERENCES, difference_table, template_differences
from megatron_tropd.setup.ends import tell_ends
from megatron_tropd.setup.self_check import check_self
from megatron_tropd.setup.validate import (
    DTYPES,
    Inputs,
    check_export,
    guided_per_prompt,
    read_inputs,
    sequences_per_step,
)
from megatron_tropd.teacher.protocol import TeacherRequest
from megatron_tropd.types import Architecture, Rollout, single_turn

_MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on the fullest rank, of all that it ever holds."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    teacher: int
    base: int
    sampler: int

    @property
    def parts(self) -> dict[str, float]:
        """Return the parts by name."""
        return {name: getattr(self, name) for name in self.__slots__}


def estimate_memory(config: RunConfig, inputs: Inputs, *, loss_bytes: int) -> Memory:
    """Estimate bytes per rank: weights, fp32 gradients, Adam states, activations in flight, loss, frozen models."""
    itemsize, student = DTYPES[config.dtype].itemsize, inputs.student
    layout = config.student.parallel
    own = trained_states(
        student,
        layout,
        # alone: more replicas only make a distributed optimizer's share smaller
        data_ranks=layout.context * layout.expert,
        itemsize=itemsize,
        moments={"adam": 2, "sgd": int(config.optimizer.momentum > 0)}[config.optimizer.name],
        distributed=config.optimizer.distributed,
        adapters=adapter_spec(config.student, student),
    )
    activations = activation_bytes(
        student, layout, config.train.pack_tokens, itemsize=itemsize, recompute=config.student.recompute
    )
    sampler = frozen_states(student, Layout(tensor=config.rollout.parallel.tensor), itemsize=itemsize)
    return Memory(
        weights=own.weights,
        gradients=own.gradients,
        optimizer=own.optimizer,
        activations=int(activations),
        loss=loss_bytes,
        teacher=0 if config.teacher.ranks else _teacher_bytes(config, inputs),
        base=_base_bytes(config, inputs),
        sampler=sampler.weights,
    )


def _teacher_bytes(config: RunConfig, inputs: Inputs) -> int:
    itemsize = DTYPES[config.dtype].itemsize
    together = max if config.teacher.offload else sum  # each is then there alone
    return together(
        0
        if not config.teacher.ranks and _is_frozen_student(config, role)
        else frozen_states(architecture, parallel, itemsize=itemsize).weights
        for role, _, architecture, parallel in _teachers(config, inputs)
    )


def _base_bytes(config: RunConfig, inputs: Inputs) -> int:
    if inputs.base is None or base_serves(config, config.base_source, config.base_parallel):
        return 0
    return frozen_states(inputs.base, config.base_parallel, itemsize=DTYPES[config.dtype].itemsize).weights


def _is_frozen_student(config: RunConfig, role: str) -> bool:
    """Say whether a teacher is the student without its adapters, which is there already."""
    for one in config.teachers:
        if role == f"teacher {one.name!r}":
            return base_serves(config, one.source, one.parallel)
    return base_serves(config, config.teacher.source, config.teacher.parallel)


def _loss_bytes(student: Architecture, config: RunConfig, device: torch.device) -> int:
    """Count the bytes of the fused loss: two fp32 tiles of logits and the fp32 gradient of a pack's hidden states."""
    tensor = config.student.parallel.tensor
    shard = padded_vocab_size(student.vocab_size, tensor) // tensor
    nothing = torch.empty(1, 1, device=device)
    hidden = nothing.expand(config.train.pack_tokens, student.hidden_size)
    weight, limits = nothing.expand(shard, student.hidden_size), choose_backend(nothing).limits(device)
    tiles = plan_tiles(hidden, weight, Shard(start=0, width=shard), chunk_tokens=None, limits=limits)
    return 4 * (2 * tiles.rows * tiles.columns + hidden.numel())


def check_plan(config: RunConfig) -> None:
    """Print the plan and run the self check on a small model of the student's shape. Collective.

    Raises:
        TropdError: whatever is wrong.
    """
    device = initialize_distributed()
    check_export(config)
    inputs = read_inputs(config, may_lack_responses=True)
    student = inputs.student
    memory = estimate_memory(config, inputs, loss_bytes=_loss_bytes(student, config, device))
    groups = GroupBuilder().build(Layout())
    small = build_model(
        _small(student, inputs.method.needs.top_k), groups, dtype=DTYPES["fp32"], device=device, seed=config.seed
    )
    optimization = optimize(small, OptimizerConfig(lr=1e-3), steps=1)
    method = replace(inputs.method, end_ids=tuple(range(len(inputs.method.end_ids))))  # the model's ids are fewer
    with Phase("self check"):
        found = check_self(
            small,
            optimization,
            method,
            vocab_size=small.architecture.vocab_size,
            seed=config.seed,
            share_prefixes=config.train.share_prefixes == "auto",
        )
    if dist.get_rank() == 0:
        console = Console()
        tell_ends(inputs.ends)
        print_titled(console, f"Plan of {config.run_dir}", _plan_table(config, inputs))
        if differences := template_differences(config, inputs.tokenizer):
            print_titled(console, DIFFERENCES, difference_table(differences))
        print_titled(console, "Estimated memory of the fullest rank, MiB", _memory_table(memory, config))
        if device.type == "cpu":
            console.print(f"beside it, Python and its libraries, as here: {_resident_bytes() / _MIB:,.0f}")
        if config.teacher.ranks:
            console.print(f"on each of the teacher's own ranks {_teacher_bytes(config, inputs) / _MIB:,.1f}")
        title = f"Tensors with a row per token, {_tokens_of_rank(config):,} tokens of a pack on a rank"
        print_titled(console, title, _token_table(config, inputs))
        verdict = (
            f"passed: loss {found.loss:.1e}, gradient {found.gradient:.1e} of maximum likelihood's "
            f"(at most {found.tolerance:.0e})"
            if found.applies
            else "does not apply: this method is not meant to vanish when student and teacher agree"
        )
        say(f"teacher == student self check {verdict}", console=console)


def _resident_bytes() -> int:
    """Return the memory of this process, in which everything is imported and nothing large is loaded."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _tokens_of_rank(config: RunConfig) -> int:
    return config.train.pack_tokens // config.student.parallel.context


def _small(architecture: Architecture, top_k: int) -> Architecture:
    """Describe the same kind of model, small enough to build anywhere, with more ids than the method looks at."""
    heads = 2 * min(2, architecture.num_heads // architecture.num_kv_heads)
    return replace(
        architecture,
        num_layers=2,
        hidden_size=64,
        ffn_size=96,
        num_heads=heads,
        num_kv_heads=2,
        head_dim=16,
        vocab_size=max(211, top_k + 1),
        max_positions=64,
        num_experts=min(architecture.num_experts, 2 * architecture.experts_per_token),
    )


def _plan_table(config: RunConfig, inputs: Inputs) -> Table:
    sequences, prompts = sequences_per_step(config, inputs.method), inputs.prompts
    expected = _expected_packs(config, prompts, sequences)
    packs = expected.packs + len(config.teachers)  # no pack mixes teachers
    named = config.named  # as their user calls the models
    table = Table(show_header=False, box=None)
    for name, value in (
        ("method", config.method.name),
        ("student", _describe(named.student.model, inputs.student, config.student.parallel)),
        *((role, _describe(path, model, cut)) for role, path, model, cut in _teachers(named, inputs)),
        *([("base model", _describe(named.base_model, inputs.base, config.base_parallel))] if inputs.base else []),
        *_adapters(config, inputs.student),
        ("ranks", _ranks(config)),
        *_sampler(inputs.student, config),
        ("prompts", f"{len(prompts):,} to train on, {_count_problems(inputs):,} to evaluate on"),
        ("responses", _responses(config, inputs)),
        (
            "step",
            f"{config.train.prompts_per_step} prompts, {sequences} sequences, {config.train.minibatches} update(s)",
        ),
        (
            "packs",
            f"at most {packs} of {config.train.pack_tokens} tokens per step, {expected.fill:.0%} full ({backend()} "
            f"packer){_sharing(config, expected)}",
        ),
        ("scores", _traffic(config, inputs, sequences)),
        ("steps", f"{config.train.steps}, {_checkpoints(config)}"),
    ):
        table.add_row(literal(name), literal(value))
    return table


def _adapters(config: RunConfig, student: Architecture) -> list[tuple[str, str]]:
    """Describe the student's adapters; nothing where it has none."""
    spec = adapter_spec(config.student, student)
    if spec is None:
        return []
    count = sum(math.prod(shape) for shape in adapter_shapes(student, spec).values())
    dropped = f", dropout {spec.dropout:g}" if spec.dropout else ""
    return [
        (
            "adapters",
            f"LoRA of rank {spec.rank}, alpha {spec.alpha:g}{dropped}, of {', '.join(spec.targets)}: "
            f"{count:,} parameters ({count / total_parameters(student):.2%} of the model) are trained",
        )
    ]


def _sampler(student: Architecture, config: RunConfig) -> list[tuple[str, str]]:
    """Say what sampling with the trainer's own model costs where there is a GPU; nothing of other samplers."""
    if not ROLLOUT_ENGINES[config.rollout.engine].is_embedded:
        return []
    cost = advice(student, total_parameters(student), new_tokens=config.rollout.max_new_tokens)
    return [("sampler", f"the trainer's own model; on a GPU {cost}")]


def _teachers(config: RunConfig, inputs: Inputs) -> list[tuple[str, Path, Architecture, Layout]]:
    """List role, directory, sizes and layout of every teacher."""
    others = [(f"teacher {t.name!r}", t.model, inputs.teachers[t.name], t.parallel) for t in config.teachers]
    layout = config.student.parallel if config.teacher.moves else config.teacher.parallel
    return [("teacher", config.teacher.model, inputs.teacher, layout), *others]


def _traffic(config: RunConfig, inputs: Inputs, sequences: int) -> str:
    """Say what the teacher reports of a response token, what is sent to it, and how much of that travels in a step."""
    spec = TeacherRequest.of(inputs.method.needs)
    reported = spec.bytes_per_row(hidden_bytes=inputs.teacher.hidden_size * DTYPES[config.dtype].itemsize)
    text = f"{reported:,} bytes per response token from the teacher"
    if spec.queries:
        text += f", {spec.query_bytes_per_row:,} to it for the student's own likeliest tokens"
    layouts = [config.student.parallel, *(parallel for *_, parallel in _teachers(config, inputs))]
    layouts += [config.base_parallel] if inputs.base else []
    if len({(p.tensor, p.pipeline, p.context) for p in layouts}) == 1 and not config.teacher.ranks:
        return f"{text}; none travels, as the layouts agree"
    most = sequences * config.rollout.max_new_tokens * (reported + spec.query_bytes_per_row)
    return f"{text}; at most {most / _MIB:,.1f} MiB per step and tensor rank"


def _responses(config: RunConfig, inputs: Inputs) -> str:
    """Say where the teacher's responses come from, of which guided sequences start with the first tokens."""
    bare = int((inputs.prompts.response_lengths() == 0).sum())
    if not guided_per_prompt(config, inputs.method):
        return "none needed: no sequence is guided"
    if not bare:
        return "in the data"
    return f"{bare:,} are missing: `tropd train` has the teacher write them first, into {config.run_dir / 'responses'}"


def _count_problems(inputs: Inputs) -> int:
    """Count the different problems: suites may share theirs."""
    return sum(len(table) for table in {id(table): table for table in inputs.problems.values()}.values())


def _ranks(config: RunConfig) -> str:
    own, others = config.teacher.ranks, [teacher.parallel for teacher in config.teachers]
    models = [config.student.parallel, *others, config.base_parallel]
    models += [] if own else [config.teacher.parallel]
    sizes = [*(parallel.smallest_world for parallel in models), config.rollout.parallel.tensor]
    size = int(np.lcm.reduce(sizes))
    multiple = "any number" if size == 1 else f"a multiple of {size}"
    return f"{multiple}, and {own} for the teacher alone" if own else multiple


def _checkpoints(config: RunConfig) -> str:
    every = config.checkpoint.every
    return f"a checkpoint every {every}" if every else "no checkpoints"


def _describe(path: Path, a: Architecture, parallel: Layout) -> str:
    count = total_parameters(a)
    cut = ("tensor", "pipeline", "virtual_pipeline", "context", "expert")
    axes = [f"{name}={getattr(parallel, name)}" for name in cut if getattr(parallel, name) > 1]
    return (
        f"{path}: {a.family}, {count / 1e6:,.1f}M parameters, {a.num_layers} layers, hidden {a.hidden_size}, "
        f"vocabulary {a.vocab_size:,}; {', '.join(axes) or 'one rank'}{', sequence parallel' * parallel.sequence}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _ExpectedPacks:
    """The packs of a step whose responses all use their whole budget, the most there can be."""

    packs: int
    tokens: int
    rows: int
    fill: float


def _sharing(config: RunConfig, expected: _ExpectedPacks) -> str:
    if config.train.share_prefixes == "off":
        return "; every sequence is computed by itself (train.share_prefixes = off)"
    return (
        f"; what sequences begin with alike is computed once: the prompts alone leave {expected.rows:,} rows of "
        f"{expected.tokens:,} tokens ({expected.rows / expected.tokens:.0%})"
    )


def _expected_packs(config: RunConfig, prompts: PromptTable, sequences: int) -> _ExpectedPacks:
    """Pack prompts of the data's lengths, each with responses that have nothing in common."""
    per_prompt = sequences // config.train.prompts_per_step
    prompt_N = prompts.prompt_lengths()
    most, share = config.rollout.max_new_tokens, config.train.share_prefixes == "auto"
    empty, rollouts = np.empty(0, np.float32), []
    for i in range(sequences):
        prompt = int(prompt_N[i // per_prompt % len(prompt_N)])
        rollouts.append(
            Rollout(
                sequence_id=i,
                prompt_index=i // per_prompt,
                token_ids=np.repeat([i // per_prompt, sequences + i], [prompt, most]),
                region_L=single_turn(prompt=prompt, continuation=most),
                sampling_logprob=empty,
                model_logprob=empty,
                finished=True,
            )
        )
    packs = pack(rollouts, max_tokens=config.train.pack_tokens, share_prefixes=share)[0]
    rows = sum(one.num_rows if one.row_T is not None else len(one.token_T) for one in packs)
    return _ExpectedPacks(
        packs=len(packs),
        tokens=sum(len(one.token_ids) for one in rollouts),
        rows=rows,
        fill=rows / (len(packs) * config.train.pack_tokens),
    )


def _memory_table(memory: Memory, config: RunConfig) -> Table:
    table = Table(box=None, show_header=False)
    leaves = leaving(rollout=config.rollout, teacher=config.teacher, optimizer=config.optimizer)
    phases = {f"in all while {phase}": size for phase, size in by_phase(memory.parts, leaves).items()}
    for name, size in (memory.parts | phases).items():
        table.add_row(name, f"{size / _MIB:,.1f}")
    return table


def _token_table(config: RunConfig, inputs: Inputs) -> Table:
    """List every tensor with a row per token: what a longer pack makes longer."""
    layout, tokens = config.student.parallel, _tokens_of_rank(config)
    rows = per_token_bytes(
        inputs.student,
        inputs.teacher,
        layout,
        TeacherRequest.of(inputs.method.needs),
        itemsize=DTYPES[config.dtype].itemsize,
        recompute=config.student.recompute,
    )
    table = Table(box=None)
    for column in ("", "bytes per token", "MiB"):
        table.add_column(column, justify="right" if column else "left")
    for name, size in rows.items():
        table.add_row(name, f"{size:,.0f}", f"{size * tokens / _MIB:,.1f}")
    return table
