"""The batches of a run in their order, each sampled up to ``rollout.ahead`` steps before it is learned from.

Batch ``s`` is always sampled with the weights of step ``max(0, s - ahead)``, whatever is ready when. It is started once
the sampler has those weights and, before they change, waited for and scored by the trainer. So nothing is under way
while new weights are published, and whatever calls itself old is of the very weights that wrote the batch, in the
trainer's own arithmetic: a batch that waited is to every method what the later minibatches of a step are.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_tropd.config.sections import RolloutConfig
from megatron_tropd.data.stream import StepPlaces
from megatron_tropd.data.tokenizer import Tokenizer
from megatron_tropd.engine.context import own_valid_positions
from megatron_tropd.engine.score import query_ids, score_packs
from megatron_tropd.engine.views import StudentScores
from megatron_tropd.errors import CheckpointError
from megatron_tropd.report.stopwatch import Stopwatch
from megatron_tropd.rollout.engines.recorded import read_arrays, read_rollouts, write_rollouts
from megatron_tropd.rollout.guidance import make_requests
from megatron_tropd.rollout.protocol import AsyncSampler, GenerationHandle
from megatron_tropd.setup.build import Run, pack_for
from megatron_tropd.storage.write_aside import write_aside
from megatron_tropd.teacher.protocol import PendingScores, start_scoring
from megatron_tropd.train.hooks import Hooks
from megatron_tropd.types import Pack, Prompt, Rollout, SamplingParams

_FOLDER = "ahead"  # in a checkpoint: the batches that were sampled and not yet learned from
_PLACES = "prompts"  # in a checkpoint's state: ``StepPlaces.changes``


@dataclass(frozen=True, slots=True)
class ScoredRollouts:
    """A batch's rollouts, what the student said of them at the weights that wrote them, and scores to come."""

    rollouts: Sequence[Rollout]
    packs: Sequence[Sequence[Sequence[Pack]]]  # by minibatch and replica
    scores: Sequence[Sequence[StudentScores | None]]  # by minibatch, for this replica's packs; None: not requested
    pending_scores: Sequence[PendingScores]  # by minibatch: the teacher's, of this replica's packs


@dataclass(frozen=True, slots=True)
class Batch:
    """The batch that one step learns from."""

    prompts: Sequence[Prompt]
    fraction: float  # of a teacher response that guided sequences start with
    scored: ScoredRollouts


