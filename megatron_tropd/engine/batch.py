"""Joins what is known of a batch: packs, rollouts, teacher signals, and the numbers that need the whole batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_tropd.data.random import Stream, uniforms
from megatron_tropd.engine.context import own_valid_positions
from megatron_tropd.engine.model import Model
from megatron_tropd.engine.step import TrainPack
from megatron_tropd.errors import DataError
from megatron_tropd.losses.reduce import special_token_keep, token_weights
from megatron_tropd.losses.support import first_of_each, tail_beside
from megatron_tropd.methods import Method
from megatron_tropd.parallel.groups import Groups
from megatron_tropd.types import Pack, Region, Rollout, TeacherOutputs, TokenView


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
    model_logprob_N: torch.Tensor  # at temperature 1, as the sampler reports it
    topk_ids_NK: torch.Tensor | None = None  # its most likely tokens, int64


def batch_weights(
    packs: Sequence[Sequence[Pack]], method: Method, facts: BatchFacts, groups: Groups
) -> list[np.ndarray]:
    """``[N]`` normalisation weights of this rank's packs, computed over all replicas' packs at once."""
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
    of_replicas = [[next(per_pack) for _ in replica] for replica in packs]
    mine = zip(of_replicas[groups.replica], packs[groups.replica], strict=True)
    return [weight_T[own_valid_positions(pack, groups)] for weight_T, pack in mine]


def token_view(pack: Pack, rollouts: Mapping[int, Rollout], facts: BatchFacts, model: Model) -> TokenView:
    """The facts about the valid predictions of a pack that this rank computes. ``rollouts`` by sequence id."""
    valid, device = own_valid_positions(pack, model.groups), model.device
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
        # the prediction of a continuation token stands one position before it
        written = start - 1 + np.flatnonzero(rollout.region_L == Region.CONTINUATION)
        if len(written) != len(rollout.model_logprob):
            raise DataError(
                f"sequence {sequence_id} has {len(written)} CONTINUATION tokens and {len(rollout.model_logprob)} "
                "log-probs of the sampler. Give one for each, nan where it is not known."
            )
        sampled[written] = rollout.model_logprob
    return uniform, sampled


def train_packs(
    packs: Sequence[Pack],
    weights: Sequence[np.ndarray],
    signals: Sequence[TeacherOutputs | None],
    scores: Sequence[StudentScores | None],
    *,
    rollouts: Mapping[int, Rollout],
    method: Method,
    facts: BatchFacts,
    model: Model,
) -> list[TrainPack]:
    """One rank's packs, ready for ``Trainer.step``."""
    return [
        _train_pack(*item, rollouts=rollouts, method=method, facts=facts, model=model)
        for item in zip(packs, weights, signals, scores, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Support:
    """The candidates of each token and the teacher's log-probs of them and of the rest; mask: False on duplicates."""

    ids_NK: torch.Tensor | None = None
    logprob_NK: torch.Tensor | None = None
    mask_NK: torch.Tensor | None = None
    logtail_N: torch.Tensor | None = None


def support_of(signal: TeacherOutputs | None, target_N: torch.Tensor, method: Method) -> Support:
    """The support that the method looks at, from what the teacher has told."""
    needs = method.needs
    if signal is None or not needs.top_k:
        return Support()
    parts = {
        "teacher": [(signal.topk_ids_NK, signal.topk_logprob_NK)],
        "student": [(signal.query_ids_NJ, signal.query_logprob_NJ)],
        "union": [(signal.topk_ids_NK, signal.topk_logprob_NK), (signal.query_ids_NJ, signal.query_logprob_NJ)],
        "teacher_and_sampled": [
            (signal.topk_ids_NK, signal.topk_logprob_NK),
            (target_N[:, None], signal.logprob_N[:, None]),
        ],
    }[needs.support]
    ids_NK = torch.cat([_given(ids) for ids, _ in parts], dim=1)
    logtail_N = None
    if needs.tail_mass:
        inside_N = (ids_NK == target_N[:, None]).any(-1)
        logtail_N = tail_beside(_given(signal.logtail_N), signal.logprob_N, inside_N)
    return Support(
        ids_NK=ids_NK,
        logprob_NK=torch.cat([_given(logprob) for _, logprob in parts], dim=1),
        mask_NK=first_of_each(ids_NK) if len(parts) > 1 else None,
        logtail_N=logtail_N,
    )


def _given(value: torch.Tensor | None) -> torch.Tensor:
    assert value is not None  # the teacher was asked for it: TeacherRequest.of
    return value


def _train_pack(
    pack: Pack,
    weight_N: np.ndarray,
    signal: TeacherOutputs | None,
    score: StudentScores | None,
    *,
    rollouts: Mapping[int, Rollout],
    method: Method,
    facts: BatchFacts,
    model: Model,
) -> TrainPack:
    old = None if score is None else score.logprob_N
    tokens = token_view(pack, rollouts, facts, model)
    support = support_of(signal, tokens.target_T, method)
    return TrainPack(
        pack=pack,
        tokens=tokens,
        weight_N=torch.from_numpy(weight_N).to(model.device),
        signal=signal,
        support_ids_NK=support.ids_NK,
        support_logprob_NK=support.logprob_NK,
        support_mask_NK=support.mask_NK,
        support_logtail_N=support.logtail_N,
        old_logprob_N=old,
        old_model_logprob_N=None if score is None else score.model_logprob_N,
        old_entropy_N=None if score is None else score.entropy_N,
    )
