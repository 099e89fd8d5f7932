"""The embedded sampler: a second copy of the model in the same processes, generating data-parallel.

Decoding over tensor-parallel ranks pays a collective per layer and token (1-2 ms each over gloo), so each rank holds
the whole model when it fits (``tensor=1``), and batches of sequences are assigned to ranks. Batches are cut by the
sequences' lengths alone, never by the number of ranks: every layout generates the same rollouts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from megatron_tropd.data.random import Stream, uniforms
from megatron_tropd.engine.decode import Continuation, decode_batch
from megatron_tropd.engine.model import Model, build_model
from megatron_tropd.engine.weights import load_stream
from megatron_tropd.parallel.groups import Groups
from megatron_tropd.progress.phases import Phase
from megatron_tropd.rollout.dispatch import assigned_to, contexts_of, exchange, to_rollout
from megatron_tropd.types import Architecture, Float32Array, Rollout, RolloutRequest, SamplingParams


class MegatronSampler:
    """Implement ``rollout.protocol.Sampler``. Its layout must have one pipeline stage and no sequence parallelism."""

    def __init__(
        self,
        architecture: Architecture,
        groups: Groups,
        *,
        dtype: torch.dtype,
        device: torch.device,
        batch_size: int,
        vocab_size: int | None = None,
    ) -> None:
        """Take ``vocab_size``: ids that may be drawn (default: all). ``batch_size``: sequences decoded together."""
        self.model: Model = build_model(architecture, groups, dtype=dtype, device=device, initialize=False).freeze()
        self.batch_size = batch_size
        self._vocab_size = vocab_size or architecture.vocab_size
        self.version = 0

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        load_stream(self.model, tensors)
        self.version = version

    def close(self) -> None:
        """Release nothing: there is nothing to release."""

    def generate(
        self, requests: Sequence[RolloutRequest], params: SamplingParams, *, seed: int, step: int
    ) -> list[Rollout]:
        contexts = contexts_of(requests, self.model.architecture.max_positions)
        writable = [i for i, request in enumerate(requests) if request.max_new_tokens > 0]
        batches = _cut_batches(writable, [len(context) for context in contexts], self.batch_size)
        costs = [max(len(contexts[i]) / 8 + requests[i].max_new_tokens for i in batch) for batch in batches]
        mine = [batches[number] for number in assigned_to(self.model.groups, costs)]
        done: dict[int, Continuation] = {}
        with Phase("sampled", total=sum(map(len, mine))) as phase:
            work = sum(requests[i].max_new_tokens for batch in mine for i in batch)  # tokens, at most
            written = 0
            for batch in mine:
                budgets = [requests[i].max_new_tokens for i in batch]
                on_token = partial(_count, phase, before=(len(done), written), budgets=budgets, work=work)
                own = [requests[i] for i in batch]
                drawn = np.stack([_uniforms(one, max(budgets), seed=seed, step=step) for one in own])
                continuations = decode_batch(
                    self.model,
                    [contexts[i] for i in batch],
                    budgets,
                    drawn,
                    params,
                    vocab_size=self._vocab_size,
                    on_token=on_token,
                )
                done.update(zip(batch, continuations, strict=True))
                written += sum(budgets)
        everything = exchange(done, self.model.groups.pg.dp)
        return [
            to_rollout(request, context, everything.get(i), params, version=self.version)
            for i, (request, context) in enumerate(zip(requests, contexts, strict=True))
        ]


def _uniforms(request: RolloutRequest, count: int, *, seed: int, step: int) -> Float32Array:
    return uniforms(seed=seed, step=step, sequence_id=request.sequence_id, stream=Stream.SAMPLING, count=count)


def _count(phase: Phase, count: int, alive: int, *, before: tuple[int, int], budgets: Sequence[int], work: int) -> None:
    """Tell a phase of rows that are finished, and of the tokens there may be at most, how many are written."""
    rows, tokens = before
    phase.reach(rows + len(budgets) - alive, share=(tokens + sum(budgets) * count / max(budgets)) / work)


def _cut_batches(indices: list[int], lengths: list[int], batch_size: int) -> list[list[int]]:
    """Cut as few batches as there can be, equally large, of sequences of similar context length: little is padding."""
    order = sorted(indices, key=lambda i: (lengths[i], i))
    count = -(-len(order) // batch_size)
    return [[order[i] for i in part.tolist()] for part in np.array_split(np.arange(len(order)), count)] if count else []
