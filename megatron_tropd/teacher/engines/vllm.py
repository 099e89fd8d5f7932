"""A teacher that vLLM runs: engines in the trainer's processes, or servers over HTTP.

Sequences are scored as prompts. vLLM reports the log-probs of their own tokens and of the likeliest ids, at temperature
1 over all ids of the teacher. Mass and entropy of the rest are then not known exactly: the tail's mass is what the
listed ids leave of 1, and of the entropy there is an upper bound. ``whole``: every id's log-prob is reported instead,
and all that a method may request of log-probs is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_tropd.engine.context import carries_loss
from megatron_tropd.losses.support import entropy_at_most, first_of_each, log_tail
from megatron_tropd.parallel.groups import Groups
from megatron_tropd.teacher.protocol import TeacherRequest
from megatron_tropd.teacher.schema import Field, check_finite, outputs_of, requested
from megatron_tropd.teacher.sharded import ShardedTeacher
from megatron_tropd.teacher.transfer import Key, ReplicaMap, Wire
from megatron_tropd.teacher.wire import to_wire
from megatron_tropd.types import Pack, TeacherOutputs
from megatron_tropd.vllm_bridge.client import Server
from megatron_tropd.vllm_bridge.jobs import Job, JobBatch
from megatron_tropd.vllm_bridge.local_engine import LocalEngine
from megatron_tropd.vllm_bridge.pool import Pool
from megatron_tropd.vllm_bridge.requests import TeacherScores
from megatron_tropd.vllm_bridge.score_requests import ScoreRequest, Whole

_WORD_S = 1.0


class Scorer(Protocol):
    """Answer score requests about sequences."""

    def answer(self, requests: Sequence[ScoreRequest]) -> list[TeacherScores]:
        """Answer in the order of the requests. Collective over the ranks of one replica of the teacher."""
        ...

    def close(self) -> None:
        """Release engine or servers."""
        ...


class LocalScorer:
    """Score with an engine in this process, whose memory is the trainer's while nothing is scored."""

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine

    def answer(self, requests: Sequence[ScoreRequest]) -> list[TeacherScores]:
        answers = self._engine.answer(requests) if requests else []
        self._engine.sleep()
        return answers

    def close(self) -> None:
        self._engine.close()


class ServerScorer:
    """Score with servers to which this rank sends requests by itself."""

    def __init__(self, pool: Pool, *, timeout_s: float) -> None:
        """Take ``timeout_s``: for one answer."""
        self._pool = pool
        self._timeout_s = timeout_s

    def answer(self, requests: Sequence[ScoreRequest]) -> list[TeacherScores]:
        # the longest first, so that none is left for the end
        order = sorted(range(len(requests)), key=lambda n: (-requests[n].cost, n))
        batch = self._pool.submit([self._job(requests[number]) for number in order])
        _finish(batch)
        found = dict(zip(order, batch.results(), strict=True))
        return [found[number] for number in range(len(requests))]

    def close(self) -> None:
        self._pool.close()

    def _job(self, request: ScoreRequest) -> Job:
        call = partial(Server.answer, request=request, timeout_s=self._timeout_s)
        return Job(call=call, cost=request.cost)


def _finish(batch: JobBatch) -> None:
    # in short waits, between which a signal is noticed
    while not batch.wait(_WORD_S):
        pass


