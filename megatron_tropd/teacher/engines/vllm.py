"""A teacher that vLLM runs: engines in the trainer's processes, or servers over HTTP.

Sequences are graded as prompts. vLLM tells the log-probs of their own tokens and of the likeliest ids, at temperature 1
over all ids of the teacher. Mass and entropy of the rest are then not known exactly: the tail's mass is what the listed
ids leave of 1, and of the entropy there is an upper bound. ``whole``: every id's log-prob is told instead, and all that
a method may ask of log-probs is exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_tropd.engine.context import carries_loss
from megatron_tropd.losses.support import entropy_at_most, first_of_each, log_tail
from megatron_tropd.parallel.groups import Groups
from megatron_tropd.teacher.protocol import TeacherRequest
from megatron_tropd.teacher.sharded import ShardedTeacher, check_finite, to_wire
from megatron_tropd.teacher.transfer import Key, ReplicaMap, Wire
from megatron_tropd.types import Pack, TeacherOutputs
from megatron_tropd.vllm_bridge.client import Server
from megatron_tropd.vllm_bridge.jobs import Batch, Job
from megatron_tropd.vllm_bridge.local_engine import LocalEngine
from megatron_tropd.vllm_bridge.pool import Pool
from megatron_tropd.vllm_bridge.requests import TeacherScores
from megatron_tropd.vllm_bridge.score_requests import ScoreRequest, Whole

_WORD_S = 1.0


class Grader(Protocol):
    """Whoever answers questions about sequences."""

    def answer(self, questions: Sequence[ScoreRequest]) -> list[TeacherScores]:
        """The answers, in the order of the questions. Collective over the ranks of one replica of the teacher."""
        ...

    def close(self) -> None:
        """Lets go of engine or servers."""
        ...


class LocalScorer:
    """An engine in this process, whose memory is the trainer's while nothing is graded."""

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine

    def answer(self, questions: Sequence[ScoreRequest]) -> list[TeacherScores]:
        answers = self._engine.answer(questions) if questions else []
        self._engine.sleep()
        return answers

    def close(self) -> None:
        self._engine.close()


class ServerScorer:
    """Servers that this rank asks by itself."""

    def __init__(self, pool: Pool, *, timeout_s: float) -> None:
        """``timeout_s``: for one answer."""
        self._pool = pool
        self._timeout_s = timeout_s

    def answer(self, questions: Sequence[ScoreRequest]) -> list[TeacherScores]:
        # the longest first, so that none is left for the end
        order = sorted(range(len(questions)), key=lambda n: (-questions[n].cost, n))
        batch = self._pool.submit([self._job(questions[number]) for number in order])
        _finish(batch)
        found = dict(zip(order, batch.results(), strict=True))
        return [found[number] for number in range(len(questions))]

    def close(self) -> None:
        self._pool.close()

    def _job(self, question: ScoreRequest) -> Job:
        call = partial(Server.answer, question=question, timeout_s=self._timeout_s)
        return Job(call=call, cost=question.cost)


def _finish(batch: Batch) -> None:
    # in short waits, between which a signal is noticed
    while not batch.wait(_WORD_S):
        pass


class VLLMTeacher(ShardedTeacher):
    """Implements ``teacher.protocol.Teacher``."""

    def __init__(
        self,
        grader: Grader,
        own: Groups,
        student: Groups,
        device: torch.device,
        *,
        vocab_size: int,
        temperature: float = 1.0,
        whole: bool = False,
    ) -> None:
        """``own``: which ranks make up a replica of the teacher; ``student``: the layout signals are delivered to.

        ``vocab_size``: ids that the softmax runs over; without ``whole`` all of the teacher's, at temperature 1.
        """
        super().__init__(ReplicaMap.local(own, round_robin=True), ReplicaMap.local(student, round_robin=False), device)
        self._grader = grader
        self._vocab_size = vocab_size
        self._temperature = temperature
        self._whole = whole

    def close(self) -> None:
        self._grader.close()

    def _score_assigned(
        self, packs: Sequence[Sequence[Pack]], spec: TeacherRequest, asked: Mapping[Key, Tensor]
    ) -> dict[Key, Wire]:
        keys = self._own.mine(packs)
        per_pack = [self._questions(packs[r][i], spec, asked.get((r, i))) for r, i in keys]
        numbered = [question for questions in per_pack for question in questions]
        answers = iter(self._grader.answer(numbered))
        wires: dict[Key, Wire] = {}
        for key, questions in zip(keys, per_pack, strict=True):
            signal = self._signal([(question, next(answers)) for question in questions], spec)
            check_finite(signal)
            wires[key] = to_wire(signal, spec)
        return wires

    def _questions(self, pack: Pack, spec: TeacherRequest, asked_NJ: Tensor | None) -> list[ScoreRequest]:
        """One about every sequence that carries loss. Its predictions that do are its last ones."""
        valid_T = carries_loss(pack)
        asked = np.empty((pack.num_valid, 0), np.int64) if asked_NJ is None else asked_NJ.cpu().numpy()
        questions: list[ScoreRequest] = []
        row = 0
        for start, end in zip(pack.cu_seqlens[:-1].tolist(), pack.cu_seqlens[1:].tolist(), strict=True):
            count = int(valid_T[start:end].sum())
            if not count:
                continue
            first = int(np.argmax(valid_T[start:end]))
            assert first + count == end - start - 1, "predictions that carry loss are the last ones of a sequence"
            whole = None
            if self._whole:
                ids_NJ = asked[row : row + count]
                whole = Whole(temperature=self._temperature, vocab_size=self._vocab_size, query_ids=ids_NJ)
            number = len(questions)
            tokens = pack.token_T[start:end]
            questions.append(ScoreRequest(number=number, token_ids=tokens, first=first, top_k=spec.top_k, whole=whole))
            row += count
        return questions

    def _signal(self, answered: Sequence[tuple[ScoreRequest, TeacherScores]], spec: TeacherRequest) -> TeacherOutputs:
        def column(name: str) -> Tensor:
            parts = [getattr(graded, name) for _, graded in answered]
            widths = {"topk_ids": spec.top_k, "topk_logprob": spec.top_k, "query_logprob": spec.queries}
            empty = np.empty((0, widths[name]) if name in widths else 0, np.float32)
            return torch.from_numpy(np.concatenate(parts) if parts else empty).to(self._device)

        logprob_N, ids_NK, topk_NK = column("logprob"), column("topk_ids").long(), column("topk_logprob")
        told = TeacherOutputs(
            logprob_N=logprob_N,
            topk_ids_NK=ids_NK if spec.top_k else None,
            topk_logprob_NK=topk_NK if spec.top_k else None,
        )
        if self._whole:
            return replace(
                told,
                query_logprob_NJ=column("query_logprob") if spec.queries else None,
                entropy_N=column("entropy") if spec.entropy else None,
                topk_logtail_N=column("logtail") if spec.has_tail else None,
            )
        targets = [question.token_ids[question.first + 1 :] for question, _ in answered]
        target_N = torch.from_numpy(np.concatenate([np.empty(0, np.int64), *targets])).to(self._device)
        listed_NK = torch.cat([logprob_N[:, None], topk_NK], dim=1)
        fresh_NK = first_of_each(torch.cat([target_N[:, None], ids_NK], dim=1))
        tail_N = log_tail(listed_NK, fresh_NK)
        bound_N = entropy_at_most(listed_NK, tail_N, fresh_NK, vocab_size=self._vocab_size)
        return replace(
            told,
            topk_logtail_N=tail_N.float() if spec.has_tail else None,
            entropy_bound_N=bound_N if spec.entropy_bound else None,
        )
