"""Requests assigned to a sampler's replicas, and their continuations put together again on every rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch.distributed as dist

from megatron_tropd.engine.decode import Continuation
from megatron_tropd.errors import ConfigError
from megatron_tropd.parallel.arrays import all_gather_arrays
from megatron_tropd.parallel.groups import Groups
from megatron_tropd.types import Int64Array, Rollout, RolloutRequest, SamplingParams, single_turn


def contexts_of(requests: Sequence[RolloutRequest], max_positions: int) -> list[Int64Array]:
    """Return prompt and prefix of every request; ConfigError when one has no room for its continuation."""
    contexts = [np.concatenate([request.prompt_ids, request.prefix_ids]) for request in requests]
    for request, context in zip(requests, contexts, strict=True):
        if len(context) + request.max_new_tokens > max_positions:
            raise ConfigError(
                f"prompt {request.prompt_index}: {len(context)} tokens of prompt and prefix plus "
                f"{request.max_new_tokens} new ones exceed the model's {max_positions} positions. "
                "Lower rollout.max_new_tokens or data.max_prompt_tokens."
            )
    return contexts


def assigned_to(groups: Groups, costs: Sequence[float]) -> list[int]:
    """List, by number, the pieces of work of this replica: the costliest first, each to the least loaded replica."""
    loads = [0.0] * groups.num_replicas
    mine = []
    for number in sorted(range(len(costs)), key=lambda n: (-costs[n], n)):
        replica = min(range(len(loads)), key=lambda r: (loads[r], r))
        loads[replica] += costs[number]
        if replica == groups.replica:
            mine.append(number)
    return mine


def exchange(done: Mapping[int, Continuation], group: dist.ProcessGroup | None) -> dict[int, Continuation]:
    """Gather every rank's continuations on every rank."""
    order = sorted(done)
    header = np.array([[i, len(done[i].token_ids), done[i].finished] for i in order], dtype=np.int64)
    ids = np.concatenate([header.reshape(-1), *(done[i].token_ids for i in order)])
    logprobs = np.concatenate(
        [np.empty(0, np.float32)] + [x for i in order for x in (done[i].sampling_logprob, done[i].model_logprob)]
    )
    counts = all_gather_arrays(np.array([len(order)], dtype=np.int64), group)
    all_ids = all_gather_arrays(ids, group)
    all_logprobs = all_gather_arrays(logprobs, group)
    result: dict[int, Continuation] = {}
    for (count,), rank_ids, rank_logprobs in zip(counts, all_ids, all_logprobs, strict=True):
        result.update(_unflatten(int(count), rank_ids, rank_logprobs))
    return result


def _unflatten(count: int, ids: np.ndarray, logprobs: np.ndarray) -> dict[int, Continuation]:
    header = ids[: 3 * count].reshape(count, 3)
    at, found = 3 * count, {}
    for number, (i, length, finished) in enumerate(header.tolist()):
        start = 2 * int(header[:number, 1].sum())
        found[i] = Continuation(
            ids[at : at + length],
            logprobs[start : start + length],
            logprobs[start + length : start + 2 * length],
            bool(finished),
        )
        at += length
    return found


def to_rollout(
    request: RolloutRequest,
    context: Int64Array,
    continuation: Continuation | None,
    params: SamplingParams,
    *,
    version: int,
    token_versions: Int64Array | None = None,
) -> Rollout:
    """Build the finished sequence; without a continuation the prefix is the whole response."""
    if continuation is None:
        empty = np.empty(0, np.float32)
        finished = len(context) > 0 and int(context[-1]) in params.stop_token_ids
        continuation = Continuation(np.empty(0, np.int64), empty, empty, finished)
    return Rollout(
        sequence_id=request.sequence_id,
        prompt_index=request.prompt_index,
        token_ids=np.concatenate([context, continuation.token_ids]),
        region_L=single_turn(
            prompt=len(request.prompt_ids),
            prefix=len(request.prefix_ids),
            continuation=len(continuation.token_ids),
        ),
        sampling_logprob=continuation.sampling_logprob,
        model_logprob=continuation.model_logprob,
        finished=continuation.finished,
        weight_version=version,
        token_versions=token_versions,
    )


def versions_of(rollout: Rollout) -> Int64Array:
    """Return ``[continuation]`` the step whose weights wrote each token."""
    if rollout.token_versions is not None:
        return rollout.token_versions
    return np.full(len(rollout.model_logprob), rollout.weight_version, dtype=np.int64)
