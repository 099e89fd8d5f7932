"""Turn what is ``auto`` in a configuration into numbers, for the models, the ranks and the memory at hand.

Explicit values are never touched. A run that resumes takes what was chosen for it from RUN/config.yaml.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from pydantic import BaseModel

from megatron_tropd.config.loading import load_config, parse_config
from megatron_tropd.config.run import RunConfig
from megatron_tropd.config.sections import Layout, is_chosen
from megatron_tropd.convert.source import source_architecture
from megatron_tropd.errors import ConfigError
from megatron_tropd.parallel.device import local_device, memory_bytes
from megatron_tropd.planning.choice import budgets, choose, divides, machine, sampler_ranks, smallest_layout
from megatron_tropd.planning.cluster import Cluster, ClusterJob
from megatron_tropd.planning.cluster_report import describe
from megatron_tropd.planning.parameters import frozen_states
from megatron_tropd.rollout.engines.registry import ROLLOUT_ENGINES
from megatron_tropd.setup.adapters import adapter_spec
from megatron_tropd.setup.datasets import suites_of
from megatron_tropd.setup.validate import (
    DTYPES,
    check_method,
    read_architecture,
    read_architectures,
    sequences_per_step,
)
from megatron_tropd.teacher.engines.registry import scoring_engine
from megatron_tropd.train.earlier_run import CHECKPOINTS
from megatron_tropd.types import Architecture

EXPORT = "student"  # in the directory of the run


@dataclass(frozen=True, slots=True)
class Fitted:
    """A configuration in which nothing is open any more, and what was chosen, for whoever started the command."""

    config: RunConfig
    chosen: Mapping[str, Any]  # by key
    warning: str | None = None

    def lines(self) -> Iterator[str]:
        """Yield what was chosen, as it is written in a configuration."""
        if self.chosen:
            text = ", ".join(f"{key}={_shown(value)}" for key, value in self.chosen.items())
            yield f"chosen, as nothing is set: {text}"


def fit(config: RunConfig, machines: Cluster | None = None) -> Fitted:
    """Choose lengths, packs, layouts and directories that the configuration leaves open (``auto``).

    Args:
        machines: that the run is planned for; None: those of this launch.

    Raises:
        TropdError: models that cannot be read, or explicit values that leave nothing to choose.
    """
    left = _open_keys(config)
    if not left:
        return Fitted(config, {})
    machines = _suited(config, machines or this_machine())
    chosen: dict[str, Any] = _earlier(config, left, machines)
    warning = None
    if left - chosen.keys():
        method = check_method(config)
        student, teacher = read_architectures(config)
        others = {i: read_architecture(f"teachers[{i}].model", one.source) for i, one in enumerate(config.teachers)}
        models = [student, teacher, *others.values()]
        if method.needs.base_model:
            models.append(read_architecture("base.model", config.base_source))
        chosen |= _lengths(_with(config, chosen), left - chosen.keys(), models)
        chosen |= {
            f"teachers[{i}].parallel": smallest_layout(architecture, machines)
            for i, architecture in others.items()
            if f"teachers[{i}].parallel" in left
        }
        chosen |= _sampler(config, left - chosen.keys(), student, teacher, machines)
        if left & _PLANNED - chosen.keys():
            now = _with(config, chosen)
            job = describe_job(now, student, teacher, _without_other_teachers(now, machines))
            found, warning = _plan(now, left - chosen.keys(), job)
            chosen |= found
    if "export.hf" in left:
        chosen["export.hf"] = config.run_dir / EXPORT
    fitted = config.changed(lambda one: _with(one, chosen))
    parse_config(fitted.model_dump(), source=config.method.written.source or "configuration")  # rules between keys
    return Fitted(fitted, {key: chosen[key] for key in sorted(chosen, key=_order)}, warning)


def check_agreed(config: RunConfig) -> None:
    """Raise ConfigError when ranks have chosen otherwise than the first one, whose machine has other memory.

    Collective.
    """
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, {key: str(_at(config, key)) for key in _KEYS})
    for rank, other in enumerate(found):
        for key, value in found[0].items():
            if other[key] != value:
                raise ConfigError(
                    f"{key} = auto came to {value} on rank 0 and to {other[key]} on rank {rank}: their machines have "
                    f"different memory. Set {key}."
                )


def this_machine() -> Cluster:
    """Describe the machines of this launch by what this rank sees."""
    device, world = local_device(os.environ), int(os.environ.get("WORLD_SIZE", "1"))
    gpus = torch.cuda.device_count() if device.type == "cuda" else world
    return machine(
        ranks=world,
        ranks_per_node=min(world, int(os.environ.get("LOCAL_WORLD_SIZE", gpus))),
        memory_bytes=memory_bytes(device, os.environ),
        gpu=device.type == "cuda",
    )


# --------------------------------------------------------------------------- which keys

_KEYS = (
    *("data.max_prompt_tokens", "rollout.max_new_tokens"),
    *("student.parallel", "teacher.parallel", "rollout.parallel.tensor", "train.pack_tokens", "export.hf"),
)


def _suited(config: RunConfig, machines: Cluster) -> Cluster:
    """Return machines of as many ranks as the explicit layouts take, where these do not divide those that there are.

    A check may run on fewer ranks than the training will; a training on other ranks is refused before.
    """
    layouts = [config.student.parallel, *(one.parallel for one in config.teachers)]
    layouts += [] if config.teacher.ranks else [config.teacher.parallel]
    sizes = [layout.smallest_world for layout in layouts]
    least, own = math.lcm(config.rollout.parallel.tensor, *sizes), config.teacher.ranks
    students = machines.gpus - own
    if students > 0 and students % least == 0:
        return machines
    return machines.model_copy(update={"gpus": own + least})


_PLANNED = {"student.parallel", "teacher.parallel", "train.pack_tokens"}


def _order(key: str) -> int:
    return _KEYS.index(key) if key in _KEYS else len(_KEYS)


def _open_keys(config: RunConfig) -> set[str]:
    left = {key for key in _KEYS if _is_open(config, key)}
    return left | {
        f"teachers[{i}].parallel" for i, one in enumerate(config.teachers) if "parallel" not in one.model_fields_set
    }


def _is_open(config: RunConfig, key: str) -> bool:
    *path, name = key.split(".")
    section: BaseModel = config
    for part in path:
        section = getattr(section, part)
    assert is_chosen(type(section).model_fields[name])
    return name not in section.model_fields_set


def _at(config: RunConfig, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def _with(config: RunConfig, chosen: Mapping[str, Any]) -> RunConfig:
    for key, value in chosen.items():
        config = _put(config, key.replace("]", "").replace("[", ".").split("."), value)
    return config


def _put(section: Any, path: Sequence[str], value: Any) -> Any:
    name, *rest = path
    if isinstance(section, tuple):
        at = int(name)
        return (*section[:at], _put(section[at], rest, value), *section[at + 1 :])
    return section.model_copy(update={name: _put(getattr(section, name), rest, value) if rest else value})


def _earlier(config: RunConfig, left: Iterable[str], machines: Cluster) -> dict[str, Any]:
    """Return what was chosen when this run was started, where it resumes; a layout only if it suits the ranks."""
    if not resumes(config):
        return {}
    file = config.run_dir / "config.yaml"
    try:
        before = load_config(file, check_paths=False)
    except ConfigError as error:
        warnings.warn(f"what was chosen for this run is unknown, and chosen anew: {error}", stacklevel=2)
        return {}
    found = {key: _at(before, key) for key in left if key in _KEYS}
    ranks = {"student.parallel": machines.gpus - config.teacher.ranks}
    ranks["teacher.parallel"] = config.teacher.ranks or machines.gpus
    for key, size in ranks.items():
        if key in found and (size % found[key].model_ranks or size % found[key].smallest_world):
            del found[key]
    if ranks["student.parallel"] % found.get("rollout.parallel.tensor", 1):
        del found["rollout.parallel.tensor"]
    now = _with(config, found)
    if now.train.pack_tokens < now.data.max_prompt_tokens + now.rollout.max_new_tokens:
        found.pop("train.pack_tokens", None)  # another length is explicit now
    return found


def resumes(config: RunConfig) -> bool:
    """Say whether the directory of the run holds a run that this one resumes."""
    if config.checkpoint.resume != "auto" or not (config.run_dir / "config.yaml").is_file():
        return False
    return any((config.run_dir / CHECKPOINTS).glob("step-*"))


# --------------------------------------------------------------------------- lengths


def _lengths(config: RunConfig, left: Collection[str], models: Sequence[Architecture]) -> dict[str, int]:
    """Choose how long prompts and responses may be, so that both fit the positions of all models, and a pack."""
    prompt, response = "data.max_prompt_tokens", "rollout.max_new_tokens"
    if not {prompt, response} & set(left):
        return {}
    positions = min(model.max_positions for model in models)
    limit, whose = positions, f"the models have {positions} positions"
    if "pack_tokens" in config.train.model_fields_set and config.train.pack_tokens < limit:
        limit, whose = config.train.pack_tokens, f"train.pack_tokens is {config.train.pack_tokens}"
    longest, most = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    if prompt in left:
        longest = min(longest, limit // 2 if response in left else limit - most)
    if response in left:
        most = min(most, limit - longest)
    if min(longest, most) < 1:
        given, other = (response, prompt) if prompt in left else (prompt, response)
        value = config.rollout.max_new_tokens if prompt in left else config.data.max_prompt_tokens
        raise ConfigError(
            f"{given} = {value} leaves no token for {other}: {whose}. Lower {given} to {limit - 1} or less."
        )
    found = {prompt: longest, response: most}
    return {key: value for key, value in found.items() if key in left}


# --------------------------------------------------------------------------- layouts and packs


def describe_job(config: RunConfig, student: Architecture, teacher: Architecture, machines: Cluster) -> ClusterJob:
    """Describe a run to the planner."""
    return ClusterJob(
        dtype=config.dtype,
        student_section=config.student,
        teacher_section=config.teacher,
        data=config.data,
        rollout=config.rollout,
        train=config.train,
        optimizer=config.optimizer,
        cluster=machines,
        method=(method := check_method(config)),
        student=student,
        teacher=teacher,
        sequences=sequences_per_step(config, method),
        adapters=adapter_spec(config.student, student),
    )


def _without_other_teachers(config: RunConfig, machines: Cluster) -> Cluster:
    """Return the machines with what teachers beside the first one leave of the memory."""
    itemsize = DTYPES[config.dtype].itemsize
    beside = sum(
        frozen_states(source_architecture(one.source), one.parallel, itemsize=itemsize).weights
        for one in config.teachers
    )
    least = machines.memory_gib / 100
    return machines.model_copy(update={"memory_gib": max(machines.memory_gib - beside / 2**30, least)})


def _plan(config: RunConfig, left: Collection[str], job: ClusterJob) -> tuple[dict[str, Any], str | None]:
    """Choose layouts of student and teacher and the budget of packs, with a warning where nothing fits the memory."""
    engine = scoring_engine(config.teacher)
    for key, model, layout in (
        ("student.parallel", job.student, config.student.parallel),
        ("teacher.parallel", job.teacher, config.teacher.parallel),
    ):
        if key not in left and not divides(model, layout):
            return {}, None  # an explicit layout that the checks refuse, with all that is wrong about it
    longest, most = config.data.max_prompt_tokens + config.rollout.max_new_tokens, config.train.pack_tokens
    choice = choose(
        job,
        student=None if "student.parallel" in left else config.student.parallel,
        # other engines are cut by what their own sections say
        teacher=None if "teacher.parallel" in left and engine.loads_model else config.teacher.parallel,
        pack_tokens=budgets(longest, most) if "train.pack_tokens" in left else [most],
        teacher_weighs=engine.loads_model,
    )
    found = {
        "student.parallel": choice.student,
        "teacher.parallel": choice.teacher,
        "train.pack_tokens": choice.pack_tokens,
    }
    warning = None
    if not choice.fits:
        gib = 2**30
        warning = (
            f"no layout over {job.cluster.gpus} rank(s) is estimated to fit: the smallest takes "
            f"{choice.memory / gib:,.1f} GiB of a rank, which has {choice.room / gib:,.1f} to give (`tropd check` "
            "lists them). Use more ranks, student.recompute=full, teacher.offload or optimizer.offload."
        )
    return {key: value for key, value in found.items() if key in left}, warning


def _sampler(
    config: RunConfig, left: Collection[str], student: Architecture, teacher: Architecture, machines: Cluster
) -> dict[str, int]:
    key = "rollout.parallel.tensor"
    if key not in left:
        return {}
    engine = ROLLOUT_ENGINES[config.rollout.engine]
    models = [student] * engine.colocated
    if suites_of(config):  # the trainer's own sampler answers them
        models += [student] * (not engine.generates) + [teacher] * config.evaluate.teacher
    if not models:
        return {key: 1}
    part = machines.model_copy(update={"gpus": machines.gpus - config.teacher.ranks})
    return {key: sampler_ranks(models, part, itemsize=DTYPES[config.dtype].itemsize)}


def _shown(value: Any) -> str:
    return describe(value) if isinstance(value, Layout) else str(value)
