"""Sampling with vLLM servers: the first rank sends the requests, every rank gets the answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.engine.decode import Continuation
from megatron_tropd.errors import ServingError
from megatron_tropd.parallel.arrays import broadcast_arrays
from megatron_tropd.rollout.dispatch import contexts_of, to_rollout
from megatron_tropd.rollout.engines.vllm import continuation_of
from megatron_tropd.types import Architecture, Float32Array, Int64Array, Rollout, RolloutRequest, SamplingParams
from megatron_tropd.vllm_bridge.client import Server, WeightSteps
from megatron_tropd.vllm_bridge.jobs import Job, JobBatch
from megatron_tropd.vllm_bridge.pool import Pool
from megatron_tropd.vllm_bridge.requests import Task, Written, derived_seed, is_plain
from megatron_tropd.weight_sync.publishers import Publisher

# how long other ranks wait at a time for word from the first: well below any collective's own limit
_WORD_S = 20.0
_WAITING, _DONE, _STARVED, _FAILED = 0, 1, 2, 3


@dataclass(frozen=True, slots=True)
class _Answer:
    """One sequence's continuation and the step whose weights wrote each of its tokens."""

    continuation: Continuation
    version_n: Int64Array


class ServerSampler:
    """Implement ``rollout.protocol.Sampler``. Random numbers are as in ``rollout.engines.vllm``."""

    def __init__(
        self,
        pool: Pool | None,
        publisher: Publisher,
        architecture: Architecture,
        *,
        max_tokens: int,
        timeout_s: float,
        vocab_size: int | None = None,
    ) -> None:
        """Take ``pool``: on the first rank, None elsewhere. ``max_tokens``: the longest sequence there will be.

        ``timeout_s``: for one answer. ``vocab_size``: ids that may be drawn (default: all).
        """
        self._pool = pool
        self._publisher = publisher
        self._max_tokens = min(max_tokens, architecture.max_positions)
        self._timeout_s = timeout_s
        self._forbidden = range(vocab_size or architecture.vocab_size, architecture.vocab_size)
        self._weights: Iterable[tuple[str, Tensor]] = ()
        self.version = 0

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        self._weights, self.version = tensors, version
        self._publisher.publish(tensors, version=version, keep=False)

    def generate(
        self, requests: Sequence[RolloutRequest], params: SamplingParams, *, seed: int, step: int
    ) -> list[Rollout]:
        return self.start(requests, params, seed=seed, step=step).collect()

    def start(self, requests: Sequence[RolloutRequest], params: SamplingParams, *, seed: int, step: int) -> _Handle:
        """Send the requests off; see ``rollout.protocol.AsyncSampler``."""
        contexts = contexts_of(requests, self._max_tokens)
        tasks = [
            Task(
                number=number,
                token_ids=context,
                max_new_tokens=request.max_new_tokens,
                seed=derived_seed(seed, step, request.sequence_id),
            )
            for number, (request, context) in enumerate(zip(requests, contexts, strict=True))
            if request.max_new_tokens > 0
        ]
        batch = None if self._pool is None else self._pool.submit([self._job(task, params) for task in tasks])
        return _Handle(self, requests, contexts, params, [task.number for task in tasks], batch)

    def probe(self, token_ids: Int64Array) -> dict[str, Float32Array]:
        """Return the ``[L - 1]`` log-prob of every token after the first, by every server; on the first rank."""
        if self._pool is None:
            return {}
        call = partial(Server.score, token_ids=token_ids, timeout_s=self._timeout_s)
        return {url: scores.logprob for url, scores in self._pool.on_every(call).items()}

    def close(self) -> None:
        """Leave the servers, which continue."""
        self._publisher.close()
        if self._pool is not None:
            self._pool.close()

    def _job(self, task: Task, params: SamplingParams) -> Job:
        call = partial(self._answer, task=task, params=params, oldest=self.version)
        return Job(call=call, cost=len(task.token_ids) / 8 + task.max_new_tokens)

    async def _answer(self, server: Server, task: Task, params: SamplingParams, oldest: int) -> _Answer:
        steps = WeightSteps(oldest=oldest, newest=lambda: self.version)
        written = await server.write(task, params, forbidden=self._forbidden, weights=steps, timeout_s=self._timeout_s)
        return _Answer(
            continuation_of(written, await self._model_logprob(server, task, written, params), params),
            written.version_n,
        )

    async def _model_logprob(
        self, server: Server, task: Task, written: Written, params: SamplingParams
    ) -> Float32Array:
        if is_plain(params):
            return written.logprob_n
        if not params.model_logprob:
            return np.full_like(written.logprob_n, np.nan)
        # drawn from another distribution than the model's own: what the model says of it is a question of its own
        whole = np.concatenate([task.token_ids, written.token_ids])
        scores = await server.score(whole, number=task.number, timeout_s=self._timeout_s)
        return scores.logprob[-len(written.token_ids) :]

    def collected(self, batch: JobBatch | None) -> list[_Answer]:
        """Return the answers of a batch, on every rank. Collective: servers without weights are sent them meanwhile.

        Raises:
            ServingError: on every rank, when there will be no answers.
        """
        while True:
            word = torch.tensor([_WAITING if batch is None else self._wait(batch)])
            dist.broadcast(word, src=0)
            if int(word) == _FAILED:
                raise ServingError(str(batch.error) if batch is not None else "the servers do not answer.")
            if int(word) == _DONE:
                return _everywhere([] if batch is None else batch.results())
            if int(word) == _STARVED:
                self._publisher.publish(self._weights, version=self.version, keep=True)

    def _wait(self, batch: JobBatch) -> int:
        assert self._pool is not None
        for _ in range(int(_WORD_S)):
            try:
                if batch.wait(1.0):
                    return _DONE
            except ServingError:
                return _FAILED
            if self._pool.starved:
                return _STARVED
        return _WAITING


