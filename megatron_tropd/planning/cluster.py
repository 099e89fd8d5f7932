"""``tropd check --cluster``: what a run would take on a cluster, by arithmetic, and which layouts would take least.

Nothing is built, and of the models only ``config.json`` is read. Memory and bytes are those that the tests compare
with real runs; times are what the cluster's own figures make of them, with nothing overlapped, and good for
comparing layouts.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import yaml
from pydantic import Field, ValidationError

from megatron_tropd.config.sections import (
    DataConfig,
    Dtype,
    Layout,
    OptimizerConfig,
    Real,
    RolloutConfig,
    Section,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
    Whole,
    key,
)
from megatron_tropd.engine.model import check_divisible, check_trainable, padded_vocab_size
from megatron_tropd.errors import ConfigError
from megatron_tropd.methods import Method
from megatron_tropd.planning.activations import activation_bytes
from megatron_tropd.planning.decoding import host_seconds
from megatron_tropd.planning.parameters import States, frozen_states, layers_of_stages, total_parameters, trained_states
from megatron_tropd.planning.phases import by_phase, leaving, moved_bytes
from megatron_tropd.planning.traffic import (
    Load,
    RankTransfer,
    backward_transfers,
    forward_transfers,
    gradient_transfers,
    loss_transfers,
    scoring_transfers,
)
from megatron_tropd.rollout.engines.registry import ROLLOUT_ENGINES
from megatron_tropd.teacher.protocol import TeacherRequest
from megatron_tropd.types import AdapterSpec, Architecture

_GIB = 2**30
# of one group's channels, in both directions; of Hopper within and between nodes, and not measured here
_COMMUNICATOR_BYTES = 64 * 2**20
_TILE_BYTES = 2 * 4 * 2**26  # of logits, in fp32, that the loss holds on a GPU whatever the number of tokens


class Cluster(Section):
    """The hardware of a rank, and of the links between ranks. Rates are those of one GPU, in one direction."""

    gpus: Whole = Field(ge=1, description="Ranks of the job.")
    gpus_per_node: Whole = key(8, "Ranks that the fast link joins.", ge=1)
    memory_gib: Real = Field(gt=0, description="Memory of a GPU.")
    peak_tflops: Real = Field(gt=0, description="Dense matrix products per second in the run's dtype.")
    memory_gb_s: Real = Field(gt=0, description="Rate of the GPU's own memory.")
    node_gb_s: Real = Field(gt=0, description="Rate of the link within a node.")
    network_gb_s: Real = Field(gt=0, description="Rate of the network between nodes.")
    host_gb_s: Real = key(64, "Rate of the link to the host's memory.", gt=0)
    efficiency: Real = key(0.45, "Share of these rates that is reached.", gt=0, le=1)
    reserve: Real = key(0.1, "Share of the memory that is left for what is not counted.", ge=0, lt=1)


def read_cluster(path: Path) -> Cluster:
    """Raise ConfigError when it is not the YAML of a cluster."""
    try:
        return Cluster.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read as the YAML of a cluster: {error}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the file"
        raise ConfigError(
            f"{path}: {where}: {first['msg']}. Keys: {', '.join(Cluster.model_fields)}; see docs/scaling.md."
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterJob:
    """Everything about a run on a cluster that does not depend on the layouts."""

    dtype: Dtype
    student_section: StudentConfig
    teacher_section: TeacherConfig
    data: DataConfig
    rollout: RolloutConfig
    train: TrainConfig
    optimizer: OptimizerConfig
    cluster: Cluster
    method: Method
    student: Architecture
    teacher: Architecture
    sequences: int  # of a step
    adapters: AdapterSpec | None = None  # what alone is trained of the student

    def part(self, role: str) -> Cluster:
        """Return the GPUs of student or teacher: all of them, unless the teacher has ranks of its own."""
        own = self.teacher_section.ranks
        gpus = {"student": self.cluster.gpus - own, "teacher": own or self.cluster.gpus}[role]
        return self.cluster.model_copy(update={"gpus": gpus})

    @property
    def itemsize(self) -> int:
        return 2 if self.dtype == "bf16" else 4

    @property
    def response(self) -> int:
        return self.rollout.max_new_tokens

    @property
    def length(self) -> int:
        """Return the most tokens of a sequence."""
        return self.data.max_prompt_tokens + self.response

    @property
    def rows(self) -> int:
        """Return the most rows of a step: its sequences' tokens, but each prompt once where they share it."""
        return self.sequences * self.length - self.copies * self.data.max_prompt_tokens

    @property
    def copies(self) -> int:
        """Return the sequences of a step that find their prompt computed."""
        return self.sequences - self.train.prompts_per_step if self.train.share_prefixes == "auto" else 0

    @property
    def keys_per_row(self) -> float:
        """Return the keys that attention gathers along paths, per row."""
        return self.sequences * self.length / self.rows

    @property
    def valid_share(self) -> float:
        """Return the predictions that carry loss, per row; of a pack at most one."""
        return min(1.0, self.sequences * self.response / self.rows)

    @property
    def spec(self) -> TeacherRequest:
        return TeacherRequest.of(self.method.needs)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """One pair of layouts on the cluster."""

    student: Layout
    teacher: Layout
    recompute: str
    memory: dict[str, float]  # bytes on the fullest rank of the student's
    sent: dict[str, float]  # bytes that leave a rank in a step, by link
    seconds: dict[str, float]  # of a step
    phases: dict[str, float]  # bytes of ``memory`` that are in use at the same time
    teacher_memory: dict[str, float]  # bytes on the fullest rank of the teacher's own; empty where it has none
    hidden: float  # seconds of the teacher's that pass while the student does something else

    @property
    def total_memory(self) -> float:
        """Return the most that is in use at the same time."""
        return max(*self.phases.values(), sum(self.teacher_memory.values()))

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values()) - self.hidden


