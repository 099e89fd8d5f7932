"""The ends of responses as one category, against logits whose columns of the class were merged, in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tropd.errors import ConfigError
from megatron_tropd.losses import end_class
from megatron_tropd.losses.support import first_of_each, kl_on_support
from megatron_tropd.losses.vocab_parallel import linear_divergence

T, V = 9, 13
ENDS = (7, 2, 11)
KEPT = [i for i in range(V) if i not in ENDS]  # columns of the merged rows: these, then the class


def logits(seed: int, *, scale: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(T, V, generator=generator, dtype=torch.float64)


def merged(logits_TV: Tensor) -> Tensor:
    """Log-probs of the rows with one column, the last, for the class."""
    class_T1 = logits_TV[:, list(ENDS)].logsumexp(-1, keepdim=True)
    return torch.cat([logits_TV[:, KEPT], class_T1], dim=1).log_softmax(-1)


def column_of(ids: Tensor) -> Tensor:
    """Where an id's category stands among the merged columns."""
    table = torch.full((V,), len(KEPT))
    table[KEPT] = torch.arange(len(KEPT))
    return table[ids]


STUDENT, TEACHER = logits(1), logits(2)
TARGET = torch.tensor([2, 7, 11, 0, 1, 12, 3, 2, 5])
# with two ids of the class, with one, with none, and duplicates
SUPPORT = torch.tensor(
    [
        [2, 7, 0, 1],
        [11, 3, 4, 5],
        [0, 1, 3, 4],
        [7, 7, 0, 2],
        [12, 12, 1, 2],
        [0, 1, 3, 4],
        [2, 11, 7, 3],
        [5, 6, 8, 9],
        [5, 0, 2, 10],
    ]
)


def parts(logits_TV: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs of all ids, and those of the class."""
    logprob_TV = logits_TV.log_softmax(-1)
    return logprob_TV, logprob_TV[:, list(ENDS)]


def same_value_and_gradient(found: Callable[[Tensor], Tensor], truth: Callable[[Tensor], Tensor]) -> None:
    """Both are functions of the student's logits."""
    x = STUDENT.clone().requires_grad_()
    got, exact = found(x), truth(x)
    torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
    one, other = (torch.autograd.grad(value.square().sum(), x, retain_graph=True)[0] for value in (got, exact))
    assert other.norm() > 1e-3
    torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_an_end_has_the_probability_of_all_ends():
    def found(x: Tensor) -> Tensor:
        logprob_TV, end_TX = parts(x)
        return end_class.at_ids(logprob_TV.gather(1, TARGET[:, None])[:, 0], TARGET, ENDS, end_TX)

    same_value_and_gradient(found, lambda x: merged(x).gather(1, column_of(TARGET)[:, None])[:, 0])


def test_the_class_is_one_entry_of_a_support():
    ids_TK = end_class.represented(SUPPORT, ENDS)
    mask_TK = first_of_each(ids_TK)
    assert mask_TK.sum(-1).tolist() == [3, 4, 4, 2, 3, 4, 2, 4, 4]  # by hand: ids of the class and duplicates once

    def found(x: Tensor) -> Tensor:
        logprob_TV, end_TX = parts(x)
        known_TK = end_class.at_ids(logprob_TV.gather(1, SUPPORT), SUPPORT, ENDS, end_TX)
        return torch.where(mask_TK, known_TK, 0.0)

    def truth(x: Tensor) -> Tensor:
        return torch.where(mask_TK, merged(x).gather(1, column_of(SUPPORT)), 0.0)

    same_value_and_gradient(found, truth)


def log_tail(logprob_TC: Tensor, listed_TC: Tensor) -> Tensor:
    return logprob_TC.masked_fill(listed_TC, -math.inf).logsumexp(-1)


def listed(width: int, *ids_TK: Tensor) -> Tensor:
    mask = torch.zeros(T, width, dtype=torch.bool)
    for ids in ids_TK:
        mask.scatter_(1, ids, True)
    return mask


def test_the_tail_has_all_of_the_class_or_nothing():
    ends_TX = torch.tensor(ENDS).expand(T, -1)

    def found(x: Tensor) -> Tensor:
        logprob_TV, end_TX = parts(x)
        outside_T = log_tail(logprob_TV, listed(V, SUPPORT, TARGET[:, None], ends_TX))
        return end_class.tail_outside(
            outside_T,
            logprob_TV.gather(1, TARGET[:, None])[:, 0],
            target_T=TARGET,
            ids_TK=SUPPORT,
            end_ids=ENDS,
            end_TX=end_TX,
        )

    same_value_and_gradient(found, lambda x: log_tail(merged(x), listed(len(KEPT) + 1, column_of(SUPPORT))))


def test_the_entropy_is_that_of_the_merged_rows():
    def of(logprob: Tensor) -> Tensor:
        return -(logprob.exp() * logprob).sum(-1)

    def found(x: Tensor) -> Tensor:
        logprob_TV, end_TX = parts(x)
        return end_class.class_entropy(of(logprob_TV), end_TX)

    same_value_and_gradient(found, lambda x: of(merged(x)))


def divergence(q: Tensor, p: Tensor, kind: str, beta: float) -> Tensor:
    if kind == "forward_kl":
        return (p.exp() * (p - q)).sum(-1)
    if kind == "reverse_kl":
        return (q.exp() * (q - p)).sum(-1)
    m = torch.log(beta * p.exp() + (1 - beta) * q.exp())
    return (beta * p.exp() * (p - m) + (1 - beta) * q.exp() * (q - m)).sum(-1)


def of_logits(student: Tensor, teacher: Tensor, ends: tuple[int, ...], **options: Any) -> Tensor:
    """The fused divergence of two softmaxes whose logits are given."""
    one = torch.eye(student.shape[1], dtype=student.dtype)
    return linear_divergence(student, one, teacher, one, vocab_size=student.shape[1], end_ids=ends, **options)


@pytest.mark.parametrize(
    ("kind", "beta"), [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.93)]
)
def test_a_full_divergence_is_that_of_the_merged_rows(kind: str, beta: float):
    def found(x: Tensor) -> Tensor:
        return of_logits(x, TEACHER, ENDS, kind=kind, beta=beta)

    same_value_and_gradient(found, lambda x: divergence(merged(x), merged(TEACHER), kind, beta))


