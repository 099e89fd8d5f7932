"""In bf16, log-probs and divergence gradients stay with fp64 of the same bf16 inputs, however near student and teacher.

Claim 3 of docs/correctness.md. What is compared is in ``tests/support/precision.py``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tropd.engine.decode import _logits
from megatron_tropd.losses.end_class import at_ids, with_ends
from megatron_tropd.losses.vocab_parallel import linear_divergence, linear_logprobs, linear_topk, projection
from megatron_tropd.losses.vocab_parallel.backends.triton import kernels
from tests.support.precision import (
    ENDS,
    GRADIENT_LIMIT,
    KINDS,
    KLS,
    LOGPROB_LIMIT,
    TOKENS,
    VOCAB,
    WORLDS,
    Models,
    measured,
    models,
    models_with_ends,
    of_plain_bf16,
    plain,
)

# where CI demands the compiled twins it demands the kernels' interpreter, too
REQUIRED = os.environ.get("MEGATRON_TROPD_REQUIRE_COMPILED", "0") not in ("", "0")


@pytest.fixture(scope="module", params=WORLDS, ids="{}-ranks".format)
def world(request: pytest.FixtureRequest) -> int:
    return request.param


def test_bf16_log_probs_err_by_less_than_1e_4_nats_where_plain_bf16_errs_a_hundred_times_more(world: int) -> None:
    for kl, budget in measured(world).items():
        assert budget.logprob < LOGPROB_LIMIT, kl
        assert of_plain_bf16()[kl].logprob > 100 * budget.logprob, kl


def test_bf16_divergence_gradients_err_by_less_than_1e_2_down_to_1e_5_nats(world: int) -> None:
    found = {(kl, kind): error for kl, budget in measured(world).items() for kind, error in budget.gradients.items()}
    assert len(found) == len(KLS) * len(KINDS)
    assert {key: error for key, error in found.items() if not 1e-4 < error < GRADIENT_LIMIT} == {}


def test_plain_bf16_turns_the_reverse_kl_gradient_near_the_teacher() -> None:
    """What fp32 results are for: its error grows without bound as the student nears the teacher."""
    errors = [of_plain_bf16()[kl].gradients["reverse_kl"] for kl in KLS]
    assert errors[0] < 0.1 and errors[-1] > 1.0 and errors == sorted(errors)


def test_the_models_are_as_far_apart_as_they_are_said_to_be() -> None:
    for kl in KLS:
        given = models(kl)
        logq_TV, logp_TV = ((hidden @ weight.t()).log_softmax(-1) for hidden, weight in (given.student, given.teacher))
        assert float((logq_TV.exp() * (logq_TV - logp_TV)).sum(-1).mean()) == pytest.approx(kl, rel=0.02)
        assert all(torch.equal(x, x.bfloat16().double()) for x in (*given.student, *given.teacher))


# --------------------------------------------------------------------------- every path to a log-prob


def _as_wide_results(real: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Give a CPU what the call does on CUDA: bf16 factors, fp32 sum and result."""

    def product(*tensors: Tensor, out_dtype: torch.dtype | None = None, out: Tensor | None = None, **factors: float):
        if out is None or out.is_meta:
            return real(*tensors, out_dtype=out_dtype, **factors)
        if out_dtype is None:
            return real(*tensors, out=out, **factors)
        *total, left, right = tensors
        assert left.dtype == right.dtype == torch.bfloat16 and out.dtype == out_dtype == torch.float32
        # what torch itself says of such a call: the same on tensors without data, by the operator CUDA has
        bare = real(*(x.to("meta") for x in tensors), out_dtype=out_dtype, **factors)
        assert (bare.shape, bare.dtype) == (out.shape, out.dtype)
        return real(*total, left.float(), right.float(), out=out, **factors)

    return product


