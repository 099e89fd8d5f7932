"""Sampled answers for the report, token by token with region, gate and log ratio."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

from megatron_tropd.engine.batch import BatchFacts, batch_entropy_threshold, batch_weights, train_packs
from megatron_tropd.engine.context import own_valid_positions
from megatron_tropd.engine.score import query_ids, score_packs
from megatron_tropd.engine.views import views_of
from megatron_tropd.evaluate.suites import correctness, training_rule
from megatron_tropd.parallel.groups import Groups
from megatron_tropd.report.records import Sample, SampleToken, When
from megatron_tropd.rollout.guidance import make_requests
from megatron_tropd.rollout.protocol import Sampler
from megatron_tropd.setup.build import Run
from megatron_tropd.train.rewards import BatchRewards, reward_batch
from megatron_tropd.train.rollout_queue import pack_rollouts, sampling_params, with_teachers
from megatron_tropd.types import LOSS_REGIONS, Pack, Prompt, Region, Rollout

# how much of the teacher's response the guided samples start with
_SHOWN_PREFIX = 0.5
_SHOWN_REGIONS: dict[int, Literal["prefix", "continuation", "observation"]] = {
    Region.PREFIX: "prefix",
    Region.CONTINUATION: "continuation",
    Region.OBSERVATION: "observation",
}


def sample_answers(run: Run, sampler: Sampler, *, when: Literal["before", "after"], count: int) -> list[Sample]:
    """Sample answers to the first training prompts, token by token with region, gate and log ratio. Collective.

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
    shown = 0 if when == "before" else run.train.steps - 1  # the gate of the first step or of the last
    # a recording has no scores of new answers
    rewards = _rewards(run, prompts, rollouts)
    gates = _gate_by_sequence(run, rollouts, step=shown, rewards=rewards) if run.scores_new else {}
    return [
        _sample(run, prompts[number // (1 + guided)], rollout, gates.get(rollout.sequence_id), when=when)
        for number, rollout in enumerate(rollouts)
    ]


def training_samples(run: Run, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], *, step: int) -> list[Sample]:
    """Return answers to the first prompt that step ``step`` (from 1) learns from, as far as there are such: one of the
    student's own and one that is guided. Collective.

    They are scored once more, by themselves: a gate that goes by the entropies of a batch sees theirs alone.
    """
    own = run.rollout.samples_per_prompt
    per_prompt = len(rollouts) // len(prompts)
    shown = [rollouts[number] for number in dict.fromkeys((0, own)) if number < per_prompt]
    rewards = _rewards(run, prompts[:1], shown)
    gates = _gate_by_sequence(run, shown, step=step - 1, rewards=rewards) if run.scores_new else {}
    return [_sample(run, prompts[0], rollout, gates.get(rollout.sequence_id), when="during") for rollout in shown]


def _sample(run: Run, prompt: Prompt, rollout: Rollout, gate: np.ndarray | None, *, when: When) -> Sample:
    """Grade one rollout, where its prompt has an answer, and mark its tokens."""
    right = None
    if prompt.answer is not None:
        rule, allowed = partial(training_rule, run.data), run.evaluate.code_execution
        mark = correctness([rollout], [prompt], run.tokenizer, rule, allow_code=allowed)[0, 0]
        right = None if np.isnan(mark) else bool(mark)
    tokens = _sample_tokens(run, rollout, gate)
    return Sample(when=when, prompt=prompt.text, answer=prompt.answer, correct=right, tokens=tokens)


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
                trust=None if seen is None or region != Region.CONTINUATION else float(seen[0]),
                log_ratio=None if seen is None else float(seen[1]),
            )
        )
    return tuple(tokens)


def _rewards(run: Run, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> BatchRewards:
    """Reward the answers shown, where the gate looks at rewards. Collective."""
    return reward_batch(run, prompts, rollouts, step=None) if run.method.gate.needs.reward else BatchRewards()


def _gate_by_sequence(run: Run, rollouts: list[Rollout], *, step: int, rewards: BatchRewards) -> dict[int, np.ndarray]:
    """Compute, ``[response, 2]``, gate weight and log ratio of every token that carries loss, on every rank.

    ``step``: the training step whose gate is shown, as it would be with these rollouts for a batch.
    """
    packs = pack_rollouts(run, rollouts)
    groups = run.world.student
    mine = packs[groups.replica]
    scores = score_packs(
        run.student,
        mine,
        vocab_size=run.vocab_size,
        temperature=run.method.temperature,
        top_k=run.teacher_request.queries,
        end_ids=run.method.end_ids,
    )
    facts = BatchFacts(
        seed=run.seed,
        step=step,
        progress=step / run.train.steps,
        entropy_threshold=batch_entropy_threshold(scores, run.method, groups),
        rewards=rewards.rewards if run.method.needs.reward else None,
    )
    items = train_packs(
        mine,
        batch_weights(packs, run.method, facts, groups),
        run.teacher.score(packs, run.teacher_request, query_ids(scores)),
        scores,
        rollouts={rollout.sequence_id: rollout for rollout in rollouts},
        method=run.method,
        facts=facts,
        model=run.student,
    )
    found: dict[int, np.ndarray] = {}
    for item in items if groups.is_last_stage and not groups.tensor_rank else ():
        views = views_of(item)
        weight_N = run.method.gate_weight(*views)
        ratio_N = views.teacher.logprob_T - views.student.old_logprob_T
        values_N2 = torch.stack([weight_N, ratio_N], dim=1).float().cpu().numpy()
        found.update(_split_by_sequence(item.pack, groups, values_N2))
    gathered: list[dict[int, np.ndarray] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    return _joined([part for part in gathered if part])


def _split_by_sequence(item: Pack, groups: Groups, values_N2: np.ndarray) -> dict[int, np.ndarray]:
    """Split, ``[n, 3]``, by sequence: position of each prediction, then its two values."""
    valid = own_valid_positions(item, groups)
    owner_N = item.sequence_T[valid]
    rows_N3 = np.column_stack([item.position_T[valid], values_N2])
    return {int(sequence): rows_N3[owner_N == sequence] for sequence in item.sequence_ids}


def _joined(parts: list[dict[int, np.ndarray]]) -> dict[int, np.ndarray]:
    """Join each sequence (context-parallel ranks have parts of it) in the order of its tokens, without positions."""
    whole: dict[int, np.ndarray] = {}
    for sequence in sorted(set().union(*parts)):
        rows_N3 = np.concatenate([part[sequence] for part in parts if sequence in part])
        whole[sequence] = rows_N3[np.argsort(rows_N3[:, 0], kind="stable"), 1:]
    return whole
