"""Choose layouts, and the token budget of packs, for the ranks and the memory at hand: what is ``auto``.

The arithmetic is that of ``planning.cluster``. Of the layouts that the memory is estimated to hold, the one is taken
whose step is estimated fastest; the machine's rates are rough, and only decide between layouts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product

from megatron_tropd.config.sections import Layout
from megatron_tropd.engine.model import check_divisible, check_trainable
from megatron_tropd.errors import ConfigError
from megatron_tropd.planning.cluster import Cluster, ClusterJob, Estimate, estimate, room
from megatron_tropd.planning.parameters import frozen_states, layers_of_stages
from megatron_tropd.types import Architecture

_SAMPLER_SHARE = 0.25  # of a rank's memory
_ROUND = 128  # a budget that no power of two gives is a multiple of it, so that packs of any layout hold it
_MOST_TENSOR = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Layouts and a budget, and what they are estimated to take."""

    student: Layout
    teacher: Layout
    pack_tokens: int
    memory: float  # bytes of the fullest rank
    room: float  # bytes that it has

    @property
    def fits(self) -> bool:
        return self.memory <= self.room


def machine(*, ranks: int, ranks_per_node: int, memory_bytes: float, gpu: bool) -> Cluster:
    """Describe the machines of this launch; rates are those of a data center's GPUs, or of a few CPU cores."""
    rates = (500.0, 3000.0, 300.0, 40.0) if gpu else (0.1, 20.0, 5.0, 1.0)
    names = ("peak_tflops", "memory_gb_s", "node_gb_s", "network_gb_s")
    return Cluster(
        gpus=ranks,
        gpus_per_node=ranks_per_node,
        memory_gib=memory_bytes / 2**30,
        reserve=0.1 if gpu else 0.25,  # beside Python and its libraries
        **dict(zip(names, rates, strict=True)),
    )


def budgets(longest: int, most: int) -> list[int]:
    """List budgets of a pack to try, the largest first: ``most``, halved as long as it holds the longest sequence."""
    halved = [most >> i for i in range(most.bit_length()) if most >> i >= longest]
    last = -(-longest // _ROUND) * _ROUND
    return halved + [last] * (not halved or last < halved[-1])


def choose(
    job: ClusterJob,
    *,
    student: Layout | None,
    teacher: Layout | None,
    pack_tokens: Sequence[int],
    teacher_weighs: bool = True,
) -> Choice:
    """Choose what is None, and the largest of ``pack_tokens`` with which a layout fits the memory.

    Where none does, the choice is what takes least, and does not say that it ``fits``.

    Args:
        teacher_weighs: whether the teacher's weights lie on the student's ranks.

    Raises:
        ConfigError: no layout divides the ranks, heads and layers, or the given ones do not divide the ranks.
    """
    students = [student] if student else list(_layouts(job.student, job.part("student"), trained=True))
    teachers = [teacher] if teacher else list(_layouts(job.teacher, job.part("teacher"), trained=False))
    limit, least = room(job.cluster), None
    for tokens in pack_tokens:
        this = replace(job, train=job.train.model_copy(update={"pack_tokens": tokens}))
        found = [
            (estimate(this, one, other, job.student_section.recompute), tokens)
            for one, other in product(students, teachers)
        ]
        fitting = [one for one in found if _memory(one[0], teacher_weighs) <= limit]
        if fitting:
            return _choice(*min(fitting, key=lambda one: _rank(one[0])), limit, teacher_weighs)
        smallest = min(found, key=lambda one: (_memory(one[0], teacher_weighs), _rank(one[0])))
        if least is None or _memory(smallest[0], teacher_weighs) < _memory(least[0], teacher_weighs):
            least = smallest
    assert least is not None  # a model on one rank is always a layout
    return _choice(*least, limit, teacher_weighs)


def smallest_layout(architecture: Architecture, cluster: Cluster) -> Layout:
    """Return the layout of fewest ranks that leaves three quarters of a rank's memory; the largest, where none does."""
    found = _layouts(architecture, cluster, trained=False)
    layouts = sorted(found, key=lambda x: (x.model_ranks * x.expert, x.pipeline))
    limit = _SAMPLER_SHARE * room(cluster)
    return next((x for x in layouts if frozen_states(architecture, x, itemsize=2).weights <= limit), layouts[-1])


def sampler_ranks(models: Sequence[Architecture], cluster: Cluster, *, itemsize: int) -> int:
    """Return the fewest tensor-parallel ranks with which each of the models leaves three quarters of the memory.

    It divides the ranks and the heads of all; where none is enough, the largest that does.
    """
    sizes = [size for size in _divisors(cluster.gpus) if all(divides(one, Layout(tensor=size)) for one in models)]
    limit = _SAMPLER_SHARE * room(cluster)

    def weights(size: int) -> int:
        return max(frozen_states(one, Layout(tensor=size), itemsize=itemsize).weights for one in models)

    small = [size for size in sizes if size <= cluster.gpus_per_node]
    return next((size for size in small if weights(size) <= limit), small[-1])


def _layouts(architecture: Architecture, cluster: Cluster, *, trained: bool) -> Iterator[Layout]:
    """List tensor, pipeline and, of a mixture, expert parallelism over a cluster's ranks; the rest is data parallel."""
    for tensor, pipeline in product(_divisors(cluster.gpus), _divisors(cluster.gpus)):
        if cluster.gpus % (tensor * pipeline) or tensor > min(_MOST_TENSOR, cluster.gpus_per_node):
            continue
        data = cluster.gpus // (tensor * pipeline)
        for expert in _divisors(data) if architecture.num_experts else [1]:
            layout = Layout(tensor=tensor, pipeline=pipeline, expert=expert, sequence=tensor > 1)
            if divides(architecture, layout, trained=trained):
                yield layout


def divides(architecture: Architecture, layout: Layout, *, trained: bool = False) -> bool:
    """Say whether a model can be cut that way; ``trained``: and learn so."""
    try:
        check_divisible(architecture, layout)
        if trained:
            check_trainable(architecture, layout)
        layers_of_stages(architecture.num_layers, layout)
    except ConfigError:
        return False
    return True


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _memory(one: Estimate, teacher_weighs: bool) -> float:
    return one.total_memory - (0.0 if teacher_weighs else one.memory["teacher"])


def _rank(one: Estimate) -> tuple[float, int, int]:
    """Order estimates by their time; of equals, the one of fewer ranks to a model."""
    return one.step_seconds, one.student.model_ranks, one.teacher.model_ranks


def _choice(one: Estimate, tokens: int, limit: float, teacher_weighs: bool) -> Choice:
    memory = _memory(one, teacher_weighs)
    return Choice(student=one.student, teacher=one.teacher, pack_tokens=tokens, memory=memory, room=limit)
