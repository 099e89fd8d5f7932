"""Joins what is known of a batch: packs, rollouts, teacher signals, and the numbers that need the whole batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_tropd.data.random import Stream, uniforms
from megatron_tropd.engine.forward import valid_positions
from megatron_tropd.engine.step import TrainPack
from megatron_tropd.losses.reduce import special_token_keep, token_weights
from megatron_tropd.methods import Method
from megatron_tropd.types import Pack, Rollout, Signal, TokenView


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFacts:
    """What every rank knows of the step the batch belongs to."""

    seed: int
    step: int
    progress: float  # step / total steps
    special_token_ids: tuple[int, ...] = ()
    entropy_threshold: float = 0.0


@dataclass(frozen=True, slots=True)
class StudentScores:
    """What the student said of one pack at the weights of the rollout."""

    logprob_N: torch.Tensor
    entropy_N: torch.Tensor


def batch_weights(packs: Sequence[Sequence[Pack]], method: Method, facts: BatchFacts) -> list[list[np.ndarray]]:
    """``[N]`` normalisation weights of every pack, computed over all replicas' packs at once."""
    flat = [pack for replica in packs for pack in replica]
    region, sequence, target = (
        np.concatenate([getattr(pack, name) for pack in flat]) for name in ("region_T", "sequence_T", "target_T")
    )
    keep = None
    if method.settings.special_tokens != "keep":
        keep = special_token_keep(
            target,
            sequence,
            region,
            special_ids=facts.special_token_ids,
            first_only=method.settings.special_tokens == "mask_first",
        )
    weights = token_weights(region, sequence, normalization=method.normalization, keep_T=keep)
    ends = np.cumsum([len(pack.token_T) for pack in flat])[:-1]
    per_pack = iter(np.split(weights, ends))
    return [[next(per_pack)[valid_positions(pack)] for pack in replica] for replica in packs]


def token_view(pack: Pack, rollouts: Mapping[int, Rollout], facts: BatchFacts, device: torch.device) -> TokenView:
    """The facts about a pack's valid predictions. ``rollouts`` by sequence id."""
    valid = valid_positions(pack)
    uniform, sampled = _per_token(pack, rollouts, facts)
    return TokenView(
        region_T=torch.from_numpy(pack.region_T[valid].astype(np.int64)).to(device),
        uniform_T=torch.from_numpy(uniform[valid]).to(device),
        sequence_T=torch.from_numpy(pack.sequence_T[valid]).to(device),
        position_T=torch.from_numpy(pack.position_T[valid]).to(device),
        target_T=torch.from_numpy(pack.target_T[valid]).to(device),
        rollout_logprob_T=torch.from_numpy(sampled[valid]).to(device),
        entropy_threshold=facts.entropy_threshold,
        progress=facts.progress,
    )


def _per_token(pack: Pack, rollouts: Mapping[int, Rollout], facts: BatchFacts) -> tuple[np.ndarray, np.ndarray]:
    """``[T]`` gate uniforms and the sampler's log-probs (nan where it has none), aligned to predictions."""
    uniform = np.zeros(len(pack.token_T), dtype=np.float32)
    sampled = np.full(len(pack.token_T), np.nan, dtype=np.float32)
    for start, sequence_id in zip(pack.cu_seqlens[:-1].tolist(), pack.sequence_ids.tolist(), strict=False):
        rollout = rollouts[sequence_id]
        length = len(rollout.token_ids)
        drawn = uniforms(seed=facts.seed, step=facts.step, sequence_id=sequence_id, stream=Stream.GATE, count=length)
        uniform[start : start + length] = drawn
        # the prediction of continuation token i stands one position before it
        first = start + rollout.prompt_length + rollout.prefix_length - 1
        sampled[first : first + len(rollout.model_logprob)] = rollout.model_logprob
    return uniform, sampled


def train_packs(
    packs: Sequence[Pack],
    weights: Sequence[np.ndarray],
    signals: Sequence[Signal | None],
    scores: Sequence[StudentScores | None],
    *,
    rollouts: Mapping[int, Rollout],
    method: Method,
    facts: BatchFacts,
    device: torch.device,
) -> list[TrainPack]:
    """One replica's packs, ready for ``Trainer.step``."""
    return [
        _train_pack(*item, rollouts=rollouts, method=method, facts=facts, device=device)
        for item in zip(packs, weights, signals, scores, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Support:
    """The candidates of each token and the teacher's log-probs of them; the mask is False on duplicates."""

    ids_NK: torch.Tensor | None = None
    logprob_NK: torch.Tensor | None = None
    mask_NK: torch.Tensor | None = None


def _support(signal: Signal | None, target_N: torch.Tensor, method: Method) -> _Support:
    if signal is None or not method.needs.top_k:
        return _Support()
    ids, logprob = signal.topk_ids_NK, signal.topk_logprob_NK
    assert ids is not None and logprob is not None
    if method.needs.support != "teacher_and_sampled":
        return _Support(ids, logprob)
    fresh_N1 = (ids != target_N[:, None]).all(-1, keepdim=True)
    return _Support(
        torch.cat([ids, target_N[:, None]], dim=1),
        torch.cat([logprob, signal.logprob_N[:, None]], dim=1),
        torch.cat([torch.ones_like(ids, dtype=torch.bool), fresh_N1], dim=1),
    )


def _train_pack(
    pack: Pack,
    weight_N: np.ndarray,
    signal: Signal | None,
    score: StudentScores | None,
    *,
    rollouts: Mapping[int, Rollout],
    method: Method,
    facts: BatchFacts,
    device: torch.device,
) -> TrainPack:
    old = None if score is None else score.logprob_N
    tokens = token_view(pack, rollouts, facts, device)
    support = _support(signal, tokens.target_T, method)
    return TrainPack(
        pack=pack,
        tokens=tokens,
        weight_N=torch.from_numpy(weight_N).to(device),
        signal=signal,
        support_ids_NK=support.ids_NK,
        support_logprob_NK=support.logprob_NK,
        support_mask_NK=support.mask_NK,
        old_logprob_N=old,
        old_entropy_N=None if score is None else score.entropy_N,
    )
