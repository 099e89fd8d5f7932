"""Responses of the teacher for a run whose data has none: written once, when it starts, and kept in RUN/responses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_tropd.commands.fitting import check_agreed, resumes
from megatron_tropd.commands.generate import Missing, Sampling, write_missing
from megatron_tropd.config.run import RunConfig
from megatron_tropd.config.sections import Layout
from megatron_tropd.convert.source import source_fingerprint
from megatron_tropd.data.stream import PromptStream
from megatron_tropd.engine.model import check_divisible
from megatron_tropd.errors import ConfigError, DataError, TropdError
from megatron_tropd.progress.phases import Phase
from megatron_tropd.report.terminal import say
from megatron_tropd.setup.datasets import shares_of, sources_of
from megatron_tropd.setup.validate import Inputs, guided_per_prompt
from megatron_tropd.storage.write_aside import make_directory, write_aside
from megatron_tropd.train.earlier_run import set_aside
from megatron_tropd.types import Architecture, Int64Array, SamplingParams

FOLDER = "responses"
_ABOUT = "about.json"
_SHAPES = "what responses are to"  # of all that is noted about them, what a run that resumes must share


def with_responses(config: RunConfig, inputs: Inputs) -> RunConfig:
    """Return a configuration whose prompts all have what its method needs of a teacher. Collective.

    Where some lack a response, the teacher writes it, row by row, into RUN/responses, from where a process that was
    killed continues, and from where a run that resumes reads.

    Raises:
        DataError: a run resumes, and its responses are lost, or are those of other data or another teacher.
        ConfigError: it resumes from another run, whose responses are meant.
    """
    check_agreed(config)
    bare = inputs.prompts.response_lengths() == 0
    if not (guided_per_prompt(config, inputs.method) and bare.any()):
        return config
    rows = _needed(config, inputs)
    files = {
        source.name: config.run_dir / FOLDER / f"{source.name or 'prompts'}.jsonl" for source in sources_of(config.data)
    }
    left = _agreed_left(config, files, _about(config, inputs, rows), inputs)
    if left:
        _write(config, inputs, rows, bare, {name: files[name] for name in left})
    elif dist.get_rank() == 0:
        say(f"responses of the teacher: those in {config.run_dir / FOLDER}, which it wrote before")
    return _reading(config, files)


def _reading(config: RunConfig, files: Mapping[str, Path]) -> RunConfig:
    """Return the configuration with the written files in place of the user's."""

    def read(one: RunConfig) -> RunConfig:
        named = tuple(source.model_copy(update={"prompts": (files[source.name],)}) for source in one.data.sources)
        changes: dict[str, Any] = {"sources": named} if named else {"prompts": tuple(files.values())}
        return one.model_copy(update={"data": one.data.model_copy(update=changes)})

    return config.changed(read)


def _needed(config: RunConfig, inputs: Inputs) -> Int64Array:
    """List the rows that training visits, in their order; of every source at least one."""
    prompts, shares = inputs.prompts, shares_of(config.data, inputs.prompts)
    asked = config.train.steps * config.train.prompts_per_step
    if len(shares) == 1 and asked >= len(prompts):
        return np.arange(len(prompts))
    places: Any = range(len(prompts))  # a walk over their numbers
    stream = PromptStream(places, config.seed, shuffle=config.data.shuffle, shares=shares)
    visited: set[Any] = set()
    with Phase("finding the prompts that training asks"):
        for step in range(config.train.steps):
            visited.update(stream.batch(step, config.train.prompts_per_step))
            if len(visited) == len(prompts):
                break
    visited.update(int(share.rows_N[0]) for share in shares if visited.isdisjoint(share.rows_N.tolist()))
    return np.array(sorted(visited))


# --------------------------------------------------------------------------- what is there already


def _about(config: RunConfig, inputs: Inputs, rows: Int64Array) -> dict[str, Any]:
    """Describe the responses of a run."""
    teachers = {"": config.teacher.source, **{one.name: one.source for one in config.teachers}}
    return {
        _SHAPES: {
            "data.prompts": inputs.prompts.fingerprint(),
            "teacher.model": {name: source_fingerprint(source) for name, source in teachers.items()},
        },
        "rows": len(rows),
        "settings": _sampling(config, inputs).params.__repr__(),
        "seed": config.seed,
    }


