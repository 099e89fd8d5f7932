"""The vocabulary-parallel losses with kernels doing the work: the answers of the plain path and of fp64.

Small sizes: without a GPU every row of every tile is interpreted.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tropd.losses.vocab_parallel import linear_divergence, linear_logprobs, linear_topk
from megatron_tropd.losses.vocab_parallel.backends.triton import kernels
from megatron_tropd.parallel.collectives import all_reduce_sum
from tests.ranks.test_losses_vocab_parallel import (
    KINDS,
    Problem,
    check_tail,
    divergence_inputs,
    expected_topk,
    grads_of,
    ids_of,
    on_ranks,
    plain_divergence,
    relative_error,
    textbook_logtail,
    world,
)

# a fixture: the switch is on for every test here
from tests.unit.losses.test_triton_kernels import kernels_on as kernels_on
from tests.unit.losses.test_triton_kernels import needs_triton

pytestmark = needs_triton
SMALL = {"tokens": 3, "vocab": 27, "hidden": 7, "teacher_hidden": 5}
ON_RANKS = pytest.mark.parametrize("world_size", [0, 2], ids="tp{}".format)


def without_kernels(function: Callable[[], Any]) -> Any:
    before = os.environ[kernels.SWITCH]
    os.environ[kernels.SWITCH] = "off"
    try:
        return function()
    finally:
        os.environ[kernels.SWITCH] = before


def logprobs_and_gradients(problem: Problem, ids_TK: Tensor, **options: Any) -> list[Tensor]:
    """Log-probs, entropy, logsumexp, (log tail,) hidden and weight gradient of this rank."""
    inputs = problem.learned(*problem.student())
    answer = linear_logprobs(*inputs, ids_TK, **problem.options(), **options)
    outputs = [answer.logprob_TK, answer.entropy_T, answer.logsumexp_T]
    outputs += [] if answer.logtail_T is None else [answer.logtail_T]
    incoming = [problem.draw(*x.shape, stream=10 + i) for i, x in enumerate(outputs)]
    return [*outputs, *grads_of(outputs, incoming, inputs)]


def agree(found: list[Tensor], expected: list[Tensor], *, limit: float) -> None:
    assert len(found) == len(expected)
    for number, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.dtype == b.dtype
        assert relative_error(a, b) < limit, f"result {number}: {relative_error(a, b):.1e}"


def check_logprobs() -> None:
    assert kernels.mode() == "interpret" or torch.cuda.is_available()
    for pattern, temperature in (("duplicates", 0.7), ("shard_starts", 0.7), ("all", 1.0)):
        problem = Problem(**SMALL, temperature=temperature, chunk_tokens=2)
        ids_TK = ids_of(problem, pattern)
        check_tail(problem, *problem.student(), ids_TK, name=pattern)  # fp64, with and without the tail
        found = logprobs_and_gradients(problem, ids_TK)
        agree(found, without_kernels(lambda p=problem, i=ids_TK: logprobs_and_gradients(p, i)), limit=3e-6)
    problem = Problem(**SMALL, dtype=torch.bfloat16, chunk_tokens=2)
    ids_TK = ids_of(problem, "duplicates")
    found = logprobs_and_gradients(problem, ids_TK, tail=True)
    expected = without_kernels(lambda: logprobs_and_gradients(problem, ids_TK, tail=True))
    agree(found[:4], expected[:4], limit=3e-6)
    # gradients are rounded to bfloat16 at the end
    agree(found[4:], expected[4:], limit=1e-3)


@ON_RANKS
def test_logprobs_tails_and_gradients_by_kernels_match_fp64_and_the_plain_path(world_size: int) -> None:
    on_ranks(check_logprobs, world_size=world_size)


def check_topk() -> None:
    for k, dtype in ((1, torch.float32), (4, torch.float32), (4, torch.bfloat16), (27, torch.float32)):
        problem = Problem(**SMALL, dtype=dtype, chunk_tokens=2, temperature=0.7)
        hidden, weight = problem.student()
        wanted_TJ = ids_of(problem, "duplicates")
        options = problem.options() | {"ids_TJ": wanted_TJ}
        inputs = hidden.to(dtype), problem.cut(weight)
        top = linear_topk(*inputs, k, **options)
        if dtype == torch.float32:
            assert torch.equal(top.ids_TK, expected_topk(hidden @ weight.t(), k))
        plain = without_kernels(lambda a=inputs, k=k, o=options: linear_topk(*a, k, **o))
        assert torch.equal(top.ids_TK, plain.ids_TK)
        assert top.picked_logprob_TJ is not None and plain.picked_logprob_TJ is not None
        found = [top.logprob_TK, top.entropy_T, top.picked_logprob_TJ]
        agree(found, [plain.logprob_TK, plain.entropy_T, plain.picked_logprob_TJ], limit=1e-6)
        # the same bits from either function: a teacher identical to the student gives a log ratio of exactly 0
        again = linear_logprobs(*inputs, wanted_TJ, **problem.options())
        assert torch.equal(top.picked_logprob_TJ, again.logprob_TK) and torch.equal(top.entropy_T, again.entropy_T)

        tailed = linear_topk(*inputs, k, **options, tail=True)
        assert torch.equal(tailed.ids_TK, plain.ids_TK) and tailed.logtail_T is not None
        if dtype == torch.float32:
            listed = torch.cat([top.ids_TK, wanted_TJ], dim=1)
            truth_T = textbook_logtail(hidden, weight, listed, problem.temperature)
            assert torch.equal(tailed.logtail_T.isneginf(), truth_T.isneginf())
            finite_T = ~truth_T.isneginf()
            assert finite_T.any() == (k < 27)
            agree([tailed.logtail_T[finite_T].double()], [truth_T[finite_T]], limit=1e-5)


@ON_RANKS
def test_topk_by_kernels_matches_a_full_sort_and_the_plain_path(world_size: int) -> None:
    on_ranks(check_topk, world_size=world_size)


def divergence_and_gradients(problem: Problem, kind: str, beta: float, **options: Any) -> list[Tensor]:
    mine, teacher = divergence_inputs(problem)
    loss_T = linear_divergence(*mine, *teacher, kind=kind, beta=beta, **problem.options(), **options)
    return [loss_T, *grads_of([loss_T], [problem.draw(problem.tokens, stream=10)], mine)]


def check_divergences() -> None:
    for kind, beta in KINDS[:3]:
        problem = Problem(**SMALL, chunk_tokens=2, temperature=0.7)
        found = divergence_and_gradients(problem, kind, beta)
        truth = plain_divergence(problem, kind, beta, torch.float64)
        whole = [found[0], all_reduce_sum(found[1].double(), world()), problem.uncut(found[2])]
        agree([x.double() for x in whole], truth, limit=1e-5)
        agree(found, without_kernels(lambda p=problem, k=kind, b=beta: divergence_and_gradients(p, k, b)), limit=5e-6)
        mine, _ = divergence_inputs(Problem(**SMALL, dtype=torch.bfloat16, chunk_tokens=2))
        loss_T = linear_divergence(*mine, *mine, kind=kind, beta=beta, **problem.options())
        grads = torch.autograd.grad(loss_T.sum(), mine)
        assert torch.all(loss_T == 0.0) and all(torch.all(g == 0.0) for g in grads), kind


@ON_RANKS
def test_divergences_by_kernels_match_fp64_and_the_plain_path_and_vanish_for_equal_models(world_size: int) -> None:
    on_ranks(check_divergences, world_size=world_size)


def test_expanded_gradients_and_strided_ids_reach_the_kernels_whole() -> None:
    problem = Problem(**SMALL, chunk_tokens=2)
    ids_TK = ids_of(problem, "duplicates").t().contiguous().t()

    def gradients() -> list[Tensor]:
        mine, teacher = divergence_inputs(problem)
        answer = linear_logprobs(*mine, ids_TK, **problem.options(), tail=True)
        assert answer.logtail_T is not None
        total = answer.logprob_TK.sum() + answer.entropy_T.sum() + answer.logtail_T.sum()  # each gradient has stride 0
        loss_T = linear_divergence(*mine, *teacher, kind="reverse_kl", **problem.options())
        top = linear_topk(*mine, 3, ids_TJ=ids_TK, **problem.options())
        assert top.picked_logprob_TJ is not None
        return [*torch.autograd.grad(total, mine), *torch.autograd.grad(loss_T.sum(), mine), top.picked_logprob_TJ]

    agree(gradients(), without_kernels(gradients), limit=5e-6)
