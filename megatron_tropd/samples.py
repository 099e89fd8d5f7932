"""Sampled answers for the report, token by token with region, gate and log ratio."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
import torch.distributed as dist

from megatron_tropd import loop
from megatron_tropd.build import Run
from megatron_tropd.engine.batch import BatchFacts, token_view
from megatron_tropd.engine.score import score_packs
from megatron_tropd.evaluation import correctness
from megatron_tropd.report.records import Sample, SampleToken
from megatron_tropd.rollout.guidance import make_requests
from megatron_tropd.rollout.megatron import MegatronSampler
from megatron_tropd.teacher.recorded import RecordedTeacher
from megatron_tropd.types import Pack, Region, Rollout, Signal, StudentView, TeacherView

# how much of the teacher's response the guided samples start with
_SHOWN_PREFIX = 0.5


def sample_answers(run: Run, sampler: MegatronSampler, *, when: Literal["before", "after"], count: int) -> list[Sample]:
    """Answers to the first training prompts, token by token with region, gate and log ratio. Collective.

    Where the method is guided, each prompt has one answer of the student's own and one that continues the first half
    of the teacher's.
    """
    prompts = list(run.prompts.prompts[:count])
    guided = 1 if run.method.guided and run.config.rollout.guided_per_prompt else 0
    budget = run.config.rollout.max_new_tokens
    requests = make_requests(prompts, samples=1, guided=guided, fraction=_SHOWN_PREFIX, max_new_tokens=budget)
    params = loop.sampling_params(run)
    rollouts = sampler.generate(requests, params, seed=run.config.seed, step=run.config.train.steps)
    # a recording has no grades for new answers
    gates = {} if isinstance(run.teacher, RecordedTeacher) else _gate_by_sequence(run, rollouts)
    samples = []
    for number, rollout in enumerate(rollouts):
        prompt = prompts[number // (1 + guided)]
        right = None
        if prompt.answer is not None:
            right = bool(correctness([rollout], [prompt], run.tokenizer, run.config.data.grader, 1)[0, 0])
        tokens = _sample_tokens(run, rollout, gates.get(rollout.sequence_id))
        samples.append(Sample(when=when, prompt=prompt.text, answer=prompt.answer, correct=right, tokens=tokens))
    return samples


def _sample_tokens(run: Run, rollout: Rollout, gate: np.ndarray | None) -> tuple[SampleToken, ...]:
    pieces = run.tokenizer.tokens(rollout.token_ids[rollout.prompt_length :].tolist())
    tokens = []
    for i, piece in enumerate(pieces):
        prefix = i < rollout.prefix_length
        tokens.append(
            SampleToken(
                text=piece,
                region="prefix" if prefix else "continuation",
                trusted=None if prefix or gate is None else bool(gate[i, 0] > 0.5),
                log_ratio=None if gate is None else float(gate[i, 1]),
            )
        )
    return tuple(tokens)


def _gate_by_sequence(run: Run, rollouts: list[Rollout]) -> dict[int, np.ndarray]:
    """``[response, 2]`` gate weight and log ratio of every response token, on every rank."""
    packs = loop.pack_rollouts(run, rollouts)
    mine = packs[run.world.student.replica]
    signals = run.teacher.score(packs, run.signal)
    scores = score_packs(run.student, mine, vocab_size=run.vocab_size, temperature=run.method.temperature)
    by_id = {rollout.sequence_id: rollout for rollout in rollouts}
    facts = BatchFacts(seed=run.config.seed, step=run.config.train.steps, progress=1.0)
    found: dict[int, np.ndarray] = {}
    for item, signal, score in zip(mine, signals, scores, strict=True):
        if signal is None or score is None or run.world.student.tensor_rank:
            continue
        tokens = token_view(item, by_id, facts, run.world.device)
        student = StudentView(
            logprob_T=score.logprob_N,
            old_logprob_T=score.logprob_N,
            entropy_T=score.entropy_N,
            old_entropy_T=score.entropy_N,
        )
        teacher = _teacher_view(signal)
        weight = run.method.gate_weight(student, teacher, tokens)
        values = torch.stack([weight, signal.logprob_N - score.logprob_N], dim=1).float().cpu().numpy()
        found.update(_split_by_sequence(item, values))
    gathered: list[dict[int, np.ndarray] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, found)
    return {key: value for part in gathered if part for key, value in part.items()}


def _teacher_view(signal: Signal) -> TeacherView:
    return TeacherView(
        logprob_T=signal.logprob_N,
        support_ids_TK=signal.topk_ids_NK,
        support_logprob_TK=signal.topk_logprob_NK,
        entropy_T=signal.entropy_N,
    )


def _split_by_sequence(item: Pack, values_N2: np.ndarray) -> dict[int, np.ndarray]:
    valid = (item.region_T == Region.PREFIX) | (item.region_T == Region.CONTINUATION)
    owner_N = item.sequence_T[valid]
    return {int(sequence): values_N2[owner_N == sequence] for sequence in item.sequence_ids}
