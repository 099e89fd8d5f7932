"""The embedded sampler: a second copy of the model in the same processes, generating data-parallel.

Decoding over tensor-parallel ranks pays a collective per layer and token (1-2 ms each over gloo), so each rank holds
the whole model when it fits (``tensor=1``), and batches of sequences are dealt to ranks. Batches are cut by the
sequences' lengths alone, never by the number of ranks: every layout generates the same rollouts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_tropd.data.random import Stream, uniforms
from megatron_tropd.engine.decode import Continuation, decode_batch
from megatron_tropd.engine.model import Model, build_model
from megatron_tropd.engine.weights import load_stream
from megatron_tropd.errors import ConfigError
from megatron_tropd.parallel.arrays import all_gather_arrays
from megatron_tropd.parallel.groups import Groups
from megatron_tropd.types import Architecture, Rollout, RolloutRequest, SamplingParams


class MegatronSampler:
    """Implements ``rollout.sampler.Sampler``. Its layout must have one pipeline stage and no sequence parallelism."""

    def __init__(
        self,
        architecture: Architecture,
        groups: Groups,
        *,
        dtype: torch.dtype,
        device: torch.device,
        batch_size: int = 64,
        vocab_size: int | None = None,
    ) -> None:
        """``vocab_size``: ids that may be drawn (default: all). ``batch_size``: sequences decoded together."""
        self.model: Model = build_model(architecture, groups, dtype=dtype, device=device).freeze()
        self.batch_size = batch_size
        self._vocab_size = vocab_size or architecture.vocab_size
        self.version = 0

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        load_stream(self.model, tensors)
        self.version = version

    def generate(
        self, requests: Sequence[RolloutRequest], params: SamplingParams, *, seed: int, step: int
    ) -> list[Rollout]:
        contexts = [np.concatenate([request.prompt_ids, request.prefix_ids]) for request in requests]
        self._check_lengths(requests, contexts)
        writable = [i for i, request in enumerate(requests) if request.max_new_tokens > 0]
        batches = _cut_batches(writable, [len(context) for context in contexts], self.batch_size)
        mine = self._deal(batches, contexts, requests)
        done: dict[int, Continuation] = {}
        for batch in mine:
            budgets = [requests[i].max_new_tokens for i in batch]
            drawn = np.stack(
                [
                    uniforms(
                        seed=seed,
                        step=step,
                        sequence_id=requests[i].sequence_id,
                        stream=Stream.SAMPLING,
                        count=max(budgets),
                    )
                    for i in batch
                ]
            )
            continuations = decode_batch(
                self.model, [contexts[i] for i in batch], budgets, drawn, params, vocab_size=self._vocab_size
            )
            done.update(zip(batch, continuations, strict=True))
        everything = self._exchange(done)
        return [
            _rollout(request, context, everything.get(i), params, self.version)
            for i, (request, context) in enumerate(zip(requests, contexts, strict=True))
        ]

    def _check_lengths(self, requests: Sequence[RolloutRequest], contexts: Sequence[np.ndarray]) -> None:
        limit = self.model.architecture.max_positions
        for request, context in zip(requests, contexts, strict=True):
            if len(context) + request.max_new_tokens > limit:
                raise ConfigError(
                    f"prompt {request.prompt_index}: {len(context)} tokens of prompt and prefix plus "
                    f"{request.max_new_tokens} new ones exceed the model's {limit} positions. "
                    "Lower rollout.max_new_tokens or data.max_prompt_tokens."
                )

    def _deal(
        self, batches: list[list[int]], contexts: Sequence[np.ndarray], requests: Sequence[RolloutRequest]
    ) -> list[list[int]]:
        """This replica's batches: longest processing time first, each to the least loaded replica."""
        cost = [max(len(contexts[i]) / 8 + requests[i].max_new_tokens for i in batch) for batch in batches]
        loads = [0.0] * self.model.groups.num_replicas
        mine = []
        for number in sorted(range(len(batches)), key=lambda n: (-cost[n], n)):
            replica = min(range(len(loads)), key=lambda r: (loads[r], r))
            loads[replica] += cost[number]
            if replica == self.model.groups.replica:
                mine.append(batches[number])
        return mine

    def _exchange(self, done: dict[int, Continuation]) -> dict[int, Continuation]:
        """Every rank's continuations, on every rank."""
        order = sorted(done)
        header = np.array([[i, len(done[i].token_ids), done[i].finished] for i in order], dtype=np.int64)
        ids = np.concatenate([header.reshape(-1), *(done[i].token_ids for i in order)])
        logprobs = np.concatenate(
            [np.empty(0, np.float32)] + [x for i in order for x in (done[i].sampling_logprob, done[i].model_logprob)]
        )
        counts = all_gather_arrays(np.array([len(order)], dtype=np.int64), self.model.groups.pg.dp)
        all_ids = all_gather_arrays(ids, self.model.groups.pg.dp)
        all_logprobs = all_gather_arrays(logprobs, self.model.groups.pg.dp)
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


def _cut_batches(indices: list[int], lengths: list[int], batch_size: int) -> list[list[int]]:
    """Batches of sequences of similar context length, so that little of a batch is padding."""
    order = sorted(indices, key=lambda i: (lengths[i], i))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def _rollout(
    request: RolloutRequest,
    context: np.ndarray,
    continuation: Continuation | None,
    params: SamplingParams,
    version: int,
) -> Rollout:
    empty = np.empty(0, np.float32)
    if continuation is None:  # no budget: the prefix is the whole response
        finished = len(context) > 0 and int(context[-1]) in params.stop_token_ids
        continuation = Continuation(np.empty(0, np.int64), empty, empty, finished)
    return Rollout(
        sequence_id=request.sequence_id,
        prompt_index=request.prompt_index,
        token_ids=np.concatenate([context, continuation.token_ids]),
        prompt_length=len(request.prompt_ids),
        prefix_length=len(request.prefix_ids),
        sampling_logprob=continuation.sampling_logprob,
        model_logprob=continuation.model_logprob,
        finished=continuation.finished,
        weight_version=version,
    )
