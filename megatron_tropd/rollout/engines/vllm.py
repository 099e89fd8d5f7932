"""Sampling with vLLM in the trainer's own processes: each replica of the sampler's layout is one engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_tropd.engine.decode import Continuation
from megatron_tropd.errors import ServingError
from megatron_tropd.parallel.groups import Groups
from megatron_tropd.rollout.dispatch import assigned_to, contexts_of, exchange, to_rollout
from megatron_tropd.types import Architecture, Float32Array, Int64Array, Rollout, RolloutRequest, SamplingParams
from megatron_tropd.vllm_bridge.local_engine import LocalEngine
from megatron_tropd.vllm_bridge.requests import Task, Written, derived_seed, is_plain


class VLLMSampler:
    """Implement ``rollout.protocol.Sampler``.

    A sequence's random numbers depend on its seed alone; what is drawn with them may differ where the engine's
    rounding, which depends on what else is in the batch, tips a draw that was close.
    """

    def __init__(
        self,
        model: str | Path,
        architecture: Architecture,
        groups: Groups,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_tokens: int,
        vocab_size: int | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Take ``model``: only its ``config.json`` is read. ``max_tokens``: the longest sequence there will be.

        ``vocab_size``: ids that may be drawn (default: all). ``options``: more arguments of ``vllm.LLM``.
        """
        self._architecture = architecture
        self._groups = groups
        self._max_tokens = min(max_tokens, architecture.max_positions)
        self._forbidden = range(vocab_size or architecture.vocab_size, architecture.vocab_size)
        self._engine = LocalEngine(
            model, groups, dtype=dtype, device=device, max_tokens=self._max_tokens, options=options or {}
        )
        self.version = 0

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        self._engine.load(tensors, version=version)
        self.version = version

    def generate(
        self, requests: Sequence[RolloutRequest], params: SamplingParams, *, seed: int, step: int
    ) -> list[Rollout]:
        contexts = contexts_of(requests, self._max_tokens)
        tasks = [
            Task(
                number=number,
                token_ids=context,
                max_new_tokens=request.max_new_tokens,
                seed=derived_seed(seed, step, request.sequence_id),
            )
            for number, (request, context) in enumerate(zip(requests, contexts, strict=True))
        ]
        mine = self._assigned(tasks, requests)
        done = dict(zip([task.number for task in mine], self._continue(mine, params), strict=True))
        everything = exchange(done, self._groups.pg.dp)
        self._engine.sleep()
        return [
            to_rollout(request, context, everything.get(number), params, version=self.version)
            for number, (request, context) in enumerate(zip(requests, contexts, strict=True))
        ]

    def probe(self, token_ids: Int64Array) -> dict[str, Float32Array]:
        """Return the ``[L - 1]`` log-prob of every token after the first, by this rank's engine."""
        return {f"replica {self._groups.replica}": self._engine.score([token_ids])[0].logprob}

    def close(self) -> None:
        """End this rank's engine."""
        self._engine.close()

    def _assigned(self, tasks: Sequence[Task], requests: Sequence[RolloutRequest]) -> list[Task]:
        """List this replica's tasks. Those of one prompt stay together: its cache serves them all."""
        together: dict[int, list[Task]] = {}
        for task, request in zip(tasks, requests, strict=True):
            if request.max_new_tokens > 0:
                together.setdefault(request.prompt_index, []).append(task)
        pieces = list(together.values())
        costs = [sum(len(task.token_ids) / 8 + task.max_new_tokens for task in piece) for piece in pieces]
        return sorted(
            (task for number in assigned_to(self._groups, costs) for task in pieces[number]),
            key=lambda task: task.number,
        )

    def _continue(self, tasks: Sequence[Task], params: SamplingParams) -> list[Continuation]:
        written = self._engine.write(tasks, params, forbidden=self._forbidden)
        stale = {int(version) for answer in written for version in answer.version_n} - {self.version}
        if stale:
            raise ServingError(f"vLLM wrote with weights of step {min(stale)}, not {self.version} as published.")
        if is_plain(params):
            return [continuation_of(answer, answer.logprob_n, params) for answer in written]
        if not params.model_logprob:
            return [continuation_of(answer, np.full_like(answer.logprob_n, np.nan), params) for answer in written]
        # drawn from another distribution than the model's own: what the model says of it is a question of its own
        wholes = [np.concatenate([t.token_ids, w.token_ids]) for t, w in zip(tasks, written, strict=True)]
        scored = self._engine.score(wholes)
        return [
            continuation_of(answer, scores.logprob[-len(answer.token_ids) :], params)
            for answer, scores in zip(written, scored, strict=True)
        ]


def continuation_of(written: Written, model_logprob: Float32Array, params: SamplingParams) -> Continuation:
    """Build a continuation with both log-probs; a greedy draw is certain under the distribution it was drawn from."""
    sampling = np.zeros_like(written.logprob_n) if params.temperature == 0 else written.logprob_n
    return Continuation(written.token_ids, sampling, model_logprob.astype(np.float32), written.finished)