@dataclass(frozen=True, slots=True)
class _Handle:
    """Implement ``rollout.protocol.GenerationHandle``."""

    sampler: ServerSampler
    requests: Sequence[RolloutRequest]
    contexts: Sequence[Int64Array]
    params: SamplingParams
    posed: Sequence[int]  # positions of the requests that servers have something to write for
    batch: JobBatch | None  # on the first rank

    @property
    def ended_at(self) -> float | None:
        return None if self.batch is None else self.batch.ended_at

    def collect(self) -> list[Rollout]:
        answers = dict(zip(self.posed, self.sampler.collected(self.batch), strict=True))
        return [
            to_rollout(
                request,
                context,
                answers[number].continuation if number in answers else None,
                self.params,
                version=int(answers[number].version_n[0]) if number in answers else self.sampler.version,
                token_versions=_if_mixed(answers[number].version_n) if number in answers else None,
            )
            for number, (request, context) in enumerate(zip(self.requests, self.contexts, strict=True))
        ]


def _if_mixed(version_n: Int64Array) -> Int64Array | None:
    return version_n if (version_n != version_n[0]).any() else None


def _everywhere(answers: Sequence[_Answer]) -> list[_Answer]:
    """Broadcast the first rank's answers: they are then on every rank."""
    parts = [a.continuation for a in answers]
    lengths = np.array([[len(c.token_ids), c.finished] for c in parts], dtype=np.int64).reshape(-1)
    ids, versions = _joined([c.token_ids for c in parts], np.int64), _joined([a.version_n for a in answers], np.int64)
    sampling = _joined([c.sampling_logprob for c in parts], np.float32)
    model = _joined([c.model_logprob for c in parts], np.float32)
    arrays = (lengths, ids, versions, sampling, model)
    lengths, *columns = broadcast_arrays(arrays, [array.dtype for array in arrays])
    rows = lengths.reshape(-1, 2)
    cuts = np.cumsum(rows[:, 0])[:-1]
    split = [np.split(column, cuts) if len(rows) else [] for column in columns]
    return [
        _Answer(Continuation(token_ids, sampled, modeled, bool(finished)), version_n)
        for (_, finished), token_ids, version_n, sampled, modeled in zip(rows, *split, strict=True)
    ]


def _joined(arrays: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype)
