"""Join what is known of a batch: packs, rollouts, scores, and the numbers that need the whole batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from megatron_tropd.data.random import Stream, uniforms
from megatron_tropd.engine.context import own_predictions, own_valid_positions
from megatron_tropd.engine.model import Model
from megatron_tropd.engine.views import StudentScores, TrainPack, ends_as_one, support_of
from megatron_tropd.errors import DataError
from megatron_tropd.losses.reduce import entropy_threshold, special_token_keep, token_weights
from megatron_tropd.methods import Method
from megatron_tropd.parallel.arrays import all_gather_arrays
from megatron_tropd.parallel.groups import Groups
from megatron_tropd.types import Pack, Region, Rollout, TeacherOutputs, TokenView


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFacts:
    """The facts that every rank knows of the step the batch belongs to."""

    seed: int
    step: int
    progress: float  # step / total steps
    special_token_ids: tuple[int, ...] = ()
    entropy_threshold: float = 0.0
    rewards: Mapping[int, float] | None = None  # of the answers that have one, by sequence id; None: nobody asks
    advantages: Mapping[int, float] = field(default_factory=dict)  # the same over what they are measured against


def batch_weights(
    packs: Sequence[Sequence[Pack]], method: Method, facts: BatchFacts, groups: Groups
) -> list[np.ndarray]:
    """Return ``[N]`` normalization weights of this rank's packs, computed over all replicas' packs at once.

    An answer of which the gate wants a reward that it does not have counts neither as right nor as wrong: what the
    student wrote of it is in neither loss nor denominator.
    """
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
    if method.gate.needs.reward and facts.rewards is not None:
        rewarded = np.isin(sequence, np.array([*facts.rewards], dtype=np.int64)) | (region != Region.CONTINUATION)
        keep = rewarded if keep is None else keep & rewarded
    weights = token_weights(region, sequence, normalization=method.normalization, keep_T=keep)
    ends = np.cumsum([len(pack.token_T) for pack in flat])[:-1]
    per_pack = iter(np.split(weights, ends))
    of_replicas = [[next(per_pack) for _ in replica] for replica in packs]
    mine = zip(of_replicas[groups.replica], packs[groups.replica], strict=True)
    return [weight_T[own_valid_positions(pack, groups)] for weight_T, pack in mine]


def token_view(pack: Pack, rollouts: Mapping[int, Rollout], facts: BatchFacts, model: Model) -> TokenView:
    """Build the facts about the valid predictions of a pack that this rank computes. ``rollouts`` by sequence id."""
    predictions, device = own_predictions(pack, model.groups), model.device
    read_N = predictions.read_N
    uniform, sampled = _per_token(pack, rollouts, facts)
    wanted = facts.rewards is not None
    return TokenView(
        region_T=torch.from_numpy(pack.region_T[read_N].astype(np.int64)).to(device),
        uniform_T=torch.from_numpy(uniform[read_N]).to(device),
        sequence_T=torch.from_numpy(pack.sequence_T[read_N]).to(device),
        position_T=torch.from_numpy(pack.position_T[read_N]).to(device),
        target_T=torch.from_numpy(predictions.target_N).to(device),
        rollout_logprob_T=torch.from_numpy(sampled[read_N]).to(device),
        entropy_threshold=facts.entropy_threshold,
        progress=facts.progress,
        reward_T=_of_answers(facts.rewards, pack.sequence_T[read_N], device, otherwise=np.nan),
        advantage_T=_of_answers(facts.advantages if wanted else None, pack.sequence_T[read_N], device, otherwise=0.0),
    )


def _of_answers(
    values: Mapping[int, float] | None, sequence_N: np.ndarray, device: torch.device, *, otherwise: float
) -> torch.Tensor | None:
    """Give every token what its whole answer has, fp32; ``otherwise`` where it has none. None where nobody asks."""
    if values is None:
        return None
    ids, index_N = np.unique(sequence_N, return_inverse=True)
    each = np.array([values.get(int(i), otherwise) for i in ids], dtype=np.float32)
    return torch.from_numpy(each[index_N]).to(device)


def _per_token(pack: Pack, rollouts: Mapping[int, Rollout], facts: BatchFacts) -> tuple[np.ndarray, np.ndarray]:
    """Return ``[T]`` gate uniforms and the sampler's log-probs (nan where it has none), aligned to predictions."""
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
    outputs: Sequence[TeacherOutputs | None],
    scores: Sequence[StudentScores | None],
    *,
    rollouts: Mapping[int, Rollout],
    method: Method,
    facts: BatchFacts,
    model: Model,
) -> list[TrainPack]:
    """Make one rank's packs ready for ``Trainer.step``."""
    return [
        _train_pack(*item, rollouts=rollouts, method=method, facts=facts, model=model)
        for item in zip(packs, weights, outputs, scores, strict=True)
    ]


def _train_pack(
    pack: Pack,
    weight_N: np.ndarray,
    outputs: TeacherOutputs | None,
    score: StudentScores | None,
    *,
    rollouts: Mapping[int, Rollout],
    method: Method,
    facts: BatchFacts,
    model: Model,
) -> TrainPack:
    if (
        score is not None and method.temperature == 1.0 and not method.end_ids
    ):  # one tensor, so that nothing is added and taken off again
        score = replace(score, model_logprob_N=score.logprob_N)
    tokens = token_view(pack, rollouts, facts, model)
    return TrainPack(
        pack=pack,
        tokens=tokens,
        weight_N=torch.from_numpy(weight_N).to(model.device),
        outputs=ends_as_one(outputs, tokens.target_T, method.end_ids),
        support=support_of(outputs, tokens.target_T, method),
        old=score,
        end_ids=method.end_ids,
    )


def batch_entropy_threshold(scores: Sequence[StudentScores | None], method: Method, groups: Groups) -> float:
    """Find the student entropy above which the method's share of all tokens of a batch lies. Collective.

    ``scores``: of all of this rank's packs; 0 for methods that do not look at it.
    """
    share = method.needs.entropy_top
    if not share:
        return 0.0
    own = [score.entropy_N.cpu().numpy() for score in scores if score is not None]
    mine = np.concatenate([np.empty(0, np.float32), *own]).astype(np.float32)
    everyone = all_gather_arrays(mine, groups.pg.dp_cp)
    # only last stages have scores; the others receive them from theirs
    everyone = all_gather_arrays(np.concatenate(everyone), groups.pg.pp)
    return entropy_threshold(everyone[-1], fraction=share)
