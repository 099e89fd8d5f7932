"""``tropd score``: the teacher's scores of responses that are there already, written for ``teacher.recorded_from``."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch.distributed as dist

from megatron_tropd.config.run import RunConfig
from megatron_tropd.data.packing import as_teacher_reads
from megatron_tropd.errors import ConfigError, DataError
from megatron_tropd.parallel.groups import initialize_distributed
from megatron_tropd.progress.phases import Phase
from megatron_tropd.report.terminal import say
from megatron_tropd.rollout.dispatch import contexts_of, to_rollout
from megatron_tropd.rollout.engines.recorded import read_rollouts
from megatron_tropd.rollout.guidance import make_requests
from megatron_tropd.setup.build import build_teacher, build_world, load_teacher, pack_for
from megatron_tropd.setup.validate import Inputs, check_writable, read_inputs, teacher_request
from megatron_tropd.teacher.protocol import TeacherRequest
from megatron_tropd.teacher.schema import lacking
from megatron_tropd.teacher.store import Store, sequence_key
from megatron_tropd.types import LOSS_REGIONS, Int64Array, Rollout, SamplingParams


@dataclass(slots=True)
class Scored:
    """Count what a scoring pass has done, over all ranks."""

    sequences: int = 0
    tokens: int = 0  # predictions scored
    known: int = 0  # sequences that had all scores already
    seconds: float = 0.0  # spent by the teacher


def score(config: RunConfig) -> Scored:
    """Score recorded rollouts, or the responses in the data, into ``teacher.record``. Collective.

    What is scored there with all that the method needs is left out: a pass that was killed resumes where it was, and a
    directory that was made for less is completed.

    Raises:
        TropdError: what is wrong with the configuration, the data or the models.
    """
    initialize_distributed(timeout_s=config.collective_timeout_s)
    if config.teacher.ranks:
        raise ConfigError(f"teacher.ranks={config.teacher.ranks}: here all ranks score. Set it to 0.")
    config.check_world(dist.get_world_size())
    directory = config.teacher.record
    if directory is None:
        raise ConfigError("teacher.record=null: give the directory to write scores to.")
    inputs = read_inputs(config)
    if inputs.method.needs.support in ("student", "union") and inputs.method.needs.top_k:
        raise ConfigError(
            f"method.support={inputs.method.needs.support} requests scores of ids that the student names while it "
            "trains. Score with method.support=teacher, or record while training (teacher.record)."
        )
    check_writable(config)
    done = _score(config, inputs, directory)
    if dist.get_rank() == 0:
        size = sum(path.stat().st_size for path in directory.iterdir())
        rate = done.tokens / done.seconds if done.seconds else 0.0
        say(
            f"{done.sequences:,} sequences scored ({done.known:,} were so before), {done.tokens:,} tokens, "
            f"{rate:,.0f} tokens/s; {directory} holds {size:,} bytes"
        )
    return done


def _score(config: RunConfig, inputs: Inputs, directory: Path) -> Scored:
    device = initialize_distributed()
    world = build_world(config, device, base=inputs.base is not None)
    request = teacher_request(config, inputs.method)
    teacher = build_teacher(config, inputs, load_teacher(config, world), world)
    known, done = _Known(Store(directory), request), Scored()
    dist.barrier()  # everyone has seen the same scores
    phase = Phase("batches scored", total=_count_batches(config, inputs))
    with phase, contextlib.closing(teacher):
        for rollouts in phase.watch(_batches(config, inputs)):
            fresh = [rollout for rollout in rollouts if known.is_new(rollout)]
            done.known += len(rollouts) - len(fresh)
            if not fresh:
                continue
            packs = pack_for(world, fresh, pack_tokens=config.train.pack_tokens, hidden_size=inputs.student.hidden_size)
            started = time.perf_counter()
            teacher.score(packs, request)
            done.seconds += time.perf_counter() - started
            done.sequences += len(fresh)
            done.tokens += sum(pack.num_valid for replica in packs for pack in replica)
        dist.barrier()
    return done


class _Known:
    """The scores that there are already: in a store, with all that is requested, or earlier in this pass."""

    def __init__(self, store: Store, request: TeacherRequest) -> None:
        self._store, self._request = store, request
        self._seen: dict[bytes, list[Int64Array]] = {}

    def is_new(self, rollout: Rollout) -> bool:
        """Say whether a rollout is to be scored, and take it for scored from then on."""
        if not len(_loss_positions(rollout)):
            return False
        rollout = as_teacher_reads(rollout)
        position, key = _loss_positions(rollout), sequence_key(rollout.token_ids)
        seen = self._seen.setdefault(key, [])
        if any(np.isin(position, earlier).all() for earlier in seen):
            return False
        seen.append(position)
        places = self._store.find(key)
        able = [place for place in places if not lacking(self._store.columns(place), self._request)]
        return not any(self._store.covers(place, position) for place in able)


def _loss_positions(rollout: Rollout) -> Int64Array:
    """List the predictions of a rollout that carry loss."""
    return np.flatnonzero(np.isin(rollout.region_L[1:], LOSS_REGIONS))


def _count_batches(config: RunConfig, inputs: Inputs) -> int:
    recorded = config.rollout.recorded_from is not None
    return config.train.steps if recorded else -(-len(inputs.prompts) // config.train.prompts_per_step)


def _batches(config: RunConfig, inputs: Inputs) -> Iterator[list[Rollout]]:
    """Iterate over what is to be scored, numbered separately within each batch."""
    if config.rollout.recorded_from is not None:
        numbers = inputs.prompts.row_of_index()
        for step in range(config.train.steps):
            yield [_as_of(inputs, numbers, one) for one in read_rollouts(config.rollout.recorded_from, step)]
        return
    prompts, size = inputs.prompts, config.train.prompts_per_step
    bare = [row for row, length in enumerate(prompts.response_lengths().tolist()) if not length]
    if bare:
        raise DataError(
            f"{len(bare)} of {len(prompts)} prompts have no response to score (the first is {prompts.place(bare[0])}). "
            "Let a model write them (`tropd generate`), or give recorded rollouts (rollout.engine=recorded)."
        )
    params = SamplingParams(max_new_tokens=config.rollout.max_new_tokens)
    for start in range(0, len(prompts), size):
        rows = prompts[start : start + size]
        requests = make_requests(rows, samples=0, guided=1, fraction=1.0, max_new_tokens=params.max_new_tokens)
        whole = [replace(request, max_new_tokens=0) for request in requests]
        contexts = contexts_of(whole, inputs.teacher.max_positions)
        written = [to_rollout(r, c, None, params, version=0) for r, c in zip(whole, contexts, strict=True)]
        yield [replace(one, teacher_prompt_ids=row.teacher_ids) for one, row in zip(written, rows, strict=True)]


def _as_of(inputs: Inputs, rows: Mapping[int, int], rollout: Rollout) -> Rollout:
    """Add what the teacher reads in place of the prompt, by the row of the data that it came from.

    Raises:
        DataError: the data has no such row, or has another prompt there.
    """
    if not len(inputs.prompts.with_own_teacher_prompt()):
        return rollout
    row = rows.get(rollout.prompt_index)
    prompt = None if row is None else inputs.prompts[row]
    asked = rollout.token_ids[: rollout.prompt_length]
    if prompt is None or not np.array_equal(prompt.token_ids, asked):
        raise DataError(
            f"sequence {rollout.sequence_id} of the recorded rollouts answers row {rollout.prompt_index} of other data "
            "than data.prompts, where the teacher's own prompts are. Give the data that the rollouts were made of."
        )
    return replace(rollout, teacher_prompt_ids=prompt.teacher_ids)
