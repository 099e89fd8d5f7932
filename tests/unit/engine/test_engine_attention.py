"""Attention plans against one sequence at a time in fp64: values, gradients, packing."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.engine.attention import PackedPlan
from megatron_tropd.engine.context import ContextPlan, held_tokens
from megatron_tropd.errors import EngineError
from tests.support.distributed import run_on_ranks

CPU = torch.device("cpu")
HEADS, KEY_HEADS, DIM = 6, 2, 10
SCALE = 0.37  # not 1/sqrt(dim): it must be used as given


def textbook(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention of one sequence, ``[l, heads, d]`` each, head by head."""
    outputs = []
    for head in range(query.size(1)):
        of = head // (query.size(1) // key.size(1))
        scores = SCALE * query[:, head] @ key[:, of].T
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf)
        outputs.append(scores.softmax(-1) @ value[:, of])
    return torch.stack(outputs, dim=1)


def streams(tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Query, key and value of one stream, ``[T, 1, heads, d]``."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, 1, heads, DIM) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def one_by_one(qkv: list[Tensor], lengths: list[int]) -> Tensor:
    """Each sequence alone, in fp64: the truth a stream is compared with."""
    pieces = zip(*(x[:, 0].split(lengths) for x in qkv), strict=True)
    return torch.cat([textbook(*piece) for piece in pieces])


def truth_of(qkv: list[Tensor], lengths: list[int], weight: Tensor) -> tuple[Tensor, list[Tensor]]:
    exact = [x.detach().double().requires_grad_() for x in qkv]
    output = one_by_one(exact, lengths)
    return output, list(torch.autograd.grad((output * weight.double()).sum(), exact))


def cancelled(qkv: list[Tensor], lengths: list[int], weight: Tensor) -> list[Tensor]:
    """What the gradients of queries and keys are sums of, in fp64 with every term's absolute value.

    A query's is SCALE * sum_j P_j (dP_j - D) k_j, where dP_j = g.v_j and D = g.o are sums over the head's width that
    may cancel exactly; a key's is its mirror image.
    """
    per_query, per_key = [], []
    pieces = (x.split(lengths) for x in (*(x.detach()[:, 0].double() for x in qkv), weight.double()))
    for query, key, value, g in zip(*pieces, strict=True):
        key, value = (x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (key, value))
        scores = SCALE * torch.einsum("ihd,jhd->hij", query, key)
        probability = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -math.inf).softmax(-1)
        product = torch.einsum("ihd,jhd->hij", g.abs(), value.abs())
        terms = SCALE * probability * (product + (probability * product).sum(-1, keepdim=True))
        per_query.append(torch.einsum("hij,jhd->ihd", terms, key.abs()))
        per_key.append(torch.einsum("hij,ihd->jhd", terms, query.abs()))
    return [torch.cat(per_query), torch.cat(per_key)]


def boundaries(lengths: list[int]) -> np.ndarray:
    return np.cumsum([0, *lengths]).astype(np.int32)


LENGTHS = {
    "one sequence": [13],
    "one token": [1],
    "only single tokens": [1, 1, 1],
    "all alike": [5, 5, 5],
    "very different": [1, 31, 2, 17, 1, 9],
    "similar": [11, 8, 10, 9, 12],
    "on the edge of a group": [10, 7, 6, 10],
    "longest last": [1, 2, 3, 40],
}


def close(found: Tensor, truth: Tensor, relative: float) -> bool:
    return bool((found.double() - truth).norm() <= relative * truth.norm())


@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_packed_stream_is_its_sequences_one_by_one(lengths, dtype):
    qkv = streams(sum(lengths), dtype)
    weight = torch.randn(sum(lengths), HEADS, DIM, generator=torch.Generator().manual_seed(1))
    output = PackedPlan.build(boundaries(lengths), CPU).attend(1, *qkv, SCALE)
    gradients = torch.autograd.grad((output[:, 0] * weight).sum(), qkv)

    expected, expected_gradients = truth_of(qkv, lengths, weight)
    assert output.dtype == dtype and output.shape == qkv[0].shape
    limit = 1e-6 if dtype == torch.float32 else 1e-2  # bf16 has 8 bits: 2**-8 = 4e-3 per rounding
    assert close(output[:, 0], expected, limit)
    *of_scores, of_value = zip(gradients, expected_gradients, strict=True)
    assert close(*of_value, limit)
    for (found, truth), terms in zip(of_scores, cancelled(qkv, lengths, weight), strict=True):
        # a sequence of one token attends to itself alone: queries and keys then have no gradient at all, and what is
        # left is rounding of the two sums of DIM products that cancel, each rounding of either sign
        rounding = math.sqrt(DIM) * torch.finfo(dtype).eps / 2 * terms.norm()
        assert close(found, truth, limit) if truth.norm() > 0 else found.double().norm() <= rounding