def _agreed_left(config: RunConfig, files: Mapping[str, Path], about: Mapping[str, Any], inputs: Inputs) -> list[str]:
    """Return the sources of which responses are still to be written; the first rank looks for all. Collective."""
    said: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            said = [_left(config, files, about), None]
        except TropdError as error:
            said = [None, (type(error).__name__, str(error))]
    dist.broadcast_object_list(said, src=0)
    left, refused = said
    if refused is not None:
        raise {"DataError": DataError, "ConfigError": ConfigError}.get(refused[0], TropdError)(refused[1])
    return list(left)


def _left(config: RunConfig, files: Mapping[str, Path], about: Mapping[str, Any]) -> list[str]:
    folder = config.run_dir / FOLDER
    before = _read_about(folder)
    left = [name for name, file in files.items() if not file.exists()]
    if config.checkpoint.resume not in ("auto", "never"):
        raise ConfigError(
            f"checkpoint.resume = '{config.checkpoint.resume}', and the prompts have no responses: give those that the "
            f"teacher of that run wrote, as in data.prompts=ITS_RUN_DIR/{FOLDER}/prompts.jsonl."
        )
    if resumes(config):
        _check_same(folder, before, about, left, files)
        return []
    if before != about and folder.exists():
        set_aside(config.run_dir, [FOLDER])
        left = list(files)
    make_directory(folder)
    write_aside(folder / _ABOUT, json.dumps(about, indent=1))
    return left


def _read_about(folder: Path) -> dict[str, Any] | None:
    try:
        return dict(json.loads((folder / _ABOUT).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):  # nothing that a run has left, so nothing to take up
        return None


def _check_same(
    folder: Path, before: Mapping[str, Any] | None, about: Mapping[str, Any], left: list[str], files: Mapping[str, Path]
) -> None:
    """Raise DataError when the responses of a run that resumes are lost, or not for what it is given now."""
    over = "Use another run_dir, or checkpoint.resume=never to start over (the old results are moved aside)."
    if before is None or left:
        lost = files[left[0]] if left else folder / _ABOUT
        raise DataError(
            f"the run in {folder.parent} has checkpoints, but the responses that its teacher wrote are lost: "
            f"{lost.absolute()} is not there. Put it back. {over}"
        )
    was, now = before.get(_SHAPES, {}), about[_SHAPES]
    other = [key for key in now if was.get(key) != now[key]]
    if other:
        raise DataError(
            f"the responses in {folder.absolute()} were written for other {' and '.join(other)} than this run is "
            f"given. Give it those it was started with. {over}"
        )


# --------------------------------------------------------------------------- writing


def _write(config: RunConfig, inputs: Inputs, rows: Int64Array, bare: np.ndarray, files: Mapping[str, Path]) -> None:
    prompts, first = inputs.prompts, dist.get_rank() == 0
    missing = {}
    for name, own in prompts.sources().items():
        if name in files:
            mine = np.intersect1d(rows, own)
            given = frozenset(prompts.place(int(i)) for i in mine[~bare[mine]])
            missing[name] = Missing(files[name], frozenset(prompts.place(int(i)) for i in mine), given)
    if first:
        count, most = int(bare[rows].sum()), " prompts"
        if len(rows) < len(prompts):
            most = f" of {len(prompts):,} prompts, as many as {config.train.steps} steps ask,"
        say(
            f"the teacher writes responses to {count:,}{most} once, into {config.run_dir / FOLDER}: "
            f"method.name={config.method.name} starts some sequences with their first tokens, and the data lacks them "
            "(data.responses=none trains without)"
        )
    with Phase("the teacher writes responses"):
        write_missing(config, missing, sampling=_sampling(config, inputs))
        dist.barrier()  # the first rank has given the files their names


def _sampling(config: RunConfig, inputs: Inputs) -> Sampling:
    rollout, longest = config.rollout, config.data.max_response_tokens
    most = rollout.max_new_tokens if longest is None else min(longest, rollout.max_new_tokens)
    return Sampling(
        params=SamplingParams(
            max_new_tokens=most, temperature=rollout.temperature, top_p=rollout.top_p, top_k=rollout.top_k
        ),
        seed=config.seed,
        dtype=config.dtype,
        tensor=_tensor(config.teacher.parallel, inputs.teacher),
        engine=config.teacher.engine,
        vllm=config.teacher.vllm,
    )


def _tensor(layout: Layout, teacher: Architecture) -> int:
    """Return over how many ranks the teacher is cut to write: as many as hold it to score, where its heads allow."""
    world = dist.get_world_size()
    for size in (layout.tensor * layout.pipeline, layout.tensor):
        try:
            check_divisible(teacher, Layout(tensor=size))
        except ConfigError:
            continue
        if world % size == 0:
            return size
    return 1