def estimate(
    job: ClusterJob, student: Layout, teacher: Layout, recompute: str, *, states: States | None = None
) -> Estimate:
    """Estimate memory, bytes and times of a step under these layouts. ``states``: the student's, where they are known.

    Raises:
        ConfigError: the cluster's GPUs are not a whole number of replicas.
    """
    packs = -(-job.rows // job.train.pack_tokens)
    layouts = {"teacher": teacher, "student": student}
    shares = {role: -(-packs // layout.data_size(job.part(role).gpus)) for role, layout in layouts.items()}
    transfers = {
        "student": _student_transfers(job, student, shares["student"], recompute),
        "teacher": _teacher_transfers(job, teacher, shares["teacher"]),
    }
    sent: dict[str, float] = {}
    seconds: dict[str, float] = {"rollout": _rollout_seconds(job)}
    for role, layout in layouts.items():
        part = job.part(role)
        links: defaultdict[str, float] = defaultdict(float)
        for transfer in transfers[role]:
            axis = transfer.axis
            links[f"{axis}, {_link(part, layout, axis)}"] += transfer.sent(_ranks(part, layout, axis))
        sent.update({f"{role}: {name}": size for name, size in links.items()})
        seconds[f"{role}: computing"] = _compute_seconds(job, role, layout, shares[role], recompute)
        seconds[f"{role}: sending"] = sum(size / _rate(job.cluster, name) for name, size in links.items())
    row = job.spec.bytes_per_row(hidden_bytes=job.teacher.hidden_size * job.itemsize) + job.spec.query_bytes_per_row
    signals = shares["student"] * job.train.pack_tokens * job.valid_share * row
    sent[f"signals, {_farthest(job.cluster)}"] = signals
    seconds["signals"] = signals / _rate(job.cluster, _farthest(job.cluster))
    states = states or states_of(job, student)
    seconds["optimizer"] = 2 * states.total / (job.cluster.memory_gb_s * 1e9 * job.cluster.efficiency)
    memory = _memory(job, student, teacher, recompute, states)
    leaves = leaving(rollout=job.rollout, teacher=job.teacher_section, optimizer=job.optimizer)
    moved = moved_bytes(leaves, frozen=memory["teacher"], states=memory["optimizer"]) * job.train.minibatches
    sent["to and from host memory"] = moved
    seconds["host memory"] = moved / (job.cluster.host_gb_s * 1e9 * job.cluster.efficiency)
    return Estimate(
        student=student,
        teacher=teacher,
        recompute=recompute,
        memory=memory,
        phases=by_phase(memory, leaves),
        sent=dict(sent),
        seconds=seconds,
        teacher_memory={"weights": _teacher_weights(job, teacher)} if job.teacher_section.ranks else {},
        hidden=_hidden_seconds(job, seconds),
    )


def _hidden_seconds(job: ClusterJob, seconds: Mapping[str, float]) -> float:
    """Return the time that overlaps: with ranks of its own and a batch ahead the teacher works while all else
    runs.
    """
    if not (job.teacher_section.ranks and job.rollout.ahead):
        return 0.0
    own = sum(value for name, value in seconds.items() if name.startswith("teacher: "))
    return min(own, sum(seconds.values()) - own)


# --------------------------------------------------------------------------- memory


def states_of(job: ClusterJob, layout: Layout) -> States:
    """Return the states of the student on the stage that holds most."""
    data_ranks = job.part("student").gpus // (layout.tensor * layout.pipeline)
    optimizer = job.optimizer
    return trained_states(
        job.student,
        layout,
        data_ranks=data_ranks,
        itemsize=job.itemsize,
        moments={"adam": 2, "sgd": int(optimizer.momentum > 0)}[optimizer.name],
        distributed=optimizer.distributed,
        adapters=job.adapters,
    )


def _memory(job: ClusterJob, student: Layout, teacher: Layout, recompute: str, states: States) -> dict[str, float]:
    rollout, tokens = job.rollout, job.train.pack_tokens
    a, itemsize = job.student, job.itemsize
    held = tokens / student.context
    hidden = held * a.hidden_size
    sampler = Layout(tensor=rollout.parallel.tensor)
    embedded = ROLLOUT_ENGINES[rollout.engine].colocated
    batch = min(rollout.batch_size, -(-job.sequences * sampler.tensor // job.part("student").gpus))
    shard = padded_vocab_size(a.vocab_size, student.tensor) // student.tensor
    cache = batch * job.length * 2 * a.num_kv_heads // sampler.tensor * a.head_dim * a.num_layers * itemsize
    return {
        "weights": states.weights,
        "gradients": states.gradients,
        "optimizer": states.optimizer,
        "activations": activation_bytes(
            a, student, tokens, itemsize=itemsize, recompute=recompute, keys_per_row=job.keys_per_row
        ),
        "loss": min(_TILE_BYTES, 2 * 4 * held * shard) + hidden * (4 + 2 * itemsize),
        "teacher": 0 if job.teacher_section.ranks or _shared(job, student, teacher) else _teacher_weights(job, teacher),
        "sampler": frozen_states(a, sampler, itemsize=itemsize).weights * embedded,
        "key-value cache": cache * embedded,
        "communicators": _COMMUNICATOR_BYTES * _communicators(job, student, teacher),
    }


def _shared(job: ClusterJob, student: Layout, teacher: Layout) -> bool:
    """Say whether the student's frozen base is the teacher."""
    return job.adapters is not None and student == teacher and job.student_section.source == job.teacher_section.source


def _communicators(job: ClusterJob, student: Layout, teacher: Layout) -> int:
    """Count the groups of a rank that NCCL holds buffers for: each that communicates, of as many ranks as it may.

    Groups of the same ranks are one, whichever model's they are.
    """
    layouts = [(student, "student")] + ([] if job.teacher_section.ranks else [(teacher, "teacher")])
    gpus = job.part("student").gpus
    found = {(1, gpus)} if gpus > 1 else set()  # all ranks
    for layout, _ in layouts:
        model = layout.tensor * layout.context
        data = gpus // (layout.tensor * layout.pipeline)
        # (ranks apart, number of ranks) tells a regular group from others
        groups = [(1, layout.tensor), (layout.tensor, layout.context), (gpus // layout.pipeline, layout.pipeline)]
        groups += [(layout.tensor, data), (layout.tensor, layout.expert), (1, model)]
        found.update((apart, size) for apart, size in groups if size > 1)
    return len(found)


def checkpoint_bytes(job: ClusterJob, student: Layout) -> int:
    """Return the bytes of host memory that the first of a model's data ranks fills while a checkpoint is written: all
    ranks' shares of weights and moments, in fp32.
    """
    if not job.optimizer.distributed:
        return 0
    moments = 2 if job.optimizer.name == "adam" else int(job.optimizer.momentum > 0)
    return states_of(job, student).gradients * (1 + moments)  # gradients are fp32, and as many as weights


def _teacher_weights(job: ClusterJob, layout: Layout) -> int:
    return frozen_states(job.teacher, layout, itemsize=job.itemsize).weights


# --------------------------------------------------------------------------- bytes


def _ranks(cluster: Cluster, layout: Layout, axis: str) -> int:
    data = cluster.gpus // (layout.tensor * layout.pipeline)
    return {
        "tensor": layout.tensor,
        "context": layout.context,
        "pipeline": layout.pipeline,
        "expert": layout.expert,
        "data": data,
        "expert_data": data // layout.expert,
        "ends": 2,
    }[axis]


def _link(cluster: Cluster, layout: Layout, axis: str) -> str:
    """Return the link of an axis: ranks are neighbors along tensor first, then context, data (experts too),
    pipeline.
    """
    span = {
        "tensor": layout.tensor,
        "context": layout.tensor * layout.context,
        "expert": layout.tensor * layout.expert,
    }.get(axis, cluster.gpus if axis in ("pipeline", "ends") else cluster.gpus // layout.pipeline)
    return "node" if span <= cluster.gpus_per_node else "network"


def _farthest(cluster: Cluster) -> str:
    return "node" if cluster.gpus <= cluster.gpus_per_node else "network"


def _rate(cluster: Cluster, link: str) -> float:
    return (cluster.network_gb_s if link.endswith("network") else cluster.node_gb_s) * 1e9 * cluster.efficiency


def _loads(job: ClusterJob, layout: Layout, packs: int) -> list[Load]:
    tokens = job.train.pack_tokens // layout.context
    return [Load(tokens=tokens, valid=int(tokens * job.valid_share))] * packs


def _student_transfers(job: ClusterJob, layout: Layout, packs: int, recompute: str) -> list[RankTransfer]:
    """List the student's transfers of a rank of the last stage, which also has the loss."""
    loads, stage = _loads(job, layout, 1), layout.pipeline - 1
    found = forward_transfers(job.student, layout, loads, stage=stage, itemsize=job.itemsize)
    found += backward_transfers(job.student, layout, loads, stage=stage, itemsize=job.itemsize, recompute=recompute)
    needs = job.method.needs
    candidates, divergence = 1 + needs.top_k * (1 + (needs.support == "union")), "jsd" if needs.hidden_states else ""
    found += loss_transfers(layout, valid=loads[0].valid, candidates=candidates, divergence=divergence)
    every = [replace(transfer, size=transfer.size * packs) for transfer in found]
    data_ranks = job.part("student").gpus // (layout.tensor * layout.pipeline)
    update = gradient_transfers(
        job.student,
        layout,
        stage=stage,
        data_ranks=data_ranks,
        itemsize=job.itemsize,
        distributed=job.optimizer.distributed,
        adapters=job.adapters,
    )
    return every + update * job.train.minibatches


def _teacher_transfers(job: ClusterJob, layout: Layout, packs: int) -> list[RankTransfer]:
    loads, stage, spec = _loads(job, layout, 1), layout.pipeline - 1, job.spec
    found = forward_transfers(job.teacher, layout, loads, stage=stage, itemsize=job.itemsize)
    found += scoring_transfers(layout, valid=loads[0].valid, top_k=spec.top_k, queries=spec.queries)
    return [replace(transfer, size=transfer.size * packs) for transfer in found]


# --------------------------------------------------------------------------- time


def active_parameters(a: Architecture) -> int:
    """Return the parameters that a token meets: its own experts, and one vocabulary matrix."""
    active = replace(a, num_experts=a.experts_per_token, experts_per_token=min(a.experts_per_token, a.num_experts))
    embedding = 0 if a.tied_embeddings else a.vocab_size * a.hidden_size
    return total_parameters(active if a.num_experts else a) - embedding


def _forward_flops(a: Architecture, job: ClusterJob) -> float:
    """Return the FLOPs of a step's rows: two per parameter, and two products with each key along its path."""
    squares = job.sequences * job.length**2 - job.copies * job.data.max_prompt_tokens**2
    return 2.0 * active_parameters(a) * job.rows + 2.0 * squares * a.num_heads * a.head_dim * a.num_layers


def _compute_seconds(job: ClusterJob, role: str, layout: Layout, packs: int, recompute: str) -> float:
    cluster, a = job.part(role), job.student if role == "student" else job.teacher
    passes = 1 if role == "teacher" else 4 if recompute == "full" else 3
    passes -= role == "student" and job.adapters is not None  # frozen weights take no gradient
    flops = passes * _forward_flops(a, job) / cluster.gpus
    # while a pipeline fills and drains, stages wait
    idle = (layout.pipeline - 1) / (layout.virtual_pipeline * max(packs // max(job.train.minibatches, 1), 1))
    return flops / (cluster.peak_tflops * 1e12 * cluster.efficiency) * (1 + idle)


def _rollout_seconds(job: ClusterJob) -> float:
    """Return the seconds of generation token by token: each reads all weights, and every sequence's own past. The
    embedded sampler takes Python's time where that is longer.
    """
    a, cluster, rollout = job.student, job.part("student"), job.rollout
    engine = ROLLOUT_ENGINES[rollout.engine]
    if not engine.generates:
        return 0.0
    tensor = rollout.parallel.tensor
    at_once = max(1, min(rollout.batch_size, -(-job.sequences * tensor // cluster.gpus)))
    rounds = -(-job.sequences * tensor // (cluster.gpus * at_once))
    past = at_once * job.length / 2 * 2 * a.num_kv_heads * a.head_dim * a.num_layers * job.itemsize
    read = (total_parameters(a) * job.itemsize + past) / tensor
    reading = read / (cluster.memory_gb_s * 1e9 * cluster.efficiency)
    return rounds * job.response * max(reading, host_seconds(a) if engine.is_embedded else 0.0)


# --------------------------------------------------------------------------- ranking


def chosen(job: ClusterJob) -> Estimate:
    """Return the layouts that the configuration requests."""
    student, teacher = (section.parallel for section in (job.student_section, job.teacher_section))
    return estimate(job, student, teacher, job.student_section.recompute)


def candidates(job: ClusterJob) -> Iterator[Layout]:
    """List the layouts of the student that its sizes and the cluster allow."""
    powers = [2**i for i in range(12)]
    for tensor, pipeline, context, expert in product(powers[:4], powers[:6], powers[:5], powers[:8]):
        layout = Layout(tensor=tensor, pipeline=pipeline, context=context, expert=expert, sequence=tensor > 1)
        if _fits(job, layout, "student") and job.train.pack_tokens % (2 * context * tensor) == 0:
            yield layout


def _fits(job: ClusterJob, layout: Layout, role: str) -> bool:
    a = job.student if role == "student" else job.teacher
    gpus, model = job.part(role).gpus, layout.tensor * layout.pipeline * layout.context
    if gpus % model or (gpus // (layout.tensor * layout.pipeline)) % layout.expert:
        return False
    try:
        check_divisible(a, layout)
        if role == "student":
            check_trainable(a, layout)
        layers_of_stages(a.num_layers, layout)
    except ConfigError:
        return False
    return True


def smallest_teacher(job: ClusterJob, share: float) -> Layout:
    """Return the teacher's layout of fewest ranks whose weights take no more than ``share`` of a GPU."""
    limit = share * job.cluster.memory_gib * _GIB
    layouts = [
        Layout(tensor=tensor, pipeline=pipeline, expert=expert, sequence=tensor > 1)
        for tensor, pipeline, expert in product((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8, 16, 32))
    ]
    fitting = [layout for layout in layouts if _fits(job, layout, "teacher") and _teacher_weights(job, layout) <= limit]
    if not fitting:
        raise ConfigError(
            f"no layout of the teacher leaves {1 - share:.0%} of a GPU of {job.cluster.memory_gib:g} GiB: its weights "
            "are too many for the cluster. Use more GPUs, ranks of its own (teacher.ranks), or teacher.recorded_from."
        )
    return min(fitting, key=lambda x: (x.tensor * x.pipeline * x.expert, x.pipeline, x.tensor))


def best(job: ClusterJob, count: int = 5) -> list[Estimate]:
    """Return the layouts that fit the memory and take least time, each with a teacher as small as a quarter of it
    allows, or three quarters of it where that is the teacher's alone.

    Raises:
        ConfigError: none fits.
    """
    teacher = smallest_teacher(job, 0.75 if job.teacher_section.ranks else 0.25)
    found, limit = [], room(job.cluster)
    for layout in candidates(job):
        states = states_of(job, layout)
        if states.total <= limit:
            ways = ("none", "selective", "full")
            found += [estimate(job, layout, teacher, recompute, states=states) for recompute in ways]
    fitting = sorted((x for x in found if x.total_memory <= limit), key=lambda x: x.step_seconds)
    if not fitting:
        least = min(found, key=lambda x: x.total_memory, default=None)
        if least is None:
            raise ConfigError(
                f"no layout that divides {job.part('student').gpus} GPUs leaves room besides the student's weights, "
                "gradients and optimizer. Use more GPUs, a power of two, and optimizer.distributed=true."
            )
        raise ConfigError(
            f"no layout of the student fits {limit / _GIB:.0f} GiB: the smallest takes "
            f"{least.total_memory / _GIB:.0f}. Use more GPUs, set optimizer.distributed=true, or lower "
            "train.pack_tokens or rollout.batch_size."
        )
    return fitting[:count]


def room(cluster: Cluster) -> float:
    """Return the bytes of a GPU that a plan may use."""
    return cluster.memory_gib * _GIB * (1 - cluster.reserve)