def test_random_lengths_are_attended_one_by_one():
    rng = np.random.default_rng(0)
    for trial in range(25):
        lengths = rng.integers(1, 40, rng.integers(1, 12)).tolist()
        qkv = streams(sum(lengths), seed=trial)
        output = PackedPlan.build(boundaries(lengths), CPU).attend(1, *qkv, SCALE)
        assert close(output[:, 0], one_by_one([x.double() for x in qkv], lengths), 1e-6), lengths


def test_a_sequence_is_blind_to_its_neighbors_and_to_its_future():
    lengths = [4, 7, 1, 6]
    query, key, value = (x.detach() for x in streams(sum(lengths)))
    plan = PackedPlan.build(boundaries(lengths), CPU)
    before = plan.attend(1, query, key, value, SCALE)
    position = 4 + 5  # the sixth token of the second sequence
    key[position], value[position] = 1e3, -1e3
    after = plan.attend(1, query, key, value, SCALE)
    changed = (before != after).flatten(1).any(1).nonzero()[:, 0].tolist()
    assert changed == [position, position + 1]


def test_sequences_of_similar_length_share_one_call():
    """Otherwise a pack of many sequences would pay one call for each."""
    assert len(PackedPlan.build(boundaries([20, 19, 18, 17, 16, 15]), CPU).groups) == 1
    assert len(PackedPlan.build(boundaries([40, 4, 40, 4]), CPU).groups) == 2


def test_no_group_is_mostly_padding():
    rng = np.random.default_rng(3)
    for _ in range(20):
        plan = PackedPlan.build(boundaries(rng.integers(1, 500, 60).tolist()), CPU)
        assert all(group.real_NL.float().mean() > 0.7 for group in plan.groups)


# --------------------------------------------------------------------------- over context-parallel ranks

STREAMS = ([24], [5, 19], [1, 1, 1, 21], [13, 2, 4, 5], [7, 1, 3, 3, 8, 2], [6, 6, 6, 6])  # 24 tokens: 4 or 6 blocks


def attend_in_parts() -> list[list[tuple[Tensor, ...]]]:
    """On the ranks: this one's rows of the output and of the three gradients, for every stream."""
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    found = []
    for lengths in STREAMS:
        held = held_tokens(sum(lengths), rank=rank, ranks=ranks)
        qkv = [x.detach()[held].requires_grad_() for x in streams(sum(lengths))]
        weight = torch.randn(sum(lengths), HEADS, DIM, generator=torch.Generator().manual_seed(1))[held]
        output = ContextPlan.build(boundaries(lengths), group, CPU).attend(1, *qkv, SCALE)
        gradients = torch.autograd.grad((output[:, 0] * weight).sum(), qkv)
        found.append((output.detach(), *gradients))
    return found


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_attend_to_what_others_hold(ranks):
    parts = run_on_ranks(attend_in_parts, world_size=ranks)
    for number, lengths in enumerate(STREAMS):
        weight = torch.randn(sum(lengths), HEADS, DIM, generator=torch.Generator().manual_seed(1))
        expected, gradients = truth_of(streams(sum(lengths)), lengths, weight)
        for rank in range(ranks):
            held = held_tokens(sum(lengths), rank=rank, ranks=ranks)
            output, *found = parts[rank][number]
            assert close(output[:, 0], expected.detach()[held], 1e-6)
            for mine, truth in zip(found, gradients, strict=True):
                assert (mine.double() - truth[held]).norm() <= 1e-6 * truth.norm()


def test_every_token_is_held_once_and_the_causal_work_is_even():
    for ranks in (1, 2, 3, 4):
        held = [held_tokens(48, rank=rank, ranks=ranks) for rank in range(ranks)]
        assert sorted(np.concatenate(held).tolist()) == list(range(48))
        assert len({int((positions + 1).sum()) for positions in held}) == 1  # keys that a token sees


def test_a_stream_that_cannot_be_cut_evenly_is_refused():
    with pytest.raises(EngineError, match="a pack of 26 tokens does not divide into 4 blocks for 2 context-parallel"):
        held_tokens(26, rank=0, ranks=2)
