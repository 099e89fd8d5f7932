"""Attention over the rows of a forest against one sequence at a time in fp64: values, gradients, who sees whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_tropd.data.packing import pack
from megatron_tropd.engine import forest as forest_module
from megatron_tropd.engine import varlen
from megatron_tropd.engine.context import held_tokens
from megatron_tropd.engine.forest import ForestPlan
from megatron_tropd.engine.rows import gather_rows, is_forest, row_inputs
from megatron_tropd.types import Pack, Rollout, single_turn
from tests.support.distributed import run_on_ranks
from tests.unit.engine.test_engine_attention import HEADS, SCALE, close, one_by_one, streams

CPU = torch.device("cpu")
A, B = (5, 6, 7, 8, 9, 5), (5, 6, 3)
FORESTS: dict[str, list[tuple[int, ...]]] = {
    "a group": [(*A, 1), (*A, 2, 2, 2), (*A, 3, 4)],
    "a group of one and a pair": [(8, 8, 8), (*A, 1, 1), (*A, 2)],
    "equal answers": [(*A, 1, 2), (*A, 1, 2), (*A, 1, 2), (*A, 4)],
    "answers that begin one another": [A, (*A, 1), (*A, 1, 2), (*A, 1, 2, 3, 4, 5)],
    "two prompts under one system": [(*A, 1, 2), (*A, 1, 3, 3), (*B, 1), (*B, 4, 4, 4, 4), B],
    "only the first token": [(5, 1, 2, 3), (5, 2), (5, 3, 3)],
    "a long path and short ends": [(*range(30, 60), 1), (*range(30, 60), 2), (*range(30, 60), *range(17))],
}


def rollout(number: int, tokens: Sequence[int]) -> Rollout:
    empty = np.empty(0, np.float32)
    return Rollout(
        sequence_id=number,
        prompt_index=0,
        token_ids=np.array(tokens),
        region_L=single_turn(prompt=1, prefix=len(tokens) - 1),
        sampling_logprob=empty,
        model_logprob=empty,
        finished=True,
    )


def forest(name: str, multiple_of: int = 1) -> Pack:
    packed = _packed(name, multiple_of)
    assert is_forest(packed)
    return packed


def _packed(name: str, multiple_of: int) -> Pack:
    sequences = [rollout(i, tokens) for i, tokens in enumerate(FORESTS[name])]
    [[packed]] = pack(sequences, max_tokens=640, multiple_of=multiple_of, share_prefixes=True)
    return packed


def sequences_of(packed: Pack) -> tuple[list[int], Tensor]:
    """Lengths, and the row of every token that is not padding."""
    assert packed.row_T is not None
    tokens = int(packed.cu_seqlens[len(packed.sequence_ids)])
    lengths = np.diff(packed.cu_seqlens)[: len(packed.sequence_ids)].tolist()
    return lengths, torch.from_numpy(packed.row_T[:tokens])


def truth_of(packed: Pack, qkv: list[Tensor], weight: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Outputs and gradients of the rows in fp64, each sequence by itself. ``weight`` ``[R, heads, d]``: of one copy."""
    exact = [x.detach().double().requires_grad_() for x in qkv]
    lengths, row_N = sequences_of(packed)
    output = one_by_one([x[row_N] for x in exact], lengths)
    first = torch.from_numpy(np.unique(row_N.numpy(), return_index=True)[1])
    rows = output[first]
    return rows, list(torch.autograd.grad((rows * weight[: len(rows)].double()).sum(), exact))


def plan_of(packed: Pack) -> ForestPlan:
    return ForestPlan.build(packed, np.zeros(packed.num_rows, np.int64), None, CPU)


