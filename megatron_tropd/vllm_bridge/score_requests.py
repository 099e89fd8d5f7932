"""Requests for scores of the tokens of a sequence, and the answer made from vLLM's prompt log-probs.

vLLM reports the log-probs of a prompt's own tokens and of the likeliest ids before it, at temperature 1. What else a
method may want (other ids, another temperature, fewer ids in the softmax, the entropy) follows from the log-probs of
all ids, for vocabularies small enough to have them reported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_tropd.errors import ServingError
from megatron_tropd.types import Int64Array
from megatron_tropd.vllm_bridge.requests import TeacherScores, checked_scores

ALL = -1  # in place of a top k: every id


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """Request for an answer made from the log-probs of all ids."""

    temperature: float = 1.0
    vocab_size: int  # ids that the softmax runs over: the first so many
    query_ids: Int64Array  # [n, J] ids whose log-probs are wanted, per prediction


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreRequest:
    """About the tokens of one sequence of L, each given those before it."""

    number: int  # position in the batch, for messages
    token_ids: Int64Array  # [L]
    positions: Int64Array | None = None  # [n] ascending, of the tokens that make the predictions; None: all L - 1
    top_k: int = 0
    whole: Whole | None = None

    @property
    def read_n(self) -> Int64Array:
        """Return where the n predictions that are wanted are made: position t predicts token t + 1."""
        return np.arange(max(len(self.token_ids) - 1, 0)) if self.positions is None else self.positions

    @property
    def target_n(self) -> Int64Array:
        """Return the ids that they are of."""
        return self.token_ids[self.read_n + 1]

    @property
    def columns(self) -> int:
        """Return what is requested of vLLM besides every token's own log-prob."""
        return self.top_k if self.whole is None else ALL

    @property
    def cost(self) -> int:
        """Return the number of tokens that are read to answer it."""
        return len(self.token_ids)

    def as_json(self) -> dict[str, Any]:
        """Write the request for a server; ``of_json`` reads it."""
        request: dict[str, Any] = {"token_ids": self.token_ids.tolist(), "top_k": self.top_k}
        if self.positions is not None:
            request["positions"] = self.positions.tolist()
        if self.whole is not None:
            whole = self.whole
            request["whole"] = {"temperature": whole.temperature, "vocab_size": whole.vocab_size}
            request["whole"]["query_ids"] = whole.query_ids.tolist()
        return request

    @staticmethod
    def of_json(request: Mapping[str, Any]) -> ScoreRequest:
        """Read a request; KeyError, TypeError or ValueError for anything else."""
        if "first" in request:
            raise ValueError("it is of an older version of megatron_tropd: use the same one on both sides")
        token_ids = np.asarray(request["token_ids"], dtype=np.int64)
        bare = ScoreRequest(
            number=0,
            token_ids=token_ids,
            positions=_positions(request.get("positions"), len(token_ids)),
            top_k=int(request["top_k"]),
        )
        whole = request.get("whole")
        if whole is None:
            return bare
        rows = len(bare.read_n)
        ids_NJ = np.asarray(whole["query_ids"], dtype=np.int64).reshape(rows, -1 if rows else 0)
        temperature, vocab_size = float(whole["temperature"]), int(whole["vocab_size"])
        return replace(bare, whole=Whole(temperature=temperature, vocab_size=vocab_size, query_ids=ids_NJ))


def _positions(listed: Any, length: int) -> Int64Array | None:
    if listed is None:
        return None
    read_n = np.asarray(listed)
    if read_n.ndim != 1 or (len(read_n) and read_n.dtype.kind != "i"):
        raise TypeError("positions must be integers")
    read_n = read_n.astype(np.int64)
    if (np.diff(read_n, prepend=-1, append=length - 1) <= 0).any():
        raise ValueError(f"positions must ascend and lie in 0 to {length - 2}")
    return read_n


