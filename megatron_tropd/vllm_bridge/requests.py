"""Requests to vLLM and its answers, for an engine in this process and for servers alike.

The dictionaries are keyword arguments of ``vllm.SamplingParams``, and JSON-able.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_tropd.errors import ServingError
from megatron_tropd.types import Float32Array, Int64Array, SamplingParams

# rounding may lift the log-prob of a certain token above 0
_ABOVE_ZERO = 1e-3
# and the mass of all ids above 1, in bf16 by more
_ABOVE_ONE = 2e-2
# added to a logit that must not be drawn: exp(-100) is nothing against any other, and vLLM allows no more
_FORBIDDEN = -100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One sequence to be continued."""

    number: int  # position in the batch, for messages and for putting answers in order
    token_ids: Int64Array  # [L] what is continued
    max_new_tokens: int  # >= 1
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """An engine's continuation of one task's tokens."""

    token_ids: Int64Array  # [n] the stop token included
    logprob_n: Float32Array  # under the distribution sampled from, nats
    version_n: Int64Array  # step whose weights wrote each token
    finished: bool  # a stop token ended it


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherScores:
    """An engine's scores of n tokens of one sequence, each given those before it, at temperature 1.

    The last three are there when the log-probs of all ids were looked at, at any temperature (``Whole``).
    """

    logprob: Float32Array  # [n] of the predicted tokens, nats
    topk_ids: Int64Array  # [n, K] likeliest first
    topk_logprob: Float32Array  # [n, K]
    query_logprob: Float32Array | None = None  # [n, J]
    entropy: Float32Array | None = None  # [n]
    logtail: Float32Array | None = None  # [n] log mass on all ids but the token, the top k and those requested


def derived_seed(seed: int, step: int, sequence_id: int) -> int:
    """Derive the seed of one sequence's draws: below 2^63, a function of the three alone."""
    words = np.random.SeedSequence([seed, step, sequence_id]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


def is_plain(params: SamplingParams) -> bool:
    """Say whether the distribution sampled from is the model's own."""
    return params.temperature == 1.0 and params.top_p == 1.0 and not params.top_k and not params.min_new_tokens


def sampling_options(params: SamplingParams, task: Task, *, forbidden: range) -> dict[str, Any]:
    """Build the options of sampling. ``forbidden``: ids that must not be drawn."""
    options: dict[str, Any] = {
        "max_tokens": task.max_new_tokens,
        "min_tokens": min(params.min_new_tokens, task.max_new_tokens),
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "seed": task.seed,
        "stop_token_ids": list(params.stop_token_ids),
        # only our stop tokens end a sequence, whatever the model's generation_config.json says
        "ignore_eos": True,
        "logprobs": 0,
        "detokenize": False,
    }
    if forbidden:
        options["logit_bias"] = dict.fromkeys(forbidden, _FORBIDDEN)
    return options


def scoring_options(top_k: int) -> dict[str, Any]:
    """Request the log-prob of every token of the prompt, and of its ``top_k`` likeliest alternatives."""
    # the one token that is sampled is thrown away: vLLM cannot sample none
    return {"max_tokens": 1, "temperature": 0.0, "ignore_eos": True, "prompt_logprobs": top_k, "detokenize": False}


def checked_written(written: Written, task: Task, params: SamplingParams) -> Written:
    """Return the same, when it can be what a working engine answers.

    Raises:
        ServingError: tokens or log-probs are missing, superfluous or impossible.
    """
    count = len(written.token_ids)
    stopped = count > 0 and int(written.token_ids[-1]) in params.stop_token_ids
    problems = {
        f"{count} tokens for a budget of 1 to {task.max_new_tokens}": 1 <= count <= task.max_new_tokens,
        f"tokens of type {written.token_ids.dtype}, not whole numbers": written.token_ids.dtype.kind in "iu",
        f"weight versions of type {written.version_n.dtype}": written.version_n.dtype.kind in "iu",
        f"{len(written.logprob_n)} log-probs for {count} tokens": len(written.logprob_n) == count,
        f"weight versions of {len(written.version_n)} of {count} tokens": len(written.version_n) == count,
        "log-probs that are not finite or above 0": possible(written.logprob_n),
        "a stop token that did not stop it": not np.isin(written.token_ids[:-1], params.stop_token_ids).any(),
        f"an end before its budget of {task.max_new_tokens} tokens": stopped or count == task.max_new_tokens,
        "a wrong word on whether a stop token ended it": written.finished == stopped,
    }
    _refuse(f"sequence {task.number}", [problem for problem, fine in problems.items() if not fine])
    return written


def checked_scores(scores: TeacherScores, number: int, rows: int, top_k: int) -> TeacherScores:
    """Return the same, when it can be what a working engine answers of so many predictions; ServingError otherwise."""
    shapes = (scores.logprob.shape, scores.topk_ids.shape, scores.topk_logprob.shape)
    wanted = ((rows,), (rows, top_k), (rows, top_k))
    problems = [f"arrays of shapes {shapes}, not {wanted}"] if shapes != wanted else []
    if not (possible(scores.logprob) and possible(scores.topk_logprob)):
        problems.append("log-probs that are not finite or above 0")
    if not problems and top_k:
        problems += _impossible_lists(scores.topk_ids, scores.topk_logprob)
    _refuse(f"sequence {number}", problems)
    return scores


def _impossible_lists(ids_NK: Int64Array, logprob_NK: Float32Array) -> list[str]:
    """Say what cannot be of lists of likeliest ids."""
    if ids_NK.dtype.kind not in "iu":
        return [f"ids of type {ids_NK.dtype}, not whole numbers"]
    sorted_NK = np.sort(ids_NK, axis=1)
    mass_N = np.exp(logprob_NK.astype(np.float64)).sum(1)
    problems = {
        "ids below 0": bool((ids_NK >= 0).all()),
        "an id listed twice": not (sorted_NK[:, 1:] == sorted_NK[:, :-1]).any(),
        f"ids that hold {mass_N.max(initial=0.0):.3g} of the mass": bool((mass_N <= 1.0 + _ABOVE_ONE).all()),
    }
    return [problem for problem, fine in problems.items() if not fine]


def possible(logprob: Float32Array) -> bool:
    """Say whether these can be log-probs."""
    return bool(np.isfinite(logprob).all() and (logprob <= _ABOVE_ZERO).all())


def _refuse(what: str, problems: Sequence[str]) -> None:
    if problems:
        raise ServingError(f"vLLM answered {what} with {'; '.join(problems)}.")


def versions_of(spans: Sequence[tuple[str, int, int]], count: int) -> Int64Array:
    """Return the weight version of each of ``count`` tokens from vLLM's spans ``(version, start, end)``.

    Raises:
        ServingError: a token has none, or one that no trainer stamped.
    """
    versions = np.full(count, -1, dtype=np.int64)
    for version, start, end in spans:
        if not version.isdecimal():
            raise ServingError(
                f"vLLM answers with the weights {version!r} it started with, not with weights of this run. "
                "It has restarted, or another program has set its weights."
            )
        versions[start:end] = int(version)
    if count and versions.min() < 0:
        raise ServingError("vLLM did not say with which weights it wrote its tokens. Use vLLM 0.32 or newer.")
    return versions