@pytest.mark.parametrize("name", FORESTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
def test_rows_attend_along_their_paths_as_each_sequence_by_itself(name, dtype):
    packed = forest(name)
    qkv = streams(packed.num_rows, dtype)
    weight = torch.randn(packed.num_rows, HEADS, qkv[0].size(-1), generator=torch.Generator().manual_seed(1))
    output = plan_of(packed).attend(1, *qkv, SCALE)
    gradients = torch.autograd.grad((output[:, 0] * weight).sum(), qkv)

    expected, expected_gradients = truth_of(packed, qkv, weight)
    limit = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1.2e-2}[dtype]
    assert output.dtype == dtype and output.shape == qkv[0].shape
    assert close(output[:, 0], expected.detach(), limit)
    for found, truth in zip(gradients, expected_gradients, strict=True):
        assert close(found, truth, limit)


def test_a_path_is_blind_to_its_siblings_and_to_its_future():
    packed = forest("two prompts under one system")
    assert packed.row_T is not None
    query, key, value = (x.detach() for x in streams(packed.num_rows))
    before = plan_of(packed).attend(1, query, key, value, SCALE)
    lengths, row_N = sequences_of(packed)
    paths = [set(path.tolist()) for path in row_N.split(lengths)]
    for row in range(packed.num_rows):
        changed_key, changed_value = key.clone(), value.clone()
        changed_key[row], changed_value[row] = 1e3, -1e3
        after = plan_of(packed).attend(1, query, changed_key, changed_value, SCALE)
        changed = set((before != after).flatten(1).any(1).nonzero()[:, 0].tolist())
        sees = {other for path in paths if row in path for other in path if other >= row}
        assert changed <= sees and row in changed, (row, changed, sees)


def test_padding_rows_are_a_sequence_of_their_own():
    packed = forest("a group", multiple_of=8)
    rows = len(np.unique(sequences_of(packed)[1]))
    assert packed.num_rows == 16 and rows == 12
    ids, positions = row_inputs(packed)
    assert ids[rows:].tolist() == [0] * 4 and positions[rows:].tolist() == [0, 1, 2, 3]
    query, key, value = (x.detach() for x in streams(16))
    before = plan_of(packed).attend(1, query, key, value, SCALE)
    key[rows:], value[rows:] = 7.0, -7.0
    after = plan_of(packed).attend(1, query, key, value, SCALE)
    assert after[:rows].equal(before[:rows]) and not after[rows:].equal(before[rows:])


def kernel_of_the_documentation(query: Tensor, key: Tensor, value: Tensor, *bounds: Any, **options: Any) -> Tensor:
    """What flash attention says of lengths apart: causal, aligned at the last query and the last key."""
    assert options["window_size"] == (-1, 0) and options["enable_gqa"]
    outputs = []
    pieces = zip(*(pairwise(cu.tolist()) for cu in bounds[:2]), strict=True)
    for (start, end), (first, last) in pieces:
        assert end - start <= bounds[2] and last - first <= bounds[3]
        seen = torch.ones(end - start, last - first, dtype=torch.bool).tril(last - first - (end - start))
        q, k, v = (x.transpose(0, 1) for x in (query[start:end], key[first:last], value[first:last]))
        out = F.scaled_dot_product_attention(q, k, v, seen, scale=options["scale"], enable_gqa=True)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("name", FORESTS)
def test_one_call_with_lengths_of_queries_and_keys_apart_is_given_every_path(name, monkeypatch):
    """Its kernel is torch's on a GPU; here stands what its documentation says."""
    monkeypatch.setattr(varlen, "varlen_attn", kernel_of_the_documentation)
    packed = forest(name, multiple_of=2)
    qkv = streams(packed.num_rows, torch.float64)
    pieces = forest_module._pieces(packed, np.arange(packed.num_rows))
    found = forest_module._varlen(pieces, CPU).attend(*(x[:, 0] for x in qkv), SCALE)
    assert close(found, plan_of(packed).attend(1, *qkv, SCALE)[:, 0].detach(), 1e-14)