class RolloutQueue:
    """The queue that the module describes. Every method is collective; it knows which weights wrote which batch."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._ahead = run.rollout.ahead
        self._places = StepPlaces.of(run.train.prompts_per_step)
        self._in_flight: dict[int, _InFlight] = {}
        self._ready: dict[int, Batch] = {}
        self._accounted = 0.0  # time.perf_counter() up to which overlap has been counted
        self._hidden = 0.0

    def start(self, step: int, *, watch: Stopwatch) -> None:
        """Start on all that the present weights, of ``step`` finished steps, are to sample."""
        self._ready = {number: batch for number, batch in self._ready.items() if number >= step}
        with watch("rollout"):
            for number in range(step, min(step + self._ahead + 1, self._run.train.steps)):
                if number not in self._ready and number not in self._in_flight:
                    self._in_flight[number] = _start(self._run, number, self._places)

    def get(self, step: int, *, watch: Stopwatch, hooks: Hooks) -> Batch:
        """Wait for the batch of ``step`` and return it.

        What the trainer's own processes have written is there: a teacher with ranks of its own need not wait for it.
        """
        for number in sorted(self._in_flight):
            if isinstance(self._in_flight[number].pending, _Written):
                self._wait_for(number, step, watch, hooks)
        if step not in self._ready:
            self._wait_for(step, step, watch, hooks)
        return self._ready[step]

    def wait_for_all(self, *, step: int, watch: Stopwatch, hooks: Hooks) -> None:
        """Wait for all that was started, in step ``step``: the weights may change then."""
        for number in sorted(self._in_flight):
            self._wait_for(number, step, watch, hooks)

    def hidden_seconds(self) -> float:
        """Say how long, since last called, rollouts were written while this program did something else; first rank."""
        seconds, self._hidden = self._hidden, 0.0
        return seconds

    def _wait_for(self, number: int, step: int, watch: Stopwatch, hooks: Hooks) -> None:
        in_flight, waited = self._in_flight[number], time.perf_counter()
        with watch("rollout"):
            rollouts = with_teachers(in_flight.pending.collect(), in_flight.prompts)
        self._account(in_flight, waited)
        rollout = self._run.rollout
        if rollout.record is not None and self._run.world.is_first:
            write_rollouts(rollout.record, number, rollouts)
        hooks.may_leave(step)
        scored = score_rollouts(self._run, rollouts, watch=watch)
        self._ready[number] = Batch(in_flight.prompts, in_flight.fraction, scored)
        del self._in_flight[number]

    def _account(self, in_flight: _InFlight, waited: float) -> None:
        ended = in_flight.pending.ended_at
        if ended is not None:
            self._hidden += max(0.0, min(ended, waited) - max(in_flight.at, self._accounted))
            self._accounted = time.perf_counter()

    # ----------------------------------------------------------------- kept with a checkpoint

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint says of the walk through the prompts: ``restore`` is given it."""
        return {_PLACES: self._places.changes}

    def save(self, checkpoint: Path, step: int) -> None:
        """Keep in a checkpoint of ``step`` finished steps what older weights have sampled for later steps."""
        for number in range(step, step + self._ahead):
            if number in self._ready:
                folder = checkpoint / _FOLDER
                folder.mkdir(exist_ok=True)
                if self._run.world.is_first:
                    write_rollouts(folder, number, self._ready[number].scored.rollouts)
                self._write_scores(folder, number)

    def restore(self, checkpoint: Path, step: int, state: Mapping[str, Any]) -> None:
        """Take up what ``save`` has left there; what it has not is sampled anew, with the present weights.

        What has been sampled keeps the prompts that it was sampled for; from the next batch on there are as many
        prompts as this run wants, beginning with the first that no batch has had.

        Args:
            state: of the checkpoint.

        Raises:
            CheckpointError: scores are missing.
        """
        folder = checkpoint / _FOLDER
        self._places, unsampled = _places_of(checkpoint, state, self._run.train.prompts_per_step), step
        for number in range(step, min(step + self._ahead, self._run.train.steps)):
            if any(folder.glob(_scores_files(number))):
                unsampled = number + 1
                prompts, fraction = _prompts_of(self._run, number, self._places)
                rollouts = with_teachers(read_rollouts(folder, number), prompts)
                packs = packs_of(self._run, rollouts)
                stored = _Stored(folder, number)
                groups, device = self._run.world.student, self._run.student.device
                scores = [
                    [
                        stored.scores(item, own_valid_positions(item, groups), device) if groups.is_last_stage else None
                        for item in part[groups.replica]
                    ]
                    for part in packs
                ]
                self._ready[number] = Batch(prompts, fraction, scored_rollouts(self._run, rollouts, packs, scores))
        self._places = self._places.changed(unsampled, self._run.train.prompts_per_step)

    def _write_scores(self, folder: Path, number: int) -> None:
        """Write this rank's part, a row per prediction: a layout that resumes finds its own among all ranks'."""
        groups, scored = self._run.world.student, self._ready[number].scored
        if groups.tensor_rank or not groups.is_last_stage:
            return
        columns: list[dict[str, np.ndarray]] = []
        for packs, scores in zip(scored.packs, scored.scores, strict=True):
            for item, score in zip(packs[groups.replica], scores, strict=True):
                assert score is not None  # a batch that waits is always scored
                rows = own_valid_positions(item, groups)
                columns.append(_columns(item, rows, score))
        whole = {name: np.concatenate([part[name] for part in columns]) for name in (columns[0] if columns else ())}
        path = folder / f"scores-{number:08d}-{torch.distributed.get_rank():05d}.npz"
        # numpy's stub takes the arrays for allow_pickle
        write_aside(path, lambda file: np.savez(file, **whole))  # type: ignore[arg-type]


# --------------------------------------------------------------------------- sampling