def test_an_end_that_one_side_never_writes_costs_nothing():
    """By hand: both end with certainty .9, the student always with one id, the teacher with another."""
    rest, never = math.log(0.1), -40.0
    student = torch.tensor([[math.log(0.9), never, rest]], dtype=torch.float64)
    teacher = torch.tensor([[never, math.log(0.9), rest]], dtype=torch.float64)
    apart = divergence(student, teacher, "reverse_kl", 0.5)
    assert apart.item() == pytest.approx(0.9 * (math.log(0.9) + 40), rel=1e-6)
    student.requires_grad_()
    whole = of_logits(student, teacher, (0, 1), kind="reverse_kl")
    assert whole.item() == pytest.approx(0.0, abs=1e-12)
    whole.backward()
    assert student.grad is not None and student.grad.abs().max() < 1e-12


def test_a_bucket_divergence_over_a_support_is_not_negative_and_vanishes_for_equals():
    logprob_TV, end_TX = parts(STUDENT)
    ids_TK = end_class.represented(SUPPORT, ENDS)
    known_TK = end_class.at_ids(logprob_TV.gather(1, ids_TK), ids_TK, ENDS, end_TX)
    other_TV, other_TX = parts(TEACHER)
    other_TK = end_class.at_ids(other_TV.gather(1, ids_TK), ids_TK, ENDS, other_TX)
    columns = listed(len(KEPT) + 1, column_of(SUPPORT))
    tails = (log_tail(merged(STUDENT), columns), log_tail(merged(TEACHER), columns))
    mask_TK = first_of_each(ids_TK)
    kl_T = kl_on_support(known_TK, other_TK, tail="bucket", mask_TK=mask_TK, logtails=tails)
    assert (kl_T > 0).all()
    same_T = kl_on_support(known_TK, known_TK, tail="bucket", mask_TK=mask_TK, logtails=(tails[0], tails[0]))
    assert same_T.abs().max() == 0.0


def test_without_ends_nothing_is_picked_or_renamed():
    assert end_class.with_ends(SUPPORT, ()) is SUPPORT
    assert end_class.represented(SUPPORT, ()) is SUPPORT


def test_the_ids_of_the_class_stand_behind_the_others():
    assert end_class.with_ends(SUPPORT[:2], ENDS).tolist() == [[2, 7, 0, 1, 7, 2, 11], [11, 3, 4, 5, 7, 2, 11]]


@pytest.mark.parametrize("ends", [(2, 7, 2), (2, V), (-1, 2)])
def test_ends_that_are_no_ids_of_the_vocabulary_or_twice_there_are_refused(ends: tuple[int, ...]):
    hidden, weight = torch.zeros(3, 2), torch.zeros(V, 2)
    with pytest.raises(ConfigError, match=r"end_ids=.* must be different ids below vocab_size=13"):
        linear_divergence(hidden, weight, hidden, weight, kind="jsd", vocab_size=V, end_ids=ends)
