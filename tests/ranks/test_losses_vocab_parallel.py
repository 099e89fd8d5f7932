"""Claims about ``losses.vocab_parallel``. Truth is the textbook formula in fp64 autograd on one process.

Every rank builds the whole problem from a seed, hands its shard to the code under test, and compares with the truth:
values as they are, the hidden gradient summed over ranks, the weight gradient against its own slice. The comparison is
of norms of differences, so a gradient that is off in scale or in direction fails alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tropd.errors import ConfigError, DataError
from megatron_tropd.losses.vocab_parallel import linear_divergence, linear_logprobs, linear_topk
from megatron_tropd.parallel.collectives import all_gather_rows, all_reduce_sum, group_rank, group_size
from tests.support.distributed import run_on_ranks
from tests.support.long import few
from tests.support.parity_problems import peaked

WORLD_SIZES = few([0, 1, 2, 4], 0, 2)  # 0: no process group at all
KINDS = [("forward_kl", 0.5), ("reverse_kl", 0.5), ("jsd", 0.5), ("jsd", 0.1), ("jsd", 0.0), ("jsd", 1.0)]


def on_ranks(function: Callable[..., Any], *args: Any, world_size: int) -> None:
    if world_size:
        run_on_ranks(function, *args, world_size=world_size)
    else:
        function(*args)


def world() -> dist.ProcessGroup | None:
    return dist.group.WORLD if dist.is_initialized() else None


def relative_error(found: Tensor, truth: Tensor) -> float:
    found, truth = found.detach().double(), truth.detach().double()
    assert found.shape == truth.shape
    if truth.numel() == 0:
        return 0.0
    return float((found - truth).norm() / truth.norm())


# --------------------------------------------------------------------------- the problem and its truth


Pair: TypeAlias = tuple[Tensor, Tensor]  # hidden states and weight


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A hidden state and a weight for each model, whole and true-sized, in fp64 with values exact in ``dtype``."""

    tokens: int = 17
    vocab: int = 37
    hidden: int = 7
    teacher_hidden: int = 5
    temperature: float = 1.0
    chunk_tokens: int | None = None
    dtype: torch.dtype = torch.float32
    scale: float = 1.0
    seed: int = 0

    @property
    def shard(self) -> int:
        """Rows of each rank's weight shard: as few as hold the vocabulary, plus 3 of padding on one rank."""
        ranks = group_size(world())
        return self.vocab + 3 if ranks == 1 else -(-self.vocab // ranks)

    def draw(self, *shape: int, stream: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.seed + stream)
        return torch.randn(*shape, generator=generator, dtype=torch.float64).mul_(self.scale).to(self.dtype).double()

    def student(self) -> Pair:
        return self.draw(self.tokens, self.hidden, stream=1), self.draw(self.vocab, self.hidden, stream=2)

    def teacher(self) -> Pair:
        hidden = self.teacher_hidden
        return self.draw(self.tokens, hidden, stream=3), self.draw(self.vocab, hidden, stream=4)

    def cut(self, weight_VD: Tensor, *, padding: float = torch.nan) -> Tensor:
        """This rank's shard in ``dtype``; what lies beyond the vocabulary holds ``padding``."""
        rows = self.shard * group_size(world())
        padded = torch.full((rows, weight_VD.shape[1]), padding, dtype=torch.float64)
        padded[: self.vocab] = weight_VD
        first = group_rank(world()) * self.shard
        return padded[first : first + self.shard].to(self.dtype, copy=True)

    def learned(self, hidden_TD: Tensor, weight_VD: Tensor) -> Pair:
        """What this rank holds of the two, in ``dtype``, as leaves that want a gradient."""
        hidden_TD = hidden_TD.detach().to(self.dtype, copy=True)
        return hidden_TD.requires_grad_(), self.cut(weight_VD.detach()).requires_grad_()

    def options(self) -> dict[str, Any]:
        return {
            "group": world(),
            "vocab_size": self.vocab,
            "temperature": self.temperature,
            "chunk_tokens": self.chunk_tokens,
        }

    def uncut(self, grad_vD: Tensor) -> Tensor:
        """All ranks' shards of a weight gradient together; what padding got must be exactly 0."""
        grad_VD = all_gather_rows(grad_vD, world())
        assert torch.all(grad_VD[self.vocab :] == 0.0)
        return grad_VD[: self.vocab]


def log_softmax_of(hidden_TD: Tensor, weight_VD: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logits_TV = hidden_TD @ weight_VD.t() / temperature
    return torch.log_softmax(logits_TV, dim=-1), torch.logsumexp(logits_TV, dim=-1)


def textbook_logprobs(hidden_TD: Tensor, weight_VD: Tensor, ids_TK: Tensor, temperature: float) -> list[Tensor]:
    logq_TV, logsumexp_T = log_softmax_of(hidden_TD, weight_VD, temperature)
    return [logq_TV.gather(1, ids_TK), -(logq_TV.exp() * logq_TV).sum(-1), logsumexp_T]


def textbook_divergence(logq_TV: Tensor, logp_TV: Tensor, kind: str, beta: float) -> Tensor:
    def kl(a_TV: Tensor, b_TV: Tensor) -> Tensor:
        return (a_TV.exp() * (a_TV - b_TV)).sum(-1)

    if kind == "forward_kl" or (kind, beta) == ("jsd", 0.0):
        return kl(logp_TV, logq_TV)
    if kind == "reverse_kl" or (kind, beta) == ("jsd", 1.0):
        return kl(logq_TV, logp_TV)
    logm_TV = torch.log(beta * logp_TV.exp() + (1 - beta) * logq_TV.exp())
    return beta * kl(logp_TV, logm_TV) + (1 - beta) * kl(logq_TV, logm_TV)


def grads_of(outputs: Sequence[Tensor], incoming: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, inputs, [g.to(o.dtype) for g, o in zip(incoming, outputs, strict=True)])


def assert_gradients(problem: Problem, found: Sequence[Tensor], truth: Sequence[Tensor], *, limit: float) -> None:
    """Found: this rank's (hidden, weight) gradients. Truth: the whole ones."""
    hidden_TD = all_reduce_sum(found[0].double(), world())
    assert relative_error(hidden_TD, truth[0]) < limit, f"hidden gradient of {problem}"
    assert relative_error(problem.uncut(found[1]), truth[1]) < limit, f"weight gradient of {problem}"


# --------------------------------------------------------------------------- log-probabilities


def ids_of(problem: Problem, pattern: str) -> Tensor:
    tokens, vocab, shard = problem.tokens, problem.vocab, problem.shard
    generator = torch.Generator().manual_seed(problem.seed)
    if pattern == "all":  # K = V
        return torch.arange(vocab).expand(tokens, vocab).contiguous()
    if pattern == "shard_starts":  # every shard's first id, and two ids that most shards do not hold
        starts = torch.arange(0, vocab, shard)
        return torch.cat([starts, torch.tensor([1, vocab - 1])]).expand(tokens, -1).contiguous()
    if pattern == "duplicates":  # one id three times, beside a shard's first id twice
        one = torch.randint(vocab, (tokens, 1), generator=generator)
        return torch.cat([one, one, torch.zeros_like(one), one, torch.zeros_like(one)], dim=1)
    if pattern == "one_shard":  # all other ranks hold none of the ids
        return torch.randint(vocab - shard * ((vocab - 1) // shard), (tokens, 4), generator=generator)
    return torch.randint(vocab, (tokens, 1 if pattern == "single" else 5), generator=generator)


def logprob_problems() -> Iterator[tuple[Problem, str]]:
    for pattern in ("random", "single", "all", "shard_starts", "duplicates", "one_shard"):
        yield Problem(seed=1), pattern
        yield Problem(seed=2, temperature=0.7, chunk_tokens=3), pattern
    for chunk_tokens in (1, 2, 5, 17, 1000):
        yield Problem(seed=3, chunk_tokens=chunk_tokens), "random"
        yield Problem(seed=3, chunk_tokens=chunk_tokens), "shard_starts"
    yield Problem(seed=4, tokens=1), "random"
    yield Problem(seed=4, vocab=21), "random"
    yield Problem(seed=5, vocab=9, tokens=3), "all"  # four shards of 3: the last one is padding only
    yield Problem(seed=6, scale=4.0), "random"  # logits of some +-100: most probabilities vanish
    yield Problem(seed=7, tokens=601, vocab=2501, hidden=11), "shard_starts"  # several default tiles


def check_logprobs_match_the_textbook() -> None:
    for problem, pattern in logprob_problems():
        hidden_TD, weight_VD = problem.student()
        ids_TK = ids_of(problem, pattern)
        truth_inputs = [hidden_TD.requires_grad_(), weight_VD.requires_grad_()]
        truth = textbook_logprobs(hidden_TD, weight_VD, ids_TK, problem.temperature)
        inputs = problem.learned(hidden_TD, weight_VD)
        answer = linear_logprobs(*inputs, ids_TK, **problem.options())
        found = [answer.logprob_TK, answer.entropy_T, answer.logsumexp_T]
        for name, a, b in zip(("logprob", "entropy", "logsumexp"), found, truth, strict=True):
            assert a.dtype == torch.float32
            assert relative_error(a, b) < 1e-5, f"{name} of {problem}, ids {pattern}"
        incoming = [problem.draw(*x.shape, stream=10 + i) for i, x in enumerate(truth)]
        for used in ([0], [1], [2], [0, 1, 2]):  # each output alone, then together
            pick = [[x[i] for i in used] for x in (found, truth, incoming)]
            assert_gradients(
                problem,
                torch.autograd.grad(pick[0], inputs, [g.float() for g in pick[2]], retain_graph=True),
                torch.autograd.grad(pick[1], truth_inputs, pick[2], retain_graph=True),
                limit=1e-5,
            )


@pytest.mark.parametrize("world_size", WORLD_SIZES, ids="tp{}".format)
def test_logprobs_entropy_logsumexp_and_their_gradients_match_fp64(world_size: int) -> None:
    on_ranks(check_logprobs_match_the_textbook, world_size=world_size)


def test_gradient_at_a_single_token_is_the_one_worked_out_by_hand() -> None:
    # two tokens of the vocabulary, logits 0 and log 3: q = (1/4, 3/4); d log q_0 / d logits = (3/4, -3/4)
    hidden = torch.ones(1, 1, requires_grad=True)
    weight = torch.tensor([[0.0], [np.log(3.0)]], dtype=torch.float32, requires_grad=True)
    answer = linear_logprobs(hidden, weight, torch.tensor([[0]]), vocab_size=2)
    answer.logprob_TK.sum().backward()
    assert answer.logprob_TK.item() == pytest.approx(-np.log(4.0), rel=1e-6)
    assert weight.grad is not None and hidden.grad is not None
    torch.testing.assert_close(weight.grad, torch.tensor([[0.75], [-0.75]]))
    assert hidden.grad.item() == pytest.approx(-0.75 * np.log(3.0), rel=1e-6)


def check_empty_input() -> None:
    """A pack without a valid token: the same collectives, empty results, zero gradients of the right shapes."""
    problem = Problem(tokens=0)
    hidden, weight = problem.learned(*problem.student())
    teacher = problem.learned(*problem.teacher())
    answer = linear_logprobs(hidden, weight, torch.zeros(0, 4, dtype=torch.int64), **problem.options())
    loss_T = linear_divergence(hidden, weight, *teacher, kind="jsd", **problem.options())
    (answer.logprob_TK.sum() + answer.entropy_T.sum() + loss_T.sum()).backward()
    assert hidden.grad is not None and weight.grad is not None
    assert hidden.grad.shape == (0, problem.hidden) and answer.logprob_TK.shape == (0, 4) and loss_T.shape == (0,)
    torch.testing.assert_close(weight.grad, torch.zeros(problem.shard, problem.hidden))
    top = linear_topk(hidden, weight, 3, **problem.options())
    assert top.ids_TK.shape == top.logprob_TK.shape == (0, 3) and top.entropy_T.shape == (0,)


def check_padding_of_any_value_is_inert() -> None:
    problem = Problem(vocab=9, tokens=3)
    results = []
    for padding in (0.0, torch.nan, torch.inf, 3e38):
        weight = problem.cut(problem.student()[1], padding=padding).requires_grad_()
        hidden = problem.student()[0].float().requires_grad_()
        answer = linear_logprobs(hidden, weight, torch.zeros(3, 1, dtype=torch.int64), **problem.options())
        results.append([answer.logprob_TK, *torch.autograd.grad(answer.logprob_TK.sum(), [hidden, weight])])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


def check_only_what_needs_a_gradient_gets_one() -> None:
    problem = Problem()
    ids_TK = ids_of(problem, "random")
    hidden, weight = problem.learned(*problem.student())
    linear_logprobs(hidden, weight, ids_TK, **problem.options()).logprob_TK.sum().backward()
    only_hidden = hidden.detach().clone().requires_grad_()
    linear_logprobs(only_hidden, weight.detach(), ids_TK, **problem.options()).logprob_TK.sum().backward()
    torch.testing.assert_close(only_hidden.grad, hidden.grad)
    only_weight = weight.detach().clone().requires_grad_()
    linear_logprobs(hidden.detach(), only_weight, ids_TK, **problem.options()).logprob_TK.sum().backward()
    torch.testing.assert_close(only_weight.grad, weight.grad)


def check_strided_inputs() -> None:
    problem = Problem()
    ids_TK = ids_of(problem, "random")
    hidden, weight = problem.student()[0].float(), problem.cut(problem.student()[1])
    expected = linear_logprobs(hidden, weight, ids_TK, **problem.options())
    strided = linear_logprobs(
        hidden.t().contiguous().t(), weight.t().contiguous().t(), ids_TK.t().contiguous().t(), **problem.options()
    )
    torch.testing.assert_close(strided.logprob_TK, expected.logprob_TK)


def check_corner_cases() -> None:
    check_empty_input()
    check_padding_of_any_value_is_inert()
    check_only_what_needs_a_gradient_gets_one()
    check_strided_inputs()


@pytest.mark.parametrize("world_size", WORLD_SIZES, ids="tp{}".format)
def test_corner_cases_empty_input_padding_frozen_and_strided_inputs(world_size: int) -> None:
    on_ranks(check_corner_cases, world_size=world_size)


# --------------------------------------------------------------------------- the mass outside the given ids


def textbook_logtail(hidden_TD: Tensor, weight_VD: Tensor, ids_TK: Tensor, temperature: float) -> Tensor:
    logq_TV, _ = log_softmax_of(hidden_TD, weight_VD, temperature)
    listed_TV = torch.zeros_like(logq_TV, dtype=torch.bool).scatter_(1, ids_TK, True)
    return logq_TV.masked_fill(listed_TV, -torch.inf).logsumexp(-1)


def check_tails_match_the_textbook() -> None:
    for problem, pattern in logprob_problems():
        if problem.chunk_tokens in (1, 17, 1000):
            continue
        hidden_TD, weight_VD = problem.student()
        check_tail(problem, hidden_TD, weight_VD, ids_of(problem, pattern), name=pattern)
    for mass_outside in (1e-5, 1e-12):
        hidden_TD, weight_VD, ids_TK = peaked(mass_outside)
        problem = Problem(hidden=41, chunk_tokens=3)
        check_tail(problem, hidden_TD, weight_VD, ids_TK, name=f"tail {mass_outside}")
        logtail_T = textbook_logtail(hidden_TD, weight_VD, ids_TK, 1.0)
        assert abs(float(logtail_T.exp().log10().mean()) - np.log10(mass_outside)) < 1.0


def check_tail(problem: Problem, hidden_TD: Tensor, weight_VD: Tensor, ids_TK: Tensor, *, name: str) -> None:
    truth_inputs = [x.detach().clone().requires_grad_() for x in (hidden_TD, weight_VD)]
    truth = textbook_logprobs(*truth_inputs, ids_TK, problem.temperature)
    truth.append(textbook_logtail(*truth_inputs, ids_TK, problem.temperature))
    inputs = problem.learned(hidden_TD, weight_VD)
    answer = linear_logprobs(*inputs, ids_TK, **problem.options(), tail=True)
    assert answer.logtail_T is not None
    found = [answer.logprob_TK, answer.entropy_T, answer.logsumexp_T, answer.logtail_T]
    incoming = [problem.draw(*x.shape, stream=10 + i) for i, x in enumerate(truth)]
    empty_T = truth[3].isneginf()
    assert torch.equal(answer.logtail_T.isneginf(), empty_T)
    if empty_T.any():
        # what comes in for an empty tail must leave no trace, least of all nan
        assert empty_T.all()
        kept = torch.autograd.grad(found, inputs, [g.float() for g in incoming], retain_graph=True)
        truth, found, incoming = truth[:3], found[:3], incoming[:3]
        without = torch.autograd.grad(found, inputs, [g.float() for g in incoming], retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(kept, without, strict=True))
    else:  # as a factor of the mass: what the divergences multiply by
        assert relative_error(answer.logtail_T.double().sub(truth[3].detach()).exp(), torch.ones(len(empty_T))) < 1e-5
    for used in ([3], [0, 1, 2, 3]):
        pick = [[x[i] for i in used if i < len(x)] for x in (found, truth, incoming)]
        if pick[0]:
            assert_gradients(
                problem,
                torch.autograd.grad(pick[0], inputs, [g.float() for g in pick[2]], retain_graph=True),
                torch.autograd.grad(pick[1], truth_inputs, pick[2], retain_graph=True),
                limit=1e-5,
            )
    plain = linear_logprobs(*inputs, ids_TK, **problem.options())
    assert plain.logtail_T is None
    assert relative_error(plain.logprob_TK, answer.logprob_TK) < 1e-6, name


def check_tails_of_the_top_k() -> None:
    for k, (chunk_tokens, seed) in product((1, 5, 36, 37), ((None, 0), (4, 1))):
        problem = Problem(chunk_tokens=chunk_tokens, temperature=0.7, seed=seed)
        hidden, weight = problem.student()
        for wanted_TJ in (ids_of(problem, "shard_starts"), ids_of(problem, "duplicates"), None):
            options = problem.options() | {"ids_TJ": wanted_TJ}
            top = linear_topk(hidden.float(), problem.cut(weight), k, **options, tail=True)
            plain = linear_topk(hidden.float(), problem.cut(weight), k, **options)
            assert torch.equal(top.ids_TK, plain.ids_TK) and plain.logtail_T is None
            assert relative_error(top.logprob_TK, plain.logprob_TK) < 1e-6
            assert relative_error(top.entropy_T, plain.entropy_T) < 1e-6
            listed = top.ids_TK if wanted_TJ is None else torch.cat([top.ids_TK, wanted_TJ], dim=1)
            logtail_T = textbook_logtail(hidden, weight, listed, problem.temperature)
            assert top.logtail_T is not None
            error_T = (top.logtail_T.double() - logtail_T).exp() - 1.0
            assert torch.equal(top.logtail_T.isneginf(), logtail_T.isneginf())
            finite_T = ~logtail_T.isneginf()
            assert not finite_T.any() or error_T[finite_T].abs().max() < 1e-5


def check_tails() -> None:
    check_tails_match_the_textbook()
    check_tails_of_the_top_k()


@pytest.mark.parametrize("world_size", WORLD_SIZES, ids="tp{}".format)
def test_mass_outside_the_given_ids_and_its_gradient_match_fp64_however_small_it_is(world_size: int) -> None:
    on_ranks(check_tails, world_size=world_size)


# --------------------------------------------------------------------------- low precision


def check_bf16_inputs_give_the_log_probs_of_fp64() -> None:
    problem = Problem(tokens=131, vocab=1003, hidden=64, dtype=torch.bfloat16, scale=0.5, chunk_tokens=13)
    ids_TK = ids_of(problem, "random")
    hidden, weight = problem.student()
    incoming = [problem.draw(*ids_TK.shape, stream=10)]

    def plain(dtype: torch.dtype) -> list[Tensor]:
        inputs = [x.detach().to(dtype, copy=True).requires_grad_() for x in (hidden, weight)]
        logits_TV = inputs[0] @ inputs[1].t()
        wide_TV = logits_TV if dtype == torch.float64 else logits_TV.float()
        logprob_TK = torch.log_softmax(wide_TV, dim=-1).gather(1, ids_TK)
        return [logprob_TK, *grads_of([logprob_TK], incoming, inputs)]

    inputs = problem.learned(hidden, weight)
    logprob_TK = linear_logprobs(*inputs, ids_TK, **problem.options()).logprob_TK
    grad_hidden, grad_weight = grads_of([logprob_TK], incoming, inputs)
    assert grad_hidden.dtype == grad_weight.dtype == torch.bfloat16
    found = [logprob_TK, all_reduce_sum(grad_hidden.float(), world()), problem.uncut(grad_weight)]
    for name, ours, theirs, truth in zip(
        ("logprob", "hidden gradient", "weight gradient"),
        found,
        plain(torch.bfloat16),
        plain(torch.float64),
        strict=True,
    ):
        ours_error, plain_error = relative_error(ours, truth), relative_error(theirs, truth)
        # a gradient is rounded to bf16 once, at the end (once for each shard); a log-prob never is
        limit = 1e-6 if name == "logprob" else 3e-3
        assert 0.0 < ours_error < min(limit, plain_error), f"{name}: {ours_error:.2e}, plain bf16 {plain_error:.2e}"


@pytest.mark.parametrize("world_size", [0, 2], ids="tp{}".format)
def test_bf16_inputs_give_the_log_probs_of_fp64_and_gradients_rounded_once(world_size: int) -> None:
    on_ranks(check_bf16_inputs_give_the_log_probs_of_fp64, world_size=world_size)


# --------------------------------------------------------------------------- divergences


def divergence_inputs(problem: Problem) -> tuple[Pair, Pair]:
    """This rank's (student, teacher), all of them leaves that want a gradient."""
    return problem.learned(*problem.student()), problem.learned(*problem.teacher())


def plain_divergence(problem: Problem, kind: str, beta: float, dtype: torch.dtype) -> list[Tensor]:
    """The textbook's loss, hidden and weight gradient, computed in ``dtype``."""
    student_TD, student_VD = (x.to(dtype, copy=True).requires_grad_() for x in problem.student())
    teacher_TE, teacher_VE = (x.to(dtype) for x in problem.teacher())
    logq_TV, _ = log_softmax_of(student_TD, student_VD, problem.temperature)
    logp_TV, _ = log_softmax_of(teacher_TE, teacher_VE, problem.temperature)
    loss_T = textbook_divergence(logq_TV, logp_TV, kind, beta)
    return [loss_T, *grads_of([loss_T], [problem.draw(problem.tokens, stream=10)], [student_TD, student_VD])]


def check_divergences_match_the_textbook() -> None:
    problems = [
        Problem(seed=1),
        Problem(seed=2, temperature=0.7, chunk_tokens=1),
        Problem(seed=3, chunk_tokens=5, scale=2.0),
        Problem(seed=8, tokens=1, vocab=21),
        Problem(seed=5, tokens=3, vocab=9),
        Problem(seed=6, tokens=601, vocab=2501),
    ]
    for problem, (kind, beta) in product(problems, KINDS):
        truth = plain_divergence(problem, kind, beta, torch.float64)
        fp32 = plain_divergence(problem, kind, beta, torch.float32)
        mine, teacher = divergence_inputs(problem)
        loss_T = linear_divergence(*mine, *teacher, kind=kind, beta=beta, **problem.options())
        assert loss_T.dtype == torch.float32
        incoming_T = problem.draw(problem.tokens, stream=10).float()
        grads = torch.autograd.grad([loss_T], [*mine, *teacher], [incoming_T], allow_unused=True)
        assert grads[2] is None and grads[3] is None  # the teacher is given, not learned
        found = [loss_T, all_reduce_sum(grads[0].double(), world()), problem.uncut(grads[1])]
        for name, ours, theirs, true in zip(("loss", "hidden", "weight"), found, fp32, truth, strict=True):
            # where a softmax is nearly one token the gradient is a small difference, which no fp32 gets to 1e-5
            limit = max(1e-5, 2.0 * relative_error(theirs, true))
            assert relative_error(ours, true) < limit < 1e-4, f"{name} of {kind} {beta}, {problem}"


def check_divergence_of_equal_models_is_exactly_zero() -> None:
    for (kind, beta), dtype in product(KINDS, (torch.float32, torch.bfloat16)):
        problem = Problem(dtype=dtype, chunk_tokens=3, scale=2.0)
        mine, _ = divergence_inputs(problem)
        loss_T = linear_divergence(*mine, *mine, kind=kind, beta=beta, **problem.options())
        grads = torch.autograd.grad(loss_T.sum(), mine)
        assert torch.all(loss_T == 0.0), (kind, beta, loss_T)
        assert all(torch.all(g == 0.0) for g in grads), (kind, beta)


def check_extreme_models_stay_finite() -> None:
    """Logits of some +-1000: each softmax is one token, and the two disagree on which."""
    for (kind, beta), chunk_tokens in product(KINDS, (1, None)):
        problem = Problem(scale=30.0, chunk_tokens=chunk_tokens)
        mine, teacher = divergence_inputs(problem)
        loss_T = linear_divergence(*mine, *teacher, kind=kind, beta=beta, **problem.options())
        assert torch.isfinite(loss_T).all() and torch.all(loss_T >= 0.0)
        assert all(torch.isfinite(g).all() for g in torch.autograd.grad(loss_T.sum(), mine))
        if kind == "jsd" and 0.0 < beta < 1.0:  # the mixture of two disjoint points: beta log 1/beta + ...
            bound = -beta * np.log(beta) - (1 - beta) * np.log(1 - beta)
            assert loss_T.max().item() == pytest.approx(bound, rel=1e-5)


def check_divergences() -> None:
    check_divergences_match_the_textbook()
    check_divergence_of_equal_models_is_exactly_zero()
    check_extreme_models_stay_finite()


@pytest.mark.parametrize("world_size", WORLD_SIZES, ids="tp{}".format)
def test_divergences_and_their_gradients_match_fp64(world_size: int) -> None:
    on_ranks(check_divergences, world_size=world_size)


# --------------------------------------------------------------------------- top-k


def expected_topk(logits_TV: Tensor, k: int) -> Tensor:
    """Ids by (logit descending, id ascending)."""
    ids = np.arange(logits_TV.shape[1])
    order = [np.lexsort((ids, -row))[:k] for row in logits_TV.numpy()]
    return torch.from_numpy(np.stack(order))


def check_topk_matches_a_full_sort() -> None:
    for k, chunk_tokens, seed in product((1, 2, 5, 36, 37), (None, 1, 4), (0, 1)):
        problem = Problem(chunk_tokens=chunk_tokens, temperature=0.7, seed=seed)
        hidden, weight = problem.student()
        wanted_TJ = ids_of(problem, "shard_starts")
        top = linear_topk(hidden.float(), problem.cut(weight), k, ids_TJ=wanted_TJ, **problem.options())
        logprob_TK, entropy_T, _ = textbook_logprobs(hidden, weight, top.ids_TK, problem.temperature)
        assert torch.equal(top.ids_TK, expected_topk(hidden @ weight.t(), k))
        assert relative_error(top.logprob_TK, logprob_TK) < 1e-5
        assert relative_error(top.entropy_T, entropy_T) < 1e-5
        assert top.picked_logprob_TJ is not None
        picked_TJ = textbook_logprobs(hidden, weight, wanted_TJ, problem.temperature)[0]
        assert relative_error(top.picked_logprob_TJ, picked_TJ) < 1e-5
        assert torch.all(top.logprob_TK.diff(dim=-1) <= 0.0)
        # the same bits from either function: a teacher identical to the student gives a log ratio of exactly 0
        again = linear_logprobs(hidden.float(), problem.cut(weight), wanted_TJ, **problem.options())
        assert torch.equal(top.picked_logprob_TJ, again.logprob_TK)
        assert torch.equal(top.entropy_T, again.entropy_T)


def check_topk_resolves_ties_by_the_smaller_id() -> None:
    """Small integers make exact logits with many ties, within a tile, across tiles and across ranks."""
    for dtype, k, chunk_tokens in product((torch.float32, torch.bfloat16), (1, 3, 11, 37), (None, 1, 3)):
        problem = Problem(dtype=dtype, chunk_tokens=chunk_tokens, hidden=3)
        hidden, weight = (x.round().clamp_(-2, 2) for x in problem.student())
        hidden[0] = 0.0  # all logits 0: ids 0, 1, 2, ...
        hidden[1] = -hidden[1].abs()  # zeros of either sign
        top = linear_topk(hidden.to(dtype), problem.cut(weight), k, **problem.options())
        assert torch.equal(top.ids_TK, expected_topk(hidden @ weight.t(), k)), (dtype, k, chunk_tokens)
        assert top.picked_logprob_TJ is None
        every = all_gather_rows(torch.cat([top.ids_TK, top.logprob_TK.view(torch.int32)], dim=1), world())
        for rank in range(group_size(world())):  # bitwise the same on every rank
            assert torch.equal(every[rank * problem.tokens :][: problem.tokens], every[: problem.tokens])


def check_topk() -> None:
    check_topk_matches_a_full_sort()
    check_topk_resolves_ties_by_the_smaller_id()


@pytest.mark.parametrize("world_size", WORLD_SIZES, ids="tp{}".format)
def test_topk_matches_a_full_sort_and_breaks_ties_by_id(world_size: int) -> None:
    on_ranks(check_topk, world_size=world_size)


# --------------------------------------------------------------------------- traffic and memory


class Watch(TorchDispatchMode):
    """Records collectives and the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "c10d":
            self.collectives.append(str(func))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
        return result


def functions_under_watch(problem: Problem) -> dict[str, Callable[[], Tensor]]:
    """Name -> forward pass that returns something to call backward on."""
    mine, teacher = divergence_inputs(problem)
    ids_TK = ids_of(problem, "random")

    def logprobs() -> Tensor:
        answer = linear_logprobs(*mine, ids_TK, **problem.options())
        return answer.logprob_TK.sum() + answer.entropy_T.sum() + answer.logsumexp_T.sum()

    def logtail() -> Tensor:
        answer = linear_logprobs(*mine, ids_TK, **problem.options(), tail=True)
        assert answer.logtail_T is not None
        return answer.logprob_TK.sum() + answer.entropy_T.sum() + answer.logtail_T.sum()

    def divergence(kind: str) -> Callable[[], Tensor]:
        return lambda: linear_divergence(*mine, *teacher, kind=kind, **problem.options()).sum()

    def topk() -> Tensor:
        top = linear_topk(*mine, 3, ids_TJ=ids_TK, **problem.options(), tail=True)
        assert not top.logprob_TK.requires_grad
        return torch.zeros((), requires_grad=True)

    return {"logprobs": logprobs, "logtail": logtail, "topk": topk} | {
        k: divergence(k) for k in ("forward_kl", "reverse_kl", "jsd")
    }


def check_traffic_and_memory() -> None:
    problem = Problem(tokens=96, vocab=2803, hidden=3, teacher_hidden=2, chunk_tokens=4)
    limit = 4 * problem.shard  # [chunk_tokens, v]; the weight's gradient [v, 3] and all of [T, K] are smaller
    for name, forward in functions_under_watch(problem).items():
        with Watch() as watch:
            loss = forward()
        if world() is not None:
            assert 1 <= len(watch.collectives) <= 2, f"{name} forward: {watch.collectives}"
        assert watch.largest <= limit, f"{name} forward made {watch.largest} elements, [chunk, v] is {limit}"
        with Watch() as watch:
            loss.backward()
        assert watch.collectives == [], f"{name} backward: {watch.collectives}"
        assert watch.largest <= limit, f"{name} backward made {watch.largest} elements, [chunk, v] is {limit}"


@pytest.mark.parametrize("world_size", [0, 2], ids="tp{}".format)
def test_two_collectives_forward_none_backward_and_never_more_than_a_chunk_of_logits(world_size: int) -> None:
    on_ranks(check_traffic_and_memory, world_size=world_size)


def test_the_watch_sees_the_logits_of_the_plain_formula_forward_and_backward() -> None:
    problem = Problem(tokens=96, vocab=2803, hidden=3)
    hidden, weight = (x.requires_grad_() for x in problem.student())
    with Watch() as watch:
        logprob_TK = textbook_logprobs(hidden, weight, ids_of(problem, "random"), 1.0)[0]
    assert watch.largest == 96 * 2803
    with Watch() as watch:
        logprob_TK.sum().backward()
    assert watch.largest == 96 * 2803


# --------------------------------------------------------------------------- errors


def call(**changes: Any) -> None:
    options: dict[str, Any] = {"ids": torch.zeros(3, 2, dtype=torch.int64), "vocab_size": 5, "hidden": torch.ones(3, 4)}
    options |= {"weight": torch.ones(6, 4)} | changes
    linear_logprobs(options.pop("hidden"), options.pop("weight"), options.pop("ids"), **options)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"ids": torch.tensor([[0], [5], [1]])}, DataError, r"token id 5 is outside the vocabulary \[0, 5\)"),
        ({"ids": torch.tensor([[0], [-1], [1]])}, DataError, "token id -1 is outside"),
        ({"ids": torch.zeros(2, 1, dtype=torch.int64)}, DataError, r"ids must be int64 \[3, K\].*\[2, 1\]"),
        ({"ids": torch.zeros(3, 1)}, DataError, "ids must be int64"),
        ({"vocab_size": 7}, ConfigError, "vocab_size 7 does not fit 1 weight shards of 6 rows"),
        ({"vocab_size": 0}, ConfigError, "vocab_size 0 does not fit"),
        ({"temperature": 0.0}, ConfigError, "temperature must be positive and finite, got 0.0"),
        ({"temperature": float("nan")}, ConfigError, "temperature must be positive"),
        ({"chunk_tokens": 0}, ConfigError, "chunk_tokens must be at least 1, got 0"),
        ({"hidden": torch.ones(3, 5)}, ConfigError, r"\[3, 5\] and weight \[6, 4\]"),
        ({"hidden": torch.ones(3, 4).bfloat16()}, ConfigError, r"bfloat16.*float32.*cast both"),
    ],
    ids=lambda x: "" if isinstance(x, (dict, type)) else x[:24],
)
def test_bad_input_gets_an_error_that_names_it(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    call()
    with pytest.raises(error, match=message) as caught:
        call(**changes)
    assert isinstance(caught.value, ValueError)


def test_bad_divergence_and_topk_options_get_an_error_that_names_them() -> None:
    hidden, weight = torch.ones(3, 4), torch.ones(6, 4)
    with pytest.raises(ConfigError, match=r"'kl'.*forward_kl, reverse_kl, jsd"):
        linear_divergence(hidden, weight, hidden, weight, kind="kl", vocab_size=6)
    with pytest.raises(ConfigError, match=r"beta in \[0, 1\], got 1.5"):
        linear_divergence(hidden, weight, hidden, weight, kind="jsd", beta=1.5, vocab_size=6)
    with pytest.raises(ConfigError, match="has 5 rows and the student's 6: cut the teacher's weight"):
        linear_divergence(hidden, weight, hidden, weight[:5], kind="jsd", vocab_size=5)
    with pytest.raises(ConfigError, match="student has 3 hidden states and teacher 2"):
        linear_divergence(hidden, weight, hidden[:2], weight, kind="jsd", vocab_size=5)
    for k in (0, 6):
        with pytest.raises(ConfigError, match=rf"k must lie in \[1, vocab_size\] = \[1, 5\], got {k}"):
            linear_topk(hidden, weight, k, vocab_size=5)