def answer_of(request: ScoreRequest, token_ids: Any, logprobs: Any) -> TeacherScores:
    """Make the answer from vLLM's flat prompt log-probs: of every token after the first, its own and then the others'.

    Those of predictions that are not wanted are left out.

    Raises:
        ServingError: they cannot be right.
    """
    rows = len(request.token_ids) - 1
    ids, logprob = np.asarray(token_ids, dtype=np.int64), np.asarray(logprobs, dtype=np.float32)
    if not rows or len(ids) % rows or len(ids) != len(logprob):
        raise ServingError(
            f"vLLM answered sequence {request.number} with {len(ids)} ids and {len(logprob)} log-probs for {rows} "
            "tokens."
        )
    ids, logprob = ids.reshape(rows, -1)[request.read_n], logprob.reshape(rows, -1)[request.read_n]
    if request.whole is not None:
        return _from_all(request, request.whole, ids[:, 1:], logprob[:, 1:])
    return TeacherScores(logprob=logprob[:, 0], topk_ids=ids[:, 1:], topk_logprob=logprob[:, 1:])


def _from_all(request: ScoreRequest, whole: Whole, ids_NV: np.ndarray, logprob_NV: np.ndarray) -> TeacherScores:
    """Compute everything that can be requested, from the log-probs of all ids."""
    vocab_size, k = whole.vocab_size, request.top_k
    if ids_NV.shape[1] < vocab_size:
        raise ServingError(
            f"vLLM answered sequence {request.number} with {ids_NV.shape[1]} ids, not with all {vocab_size}."
        )
    logp_NV = np.full(ids_NV.shape, -np.inf)
    np.put_along_axis(logp_NV, ids_NV, logprob_NV.astype(np.float64), axis=1)
    logp_NV = logp_NV[:, :vocab_size] / whole.temperature
    logp_NV -= _logsumexp(logp_NV)[:, None]
    target_N1 = request.target_n[:, None]
    top_NK = np.argsort(-logp_NV, axis=1, kind="stable")[:, :k]
    probability_NV = np.exp(logp_NV)
    entropy_N = -np.where(probability_NV > 0, probability_NV * logp_NV, 0.0).sum(1)
    rest_NV = logp_NV.copy()
    np.put_along_axis(rest_NV, np.concatenate([target_N1, top_NK, whole.query_ids], axis=1), -np.inf, axis=1)
    return TeacherScores(
        logprob=np.take_along_axis(logp_NV, target_N1, axis=1)[:, 0].astype(np.float32),
        topk_ids=top_NK.astype(np.int64),
        topk_logprob=np.take_along_axis(logp_NV, top_NK, axis=1).astype(np.float32),
        query_logprob=np.take_along_axis(logp_NV, whole.query_ids, axis=1).astype(np.float32),
        entropy=entropy_N.astype(np.float32),
        logtail=_logsumexp(rest_NV).astype(np.float32),
    )


def _logsumexp(values_NV: np.ndarray) -> np.ndarray:
    """Reduce the last axis; -inf where there is nothing."""
    with np.errstate(divide="ignore"):
        largest_N = values_NV.max(axis=1, initial=-np.inf)
        shift_N = np.where(np.isfinite(largest_N), largest_N, 0.0)
        return np.log(np.exp(values_NV - shift_N[:, None]).sum(1)) + shift_N


def checked_answer(scores: TeacherScores, request: ScoreRequest) -> TeacherScores:
    """Return the same, when it can be what a working engine answers; ServingError otherwise."""
    rows = len(request.read_n)
    checked_scores(scores, request.number, rows, request.top_k)
    if request.whole is None:
        return scores
    wanted = ((rows, request.whole.query_ids.shape[1]), (rows,), (rows,))
    others = (scores.query_logprob, scores.entropy, scores.logtail)
    if any(found is None or found.shape != shape for found, shape in zip(others, wanted, strict=True)):
        raise ServingError(f"vLLM answered sequence {request.number} without all that was requested.")
    return scores


def in_batches(requests: Sequence[ScoreRequest], *, vocab_size: int, most_values: int) -> list[list[ScoreRequest]]:
    """Group consecutive requests whose answers hold at most ``most_values`` log-probs, where no single one holds
    more.
    """
    batches: list[list[ScoreRequest]] = []
    room = 0
    for request in requests:
        values = request.cost * (1 + (vocab_size if request.whole is not None else request.top_k))
        if not batches or values > room:
            batches.append([])
            room = most_values
        batches[-1].append(request)
        room -= values
    return batches
