"""``tropd score``: the teacher's grades of responses that are there already, written for ``teacher.recorded_from``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from megatron_tropd.config.run import RunConfig
from megatron_tropd.errors import ConfigError, DataError
from megatron_tropd.parallel.groups import initialize_distributed
from megatron_tropd.rollout.dispatch import contexts_of, to_rollout
from megatron_tropd.rollout.engines.recorded import read_rollouts
from megatron_tropd.rollout.guidance import make_requests
from megatron_tropd.setup.build import build_teacher, build_world, load_teacher, pack_for
from megatron_tropd.setup.validate import Inputs, check_writable, read_inputs, teacher_request
from megatron_tropd.teacher.store import Store, sequence_key
from megatron_tropd.types import Rollout, SamplingParams


@dataclass(slots=True)
class Scored:
    """What a scoring pass has done, over all ranks."""

    sequences: int = 0
    tokens: int = 0  # predictions graded
    known: int = 0  # sequences that had grades already
    seconds: float = 0.0  # spent by the teacher


def score(config: RunConfig) -> Scored:
    """Grades recorded rollouts, or the responses in the data, into ``teacher.record``. Collective.

    Sequences that have grades there are left out: a pass that was killed goes on where it was.

    Raises:
        TropdError: what is wrong with the configuration, the data or the models.
    """
    initialize_distributed(timeout_s=config.collective_timeout_s)
    if config.teacher.ranks:
        raise ConfigError(f"teacher.ranks={config.teacher.ranks}: here all ranks grade. Set it to 0.")
    config.check_world(dist.get_world_size())
    directory = config.teacher.record
    if directory is None:
        raise ConfigError("teacher.record=null: give the directory to write grades to.")
    inputs = read_inputs(config)
    if inputs.method.needs.support in ("student", "union") and inputs.method.needs.top_k:
        raise ConfigError(
            f"method.support={inputs.method.needs.support} asks the teacher about ids that the student names while it "
            "trains. Score with method.support=teacher, or record while training (teacher.record)."
        )
    check_writable(config)
    done = _score(config, inputs, directory)
    if dist.get_rank() == 0:
        size = sum(path.stat().st_size for path in directory.iterdir())
        rate = done.tokens / done.seconds if done.seconds else 0.0
        Console().print(
            f"{done.sequences:,} sequences graded ({done.known:,} were so before), {done.tokens:,} tokens, "
            f"{rate:,.0f} tokens/s; {directory} holds {size:,} bytes",
            highlight=False,
            soft_wrap=True,
        )
    return done


def _score(config: RunConfig, inputs: Inputs, directory: Path) -> Scored:
    device = initialize_distributed()
    world = build_world(config, device, base=inputs.base is not None)
    spec = teacher_request(config, inputs.method)
    teacher = build_teacher(config, inputs, load_teacher(config, world), world)
    store, done = Store(directory), Scored()
    dist.barrier()  # everyone has seen the same grades
    seen: set[bytes] = set()
    try:
        for rollouts in _batches(config, inputs):
            fresh = []
            for rollout in rollouts:
                key = sequence_key(rollout.token_ids)
                if rollout.response_length and key not in seen and key not in store:
                    fresh.append(rollout)
                seen.add(key)
            done.known += len(rollouts) - len(fresh)
            if not fresh:
                continue
            packs = pack_for(world, fresh, pack_tokens=config.train.pack_tokens, hidden_size=inputs.student.hidden_size)
            started = time.perf_counter()
            teacher.score(packs, spec)
            done.seconds += time.perf_counter() - started
            done.sequences += len(fresh)
            done.tokens += sum(pack.num_valid for replica in packs for pack in replica)
        dist.barrier()
    finally:
        teacher.close()
    return done


def _batches(config: RunConfig, inputs: Inputs) -> Iterator[list[Rollout]]:
    """What is to be graded, numbered apart within each batch."""
    if config.rollout.recorded_from is not None:
        for step in range(config.train.steps):
            yield read_rollouts(config.rollout.recorded_from, step)
        return
    prompts, size = inputs.prompts, config.train.prompts_per_step
    bare = [row for row, length in enumerate(prompts.response_lengths().tolist()) if not length]
    if bare:
        raise DataError(
            f"{len(bare)} of {len(prompts)} prompts have no response to grade (the first is {prompts.place(bare[0])}). "
            "Let a model write them (`tropd generate`), or give recorded rollouts (rollout.engine=recorded)."
        )
    params = SamplingParams(max_new_tokens=config.rollout.max_new_tokens)
    for start in range(0, len(prompts), size):
        rows = prompts[start : start + size]
        requests = make_requests(rows, samples=0, guided=1, fraction=1.0, max_new_tokens=params.max_new_tokens)
        whole = [replace(request, max_new_tokens=0) for request in requests]
        contexts = contexts_of(whole, inputs.teacher.max_positions)
        yield [to_rollout(r, c, None, params, version=0) for r, c in zip(whole, contexts, strict=True)]
