"""Keeping products from the forward to the backward changes time and memory, and not one bit of the result."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_tropd.losses.vocab_parallel import linear_divergence, linear_logprobs
from megatron_tropd.losses.vocab_parallel.projection import Projection
from tests.ranks.test_losses_vocab_parallel import Problem, divergence_inputs, grads_of, ids_of, on_ranks
from tests.support.long import few

DTYPES = (torch.float32, torch.bfloat16)


def results(problem: Problem, loss: str, cache_bytes: int) -> list[Tensor]:
    mine, teacher = divergence_inputs(problem)
    if loss in ("logprobs", "tail"):
        ids_TK = ids_of(problem, "duplicates")
        tail = loss == "tail"
        answer = linear_logprobs(*mine, ids_TK, **problem.options(), tail=tail, cache_bytes=cache_bytes)
        outputs = [answer.logprob_TK, answer.entropy_T] + ([answer.logtail_T] if answer.logtail_T is not None else [])
    else:
        outputs = [linear_divergence(*mine, *teacher, kind=loss, **problem.options(), cache_bytes=cache_bytes)]
    incoming = [problem.draw(*x.shape, stream=10 + i) for i, x in enumerate(outputs)]
    first = torch.autograd.grad(outputs, mine, [g.to(o.dtype) for g, o in zip(incoming, outputs, strict=True)],
                                retain_graph=True)  # fmt: skip
    again = grads_of(outputs, incoming, mine)  # the kept tiles have survived the first backward
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    return [*outputs, *first]


def check_every_budget_gives_the_same_bits() -> None:
    for dtype in DTYPES:
        problem = Problem(dtype=dtype, chunk_tokens=3, temperature=0.7)
        whole = problem.tokens * problem.shard * 4  # logits are fp32 whatever the inputs are
        for loss in ("logprobs", "tail", "forward_kl", "reverse_kl", "jsd"):
            without = results(problem, loss, 0)
            for cache_bytes in (1, whole // 2, whole, 4 * whole):
                kept = results(problem, loss, cache_bytes)
                assert all(torch.equal(a, b) for a, b in zip(kept, without, strict=True)), (dtype, loss, cache_bytes)


@pytest.mark.parametrize("world_size", few([0, 2, 4], 0, 2), ids="tp{}".format)
def test_every_budget_gives_the_same_bits(world_size: int) -> None:
    on_ranks(check_every_budget_gives_the_same_bits, world_size=world_size)


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_the_budget_bounds_what_is_saved_and_a_whole_budget_spares_the_products(
    share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = Problem(chunk_tokens=3)
    mine, _ = divergence_inputs(problem)
    whole = problem.tokens * problem.vocab * 4
    saved: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        ids_TK = ids_of(problem, "random")
        answer = linear_logprobs(*mine, ids_TK, **problem.options(), cache_bytes=int(share * whole))
    rest = {x.data_ptr() for x in (*mine, ids_TK)}
    tiles = [x for x in saved if x.dim() == 2 and x.data_ptr() not in rest]
    held = sum(x.numel() * x.element_size() for x in tiles)
    assert held <= share * whole and (held > 0) == (share > 0) and (held == whole) == (share == 1)

    products = []
    multiply = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **options: products.append(1) or multiply(*args, **options))
    made: list[int] = []
    product = Projection.product

    def counted(self: Projection, tile: tuple[slice, slice]) -> Tensor:
        before = len(products)
        result = product(self, tile)
        made.append(len(products) - before)
        return result

    monkeypatch.setattr(Projection, "product", counted)
    answer.logprob_TK.sum().backward()
    assert sum(made) == len(made) - len(tiles)


def test_nothing_is_kept_where_no_gradient_is_wanted() -> None:
    problem = Problem(chunk_tokens=3)
    mine, _ = divergence_inputs(problem)
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
        frozen = [x.detach() for x in mine]
        linear_logprobs(*frozen, ids_of(problem, "random"), **problem.options(), cache_bytes=10**9)
    assert not sizes