class VLLMTeacher(ShardedTeacher):
    """Implement ``teacher.protocol.Teacher``."""

    def __init__(
        self,
        scorer: Scorer,
        own: Groups,
        student: Groups,
        device: torch.device,
        *,
        vocab_size: int,
        temperature: float = 1.0,
        whole: bool = False,
    ) -> None:
        """Take ``own``: the ranks of a replica of the teacher; ``student``: the layout outputs are delivered to.

        ``vocab_size``: ids that the softmax runs over; without ``whole`` all of the teacher's, at temperature 1.
        """
        super().__init__(ReplicaMap.local(own, round_robin=True), ReplicaMap.local(student, round_robin=False), device)
        self._scorer = scorer
        self._vocab_size = vocab_size
        self._temperature = temperature
        self._whole = whole

    def close(self) -> None:
        self._scorer.close()

    def _score_assigned(
        self, packs: Sequence[Sequence[Pack]], request: TeacherRequest, query_ids: Mapping[Key, Tensor]
    ) -> dict[Key, Wire]:
        keys = self._own.mine(packs)
        per_pack = [self._requests(packs[r][i].scored, request, query_ids.get((r, i))) for r, i in keys]
        answers = iter(self._scorer.answer([one for requests in per_pack for one in requests]))
        wires: dict[Key, Wire] = {}
        for key, requests in zip(keys, per_pack, strict=True):
            outputs = self._outputs([(one, next(answers)) for one in requests], request)
            check_finite(outputs)
            wires[key] = to_wire(outputs, request)
        return wires

    def _requests(self, pack: Pack, request: TeacherRequest, query_NJ: Tensor | None) -> list[ScoreRequest]:
        """Request the scores of every sequence with predictions that carry loss, and of those alone."""
        valid_T = carries_loss(pack)
        query_ids = np.empty((pack.num_valid, 0), np.int64) if query_NJ is None else query_NJ.cpu().numpy()
        ends_NX = np.broadcast_to(np.array(request.end_ids, np.int64), (pack.num_valid, len(request.end_ids)))
        query_ids = np.concatenate([query_ids, ends_NX], axis=1)  # answered together: see _column
        requests: list[ScoreRequest] = []
        row = 0
        for start, end in zip(pack.cu_seqlens[:-1].tolist(), pack.cu_seqlens[1:].tolist(), strict=True):
            read_n = np.flatnonzero(valid_T[start:end])
            if not len(read_n):
                continue
            whole = None
            if self._whole:
                ids_NJ = query_ids[row : row + len(read_n)]
                whole = Whole(temperature=self._temperature, vocab_size=self._vocab_size, query_ids=ids_NJ)
            requests.append(
                ScoreRequest(
                    number=len(requests),
                    token_ids=pack.token_T[start : start + int(read_n[-1]) + 2],  # what comes later plays no part
                    positions=read_n,
                    top_k=request.top_k,
                    whole=whole,
                )
            )
            row += len(read_n)
        return requests

    def _outputs(
        self, answered: Sequence[tuple[ScoreRequest, TeacherScores]], request: TeacherRequest
    ) -> TeacherOutputs:
        fields = requested(request, "teacher")
        if self._whole:
            return outputs_of({field.name: self._column(field, answered, request) for field in fields})
        found = {
            field.name: self._column(field, answered, request)
            for field in fields
            if field.name in ("logprob", "topk_ids", "topk_logprob")  # all that vLLM knows of a prompt
        }
        return outputs_of(found | self._bounds(found, answered, request))

    def _column(
        self, field: Field, answered: Sequence[tuple[ScoreRequest, TeacherScores]], request: TeacherRequest
    ) -> Tensor:
        if field.width in ("queries", "ends"):
            # one answer for both: the ids that the student names, then the ends of responses
            split = slice(request.queries) if field.width == "queries" else slice(request.queries, None)
            parts = [scores.query_logprob[:, split] for _, scores in answered if scores.query_logprob is not None]
        else:
            parts = [getattr(scores, field.name) for _, scores in answered]
        empty = np.empty(0 if field.width == 1 else (0, field.columns(request)), np.float32)
        value = torch.from_numpy(np.concatenate(parts) if parts else empty).to(self._device)
        return value.long() if field.is_id else value

    def _bounds(
        self,
        found: Mapping[str, Tensor],
        answered: Sequence[tuple[ScoreRequest, TeacherScores]],
        request: TeacherRequest,
    ) -> dict[str, Tensor]:
        """Derive what the listed ids leave of the mass, and how large the entropy can be then."""
        targets = [score_request.target_n for score_request, _ in answered]
        target_N1 = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *targets])).to(self._device)[:, None]
        logprob_N1 = found["logprob"][:, None]
        ids_NK = found.get("topk_ids", target_N1[:, :0])
        listed_NK = torch.cat([logprob_N1, found.get("topk_logprob", logprob_N1[:, :0])], dim=1)
        fresh_NK = first_of_each(torch.cat([target_N1, ids_NK], dim=1))
        tail_N = log_tail(listed_NK, fresh_NK)
        derived = {"logtail": tail_N.float()} if request.has_tail else {}
        if request.entropy_bound:
            derived["entropy_bound"] = entropy_at_most(listed_NK, tail_N, fresh_NK, vocab_size=self._vocab_size)
        return derived