@dataclass(frozen=True, slots=True)
class _InFlight:
    """A batch that is being written."""

    prompts: Sequence[Prompt]
    fraction: float
    pending: GenerationHandle
    at: float  # time.perf_counter() when it was started


@dataclass(frozen=True, slots=True)
class _Written:
    """Implement ``GenerationHandle`` where the sampler writes at once."""

    rollouts: list[Rollout]
    ended_at: float | None = None

    def collect(self) -> list[Rollout]:
        return self.rollouts


def _start(run: Run, number: int, places: StepPlaces) -> _InFlight:
    prompts, fraction = _prompts_of(run, number, places)
    rollout = run.rollout
    guided = rollout.guided_per_prompt if run.method.guided else 0
    requests = make_requests(
        prompts,
        samples=rollout.samples_per_prompt,
        guided=guided,
        fraction=fraction,
        max_new_tokens=rollout.max_new_tokens,
    )
    params, seed, at = sampling_params(run), run.seed, time.perf_counter()
    if isinstance(run.sampler, AsyncSampler):
        return _InFlight(prompts, fraction, run.sampler.start(requests, params, seed=seed, step=number), at)
    return _InFlight(prompts, fraction, _Written(run.sampler.generate(requests, params, seed=seed, step=number)), at)


def _places_of(checkpoint: Path, state: Mapping[str, Any], size: int) -> StepPlaces:
    """Read which prompts every step has had; of an earlier version's checkpoint, as many in each as its settings say.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        was = int(state.get("run", {}).get("train.prompts_per_step", size))
        changes = state.get(_PLACES, StepPlaces.of(was).changes)
        return StepPlaces(tuple((int(step), int(place), int(count)) for step, place, count in changes))
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint.absolute()} does not say which prompts its steps have had ({error}). Name another with "
            "checkpoint.resume=PATH."
        ) from error


def _prompts_of(run: Run, number: int, places: StepPlaces) -> tuple[list[Prompt], float]:
    prompts = run.prompts.at(places.places(number))
    return prompts, run.method.schedule.fraction(number, run.train.steps) if run.method.guided else 0.0


def with_teachers(rollouts: Sequence[Rollout], prompts: Sequence[Prompt]) -> list[Rollout]:
    """Name in rollouts, which follow their prompts in equal numbers, the teachers that score them and what those read
    in place of the prompt. Nobody but the teacher is given that: the sampler has written before it is there.
    """
    per_prompt = len(rollouts) // len(prompts)
    own = (prompts[number // per_prompt] for number in range(len(rollouts)))
    return [
        replace(one, teacher=prompt.teacher, teacher_prompt_ids=prompt.teacher_ids)
        if prompt.teacher or prompt.teacher_ids is not None
        else one
        for one, prompt in zip(rollouts, own, strict=True)
    ]


def sampling_params(run: Run) -> SamplingParams:
    """Say how training rollouts are drawn."""
    return sampling_of(run.rollout, run.tokenizer)


def sampling_of(section: RolloutConfig, tokenizer: Tokenizer) -> SamplingParams:
    """Say how rollouts are drawn that a section describes."""
    return SamplingParams(
        max_new_tokens=section.max_new_tokens,
        temperature=section.temperature,
        top_p=section.top_p,
        top_k=section.top_k,
        stop_token_ids=tuple(tokenizer.eos_ids),
    )


# --------------------------------------------------------------------------- packs, and the student's scores of them


def score_rollouts(run: Run, rollouts: Sequence[Rollout], *, watch: Stopwatch) -> ScoredRollouts:
    """Pack every minibatch, and have it scored by the student at its present weights where that is requested."""
    with watch("pack"):
        packs = packs_of(run, rollouts)
    with watch("student"):
        scores = [student_scores(run, part) for part in packs]
    with watch("teacher"):
        return scored_rollouts(run, rollouts, packs, scores)


def scored_rollouts(
    run: Run,
    rollouts: Sequence[Rollout],
    packs: Sequence[Sequence[Sequence[Pack]]],
    scores: Sequence[Sequence[StudentScores | None]],
) -> ScoredRollouts:
    """Have the packs scored by the teacher, too: one with ranks of its own begins at once, another when waited for."""
    pending = [
        start_scoring(run.teacher, part, run.teacher_request, query_ids(own))
        for part, own in zip(packs, scores, strict=True)
    ]
    return ScoredRollouts(rollouts, packs, scores, pending)


def packs_of(run: Run, rollouts: Sequence[Rollout]) -> list[list[list[Pack]]]:
    """Pack rollouts by minibatch and replica."""
    return [pack_rollouts(run, part) for part in split_evenly(rollouts, run.train.minibatches)]


def split_evenly(rollouts: Sequence[Rollout], parts: int) -> list[Sequence[Rollout]]:
    """Split into consecutive parts whose sizes differ by at most one."""
    ends = np.linspace(0, len(rollouts), parts + 1).astype(int)
    return [rollouts[start:end] for start, end in pairwise(ends)]


def pack_rollouts(run: Run, rollouts: Sequence[Rollout]) -> list[list[Pack]]:
    """Pack rollouts for every student replica."""
    return pack_for(
        run.world, rollouts, pack_tokens=run.train.pack_tokens, hidden_size=run.student.architecture.hidden_size
    )


def student_scores(run: Run, packs: Sequence[Sequence[Pack]]) -> Sequence[StudentScores | None]:
    """Compute old log-probs, entropies, likeliest tokens if the method needs them, or weights change meanwhile."""
    mine, needs = packs[run.world.student.replica], run.method.needs
    changing = run.train.minibatches > 1 or run.rollout.ahead > 0
    if not (needs.old_logprob or needs.entropy_top or run.teacher_request.queries or changing):
        return [None] * len(mine)
    return score_packs(
        run.student,
        mine,
        vocab_size=run.vocab_size,
        temperature=run.method.temperature,
        top_k=run.teacher_request.queries,
        end_ids=run.method.end_ids,
    )


# --------------------------------------------------------------------------- scores on disk


def _scores_files(number: int) -> str:
    return f"scores-{number:08d}-*.npz"


def _columns(item: Pack, rows: np.ndarray, score: StudentScores) -> dict[str, np.ndarray]:
    columns = {
        "key": _keys(item, rows),
        "logprob": score.logprob_N.cpu().numpy(),
        "entropy": score.entropy_N.cpu().numpy(),
        "model_logprob": score.model_logprob_N.cpu().numpy(),
    }
    return columns if score.topk_ids_NK is None else columns | {"topk_ids": score.topk_ids_NK.cpu().numpy()}


def _keys(item: Pack, rows: np.ndarray) -> np.ndarray:
    """Compute one number per prediction of a batch: its sequence and position."""
    return (item.sequence_T[rows] << 32) | item.position_T[rows]


class _Stored:
    """All ranks' scores of one batch."""

    def __init__(self, folder: Path, number: int) -> None:
        parts: list[dict[str, np.ndarray]] = []
        for path in sorted(folder.glob(_scores_files(number))):
            part = read_arrays(path)
            parts += [part] if part else []
        self._folder, self._number = folder, number
        self._columns = {name: np.concatenate([part[name] for part in parts]) for name in (parts[0] if parts else ())}
        self._order = np.argsort(self._columns["key"], kind="stable") if parts else np.empty(0, np.int64)

    def scores(self, item: Pack, rows: np.ndarray, device: torch.device) -> StudentScores:
        """Return the scores of these predictions of a pack; CheckpointError when there are none."""
        wanted = _keys(item, rows)
        keys = self._columns["key"][self._order] if self._columns else np.empty(0, np.int64)
        at = np.searchsorted(keys, wanted)
        if len(keys) == 0 or not np.array_equal(keys[at.clip(max=len(keys) - 1)], wanted):
            raise CheckpointError(
                f"{self._folder.absolute()} lacks scores of batch {self._number}: it is of other rollouts. Name "
                "another with checkpoint.resume=PATH."
            )
        found = {
            name: torch.from_numpy(column[self._order[at]]).to(device)
            for name, column in self._columns.items()
            if name != "key"
        }
        return StudentScores(found["logprob"], found["entropy"], found["model_logprob"], found.get("topk_ids"))
