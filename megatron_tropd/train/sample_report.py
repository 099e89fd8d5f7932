"""Sampled answers for the report, token by token with region, gate and log ratio."""

from __future__ import annotations

from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

from megatron_tropd.engine.batch import BatchFacts, support_of, token_view
from megatron_tropd.engine.context import own_valid_positions
from megatron_tropd.engine.score import query_ids, score_packs
from megatron_tropd.engine.step import complete_tokens
from megatron_tropd.evaluate.suites import correctness, training_rule
from megatron_tropd.parallel.groups import Groups
from megatron_tropd.report.records import Sample, SampleToken
from megatron_tropd.rollout.guidance import make_requests
from megatron_tropd.rollout.protocol import Sampler
from megatron_tropd.setup.build import Run
from megatron_tropd.train.rollout_queue import pack_rollouts, sampling_params, with_teachers
from megatron_tropd.types import LOSS_REGIONS, Pack, Region, Rollout, StudentView, TeacherView

# how much of the teacher's response the guided samples start with
_SHOWN_PREFIX = 0.5
_SHOWN_REGIONS: dict[int, Literal["prefix", "continuation", "observation"]] = {
    Region.PREFIX: "prefix",
    Region.CONTINUATION: "continuation",
    Region.OBSERVATION: "observation",
}


def sample_answers(run: Run, sampler: Sampler, *, when: Literal["before", "after"], count: int) -> list[Sample]:
    """Answers to the first training prompts, token by token with region, gate and log ratio. Collective.

    Where the method is guided, each prompt has one answer of the student's own and one that continues the first half
    of the teacher's.
    """
    prompts = run.prompts.first(count)
    guided = 1 if run.method.guided and run.rollout.guided_per_prompt else 0
    budget = run.rollout.max_new_tokens
    requests = make_requests(prompts, samples=1, guided=guided, fraction=_SHOWN_PREFIX, max_new_tokens=budget)
    params = sampling_params(run)
    rollouts = sampler.generate(requests, params, seed=run.seed, step=run.train.steps)
    rollouts = with_teachers(rollouts, prompts)
    # a recording has no grades for new answers
    gates = _gate_by_sequence(run, rollouts) if run.scores_new else {}
    samples = []
    for number, rollout in enumerate(rollouts):
        prompt = prompts[number // (1 + guided)]
        right = None
        if prompt.answer is not None:
            rule, allowed = partial(training_rule, run.data), run.evaluate.allow_code_execution
            right = bool(correctness([rollout], [prompt], run.tokenizer, rule, allow_code=allowed)[0, 0])
        tokens = _sample_tokens(run, rollout, gates.get(rollout.sequence_id))
        samples.append(Sample(when=when, prompt=prompt.text, answer=prompt.answer, correct=right, tokens=tokens))
    return samples


def _sample_tokens(run: Run, rollout: Rollout, gate: np.ndarray | None) -> tuple[SampleToken, ...]:
    prompt = rollout.prompt_length
    pieces = run.tokenizer.tokens(rollout.token_ids[prompt:].tolist())
    regions = rollout.region_L[prompt:].tolist()
    row_L = np.cumsum(np.isin(regions, LOSS_REGIONS)) - 1  # of the gate: observations have none
    tokens = []
    for piece, region, row in zip(pieces, regions, row_L.tolist(), strict=True):
        seen = None if gate is None or region == Region.OBSERVATION else gate[row]
        tokens.append(
            SampleToken(
                text=piece,
                region=_SHOWN_REGIONS[region],
                trusted=None if seen is None or region != Region.CONTINUATION else bool(seen[0] > 0.5),
                log_ratio=None if seen is None else float(seen[1]),
            )
        )
    return tuple(tokens)


def _gate_by_sequence(run: Run, rollouts: list[Rollout]) -> dict[int, np.ndarray]:
    """``[response, 2]`` gate weight and log ratio of every token that carries loss, on every rank."""
    packs = pack_rollouts(run, rollouts)
    mine = packs[run.world.student.replica]
    scores = score_packs(
        run.student,
        mine,
        vocab_size=run.vocab_size,
        temperature=run.method.temperature,
        top_k=run.teacher_request.queries,
    )
    signals = run.teacher.score(packs, run.teacher_request, query_ids(scores))
    by_id = {rollout.sequence_id: rollout for rollout in rollouts}
    facts = BatchFacts(seed=run.seed, step=run.train.steps, progress=1.0)
    found: dict[int, np.ndarray] = {}
    for item, signal, score in zip(mine, signals, scores, strict=True):
        if signal is None or score is None or run.world.student.tensor_rank:
            continue
        tokens = token_view(item, by_id, facts, run.student)
        student = StudentView(
            logprob_T=score.logprob_N,
            old_logprob_T=score.logprob_N,
            entropy_T=score.entropy_N,
            old_entropy_T=score.entropy_N,
        )
        support = support_of(signal, tokens.target_T, run.method)
        teacher = TeacherView(
            logprob_T=signal.logprob_N,
            support_ids_TK=support.ids_NK,
            support_logprob_TK=support.logprob_NK,
            support_mask_TK=support.mask_NK,
            support_logtail_T=support.logtail_N,
            entropy_T=signal.entropy_N,
        )
        tokens = complete_tokens(tokens, score.logprob_N, score.model_logprob_N)
        weight = run.method.gate_weight(student, teacher, tokens)
        values = torch.stack([weight, signal.logprob_N - score.logprob_N], dim=1).float().cpu().numpy()
        found.update(_split_by_sequence(item, run.world.student, values))
    gathered: list[dict[int, np.ndarray] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    return _joined([part for part in gathered if part])


def _split_by_sequence(item: Pack, groups: Groups, values_N2: np.ndarray) -> dict[int, np.ndarray]:
    """``[n, 3]`` by sequence: position of each prediction, then its two values."""
    valid = own_valid_positions(item, groups)
    owner_N = item.sequence_T[valid]
    rows_N3 = np.column_stack([item.position_T[valid], values_N2])
    return {int(sequence): rows_N3[owner_N == sequence] for sequence in item.sequence_ids}


def _joined(parts: list[dict[int, np.ndarray]]) -> dict[int, np.ndarray]:
    """Each sequence whole (context-parallel ranks have parts of it), in the order of its tokens, without positions."""
    whole: dict[int, np.ndarray] = {}
    for sequence in sorted(set().union(*parts)):
        rows_N3 = np.concatenate([part[sequence] for part in parts if sequence in part])
        whole[sequence] = rows_N3[np.argsort(rows_N3[:, 0], kind="stable"), 1:]
    return whole