def test_a_kernel_that_fails_or_aligns_otherwise_is_left_alone_and_that_is_said(monkeypatch, caplog):
    def aligned_at_the_first(query: Tensor, key: Tensor, value: Tensor, *bounds: Any, **options: Any) -> Tensor:
        return kernel_of_the_documentation(query, key.roll(1, 0), value, *bounds, **options)

    def works() -> bool:
        varlen.varlen_works.cache_clear()
        return varlen.varlen_works(CPU, torch.bfloat16, (6, 2), 16)

    monkeypatch.setattr(varlen, "varlen_attn", kernel_of_the_documentation)
    assert works() and caplog.text == ""
    monkeypatch.setattr(varlen, "varlen_attn", aligned_at_the_first)
    assert not works() and "is not used for torch.bfloat16 with heads of 16: it is off by" in caplog.text
    monkeypatch.undo()
    assert not works() and "it fails" in caplog.text  # on a CPU there is none
    varlen.varlen_works.cache_clear()


def test_a_row_that_many_read_adds_up_their_gradients_in_fp32():
    """1000 readers of 1.0 each: in bf16 a sum stops growing at 256."""
    x = torch.ones(2, 3, dtype=torch.bfloat16, requires_grad=True)
    gather_rows(x, torch.tensor([1] * 1000)).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[0.0] * 3, [1000.0] * 3]


def test_a_pack_that_shares_next_to_nothing_is_computed_token_by_token():
    """One token of 63 saved: rows are kept, and the plan of tokens is used, which needs no masks."""
    almost = [(5, *range(100, 131)), (5, *range(200, 231))]
    [[packed]] = pack([rollout(i, tokens) for i, tokens in enumerate(almost)], max_tokens=64, share_prefixes=True)
    assert packed.row_T is not None and packed.num_rows == 63 and not is_forest(packed)
    assert is_forest(replace(packed, num_rows=62))


# --------------------------------------------------------------------------- over context-parallel ranks


def _worthwhile(ranks: int) -> list[str]:
    """The forests that still save rows when these are padded for so many ranks."""
    return [name for name in FORESTS if is_forest(_packed(name, 2 * ranks))]


def attend_in_parts() -> list[list[Tensor]]:
    """On the ranks: this one's rows of the output and of the three gradients, for every forest."""
    group, rank, ranks = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    found = []
    for name in _worthwhile(ranks):
        packed = forest(name, multiple_of=2 * ranks)
        held = held_tokens(packed.num_rows, rank=rank, ranks=ranks)
        qkv = [x.detach()[held].requires_grad_() for x in streams(packed.num_rows, torch.float64)]
        weight = _weight(packed)[held]
        output = ForestPlan.build(packed, np.zeros(len(held), np.int64), group, CPU).attend(1, *qkv, SCALE)
        gradients = torch.autograd.grad((output[:, 0] * weight).sum(), qkv)
        found.append([output.detach(), *gradients])
    return found


def _weight(packed: Pack) -> Tensor:
    """0 on rows of padding."""
    rows = len(np.unique(sequences_of(packed)[1]))
    weight = torch.randn(packed.num_rows, HEADS, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight[rows:] = 0
    return weight


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_attend_along_paths_that_others_hold(ranks):
    parts = run_on_ranks(attend_in_parts, world_size=ranks)
    assert len(_worthwhile(ranks)) >= 4
    for number, name in enumerate(_worthwhile(ranks)):
        packed = forest(name, multiple_of=2 * ranks)
        expected, gradients = truth_of(packed, streams(packed.num_rows, torch.float64), _weight(packed))
        for rank in range(ranks):
            held = torch.from_numpy(held_tokens(packed.num_rows, rank=rank, ranks=ranks))
            output, *found = parts[rank][number]
            real = held < len(expected)
            assert close(output[real, 0], expected.detach()[held[real]], 1e-14)
            for mine, truth in zip(found, gradients, strict=True):
                assert (mine - truth[held]).norm() <= 1e-14 * truth.norm()