@pytest.fixture(params=["cpu", "as on a GPU", "as on a GPU, by kernels"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The ways a tile's product can go; the last two without a GPU, by stand-ins for its products."""
    if request.param != "cpu":
        monkeypatch.setattr(projection, "factor_dtype", lambda hidden_TD: hidden_TD.dtype)
        for name in ("mm", "addmm"):
            monkeypatch.setattr(torch, name, _as_wide_results(getattr(torch, name)))
    if request.param.endswith("kernels"):
        if not kernels.installed() and not REQUIRED:
            pytest.skip("Triton is optional here")
        monkeypatch.setenv(kernels.SWITCH, "interpret")
    yield request.param


def few(kl: float) -> dict[str, Any]:
    """The first five tokens of the models in bf16, with fp64 log-probs: kernels are interpreted row by row."""
    given = models(kl)
    exact = {name: getattr(given, name) for name in ("student", "teacher")}
    return {
        "student": [x.bfloat16().requires_grad_() for x in (exact["student"][0][:5], exact["student"][1])],
        "teacher": [exact["teacher"][0][:5].bfloat16(), exact["teacher"][1].bfloat16()],
        "target": given.target_T[:5, None],
        "logq": (exact["student"][0][:5] @ exact["student"][1].t()).log_softmax(-1),
    }


@pytest.mark.parametrize("chunk_tokens", [None, 2])
def test_log_probs_top_k_tails_and_cached_tiles_are_exact_on_every_path(path: str, chunk_tokens: int | None) -> None:
    case = few(1e-3)
    options: dict[str, Any] = {"vocab_size": VOCAB, "chunk_tokens": chunk_tokens, "tail": True}
    listed_TV = torch.zeros_like(case["logq"], dtype=torch.bool)
    out = linear_logprobs(*case["student"], case["target"], **options)
    kept = linear_logprobs(*case["student"], case["target"], **options, cache_bytes=10**8)
    top = linear_topk(*case["student"], 7, ids_TJ=case["target"], **options)
    assert out.logtail_T is not None and top.logtail_T is not None and top.picked_logprob_TJ is not None
    exact_T1 = case["logq"].gather(1, case["target"])
    for found, exact in (
        (out.logprob_TK, exact_T1),
        (top.picked_logprob_TJ, exact_T1),
        (top.logprob_TK, case["logq"].topk(7).values),
        (out.logtail_T, case["logq"].masked_fill(listed_TV.scatter(1, case["target"], True), -torch.inf).logsumexp(-1)),
        (out.entropy_T, -(case["logq"].exp() * case["logq"]).sum(-1)),
    ):
        assert float((found.detach().double() - exact).abs().max()) < 2e-5, path
    assert torch.equal(top.ids_TK, case["logq"].topk(7).indices)
    first, again = (torch.autograd.grad(x.logprob_TK.sum() + x.logtail_T.sum(), case["student"]) for x in (out, kept))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("chunk_tokens", [None, 2])
def test_divergence_gradients_near_the_teacher_are_right_on_every_path(path: str, chunk_tokens: int | None) -> None:
    for kind in KINDS:
        case = few(1e-5)
        options: dict[str, Any] = {"vocab_size": VOCAB, "chunk_tokens": chunk_tokens, "kind": kind}
        loss_T = linear_divergence(*case["student"], *case["teacher"], **options)
        found = torch.autograd.grad(loss_T.mean(), case["student"])
        exact = plain_gradient(kind)
        for name, a, b in zip(("hidden", "weight"), found, exact, strict=True):
            error = float((a.double() - b).norm() / b.norm())
            # the interpreter rounds to bfloat16 by cutting digits off
            assert error < GRADIENT_LIMIT, f"{name} of {kind}, {path}: {error:.1e}"


@pytest.mark.parametrize("chunk_tokens", [None, 2])
def test_ends_that_are_far_apart_cost_no_digits_where_they_are_one_class(path: str, chunk_tokens: int | None) -> None:
    """Student and teacher each end with an id that the other gives 25 nats less, and agree to 1e-5 nats otherwise."""
    given = models_with_ends(1e-5)
    student = [x.bfloat16().requires_grad_() for x in (given.student[0][:5], given.student[1])]
    teacher = [given.teacher[0][:5].bfloat16(), given.teacher[1].bfloat16()]
    options: dict[str, Any] = {"vocab_size": VOCAB, "chunk_tokens": chunk_tokens}
    out = linear_logprobs(*student, with_ends(given.target_T[:5, None], ENDS), **options)
    class_T = at_ids(out.logprob_TK[:, 0], torch.full((5,), ENDS[1]), ENDS, out.logprob_TK[:, 1:])
    exact_T = (given.student[0][:5] @ given.student[1].t()).log_softmax(-1)[:, list(ENDS)].logsumexp(-1)
    assert exact_T.max() > -1.0 > exact_T.min() and class_T.dtype == torch.float32
    assert float((class_T.detach().double() - exact_T).abs().max()) < 2e-5, path
    for kind in KINDS:
        found = torch.autograd.grad(
            linear_divergence(*student, *teacher, kind=kind, end_ids=ENDS, **options).mean(), student
        )
        for name, a, b in zip(("hidden", "weight"), found, plain_gradient(kind, given, ENDS), strict=True):
            error = float((a.double() - b).norm() / b.norm())
            assert error < GRADIENT_LIMIT, f"{name} of {kind}, {path}: {error:.1e}"


def plain_gradient(kind: str, given: Models | None = None, ends: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Fp64 autograd of the textbook formula on the first five tokens, the columns of ``ends`` merged."""
    given = given or models(1e-5)
    student = [given.student[0][:5].clone().requires_grad_(), given.student[1].clone().requires_grad_()]
    logq_TV, logp_TV = (
        _merged((hidden @ weight.t()).log_softmax(-1), ends)
        for hidden, weight in (student, (given.teacher[0][:5], given.teacher[1]))
    )
    logm_TV = torch.logaddexp(logq_TV, logp_TV) - torch.tensor(2.0).log()

    def kl(a_TV: Tensor, b_TV: Tensor) -> Tensor:
        return (a_TV.exp() * (a_TV - b_TV)).sum(-1)

    loss_T = {
        "reverse_kl": kl(logq_TV, logp_TV),
        "forward_kl": kl(logp_TV, logq_TV),
        "jsd": 0.5 * (kl(logp_TV, logm_TV) + kl(logq_TV, logm_TV)),
    }[kind]
    return torch.autograd.grad(loss_T.mean(), student)


def _merged(log_TV: Tensor, ends: tuple[int, ...]) -> Tensor:
    if not ends:
        return log_TV
    kept = [i for i in range(VOCAB) if i not in ends]
    return torch.cat([log_TV[:, kept], log_TV[:, list(ends)].logsumexp(-1, keepdim=True)], dim=1)


class _Chunk:
    def __init__(self, weight_vD: Tensor) -> None:
        self._weight_vD = weight_vD

    def output_weight(self) -> Tensor:
        return self._weight_vD


class _Model:
    """As much of a model as the sampler's logits take, on one rank."""

    def __init__(self, weight_vD: Tensor) -> None:
        self.chunks, self.groups = [_Chunk(weight_vD)], self
        self.tp = None


def test_the_embedded_sampler_s_log_probs_are_as_exact_as_the_trainer_s(path: str) -> None:
    given = models(1e-3)
    hidden_BD, weight_VD = (x.bfloat16() for x in given.student)
    logits_BV = _logits(_Model(torch.cat([weight_VD, weight_VD[:5]])), hidden_BD, VOCAB)  # type: ignore[arg-type]
    assert logits_BV.dtype == torch.float32 and logits_BV.shape == (TOKENS, VOCAB)
    found_T = logits_BV.log_softmax(-1).gather(1, given.target_T[:, None])[:, 0]
    exact_T = plain(1e-3, torch.float64)["logprob"]
    assert float((found_T.double() - exact_T).abs().max()) < 2e-5
