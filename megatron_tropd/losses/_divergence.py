"""Full-vocabulary divergences between a student and a teacher, from hidden states and output weights.

With ``q`` the student's softmax, ``p`` the teacher's and ``z`` the student's logits (methods.md):

    kind         loss                                                  d loss / d z_j
    forward_kl   sum p (log p - log q)                                 q_j - p_j
    reverse_kl   sum q (log q - log p)                                 q_j (log q_j - log p_j - KL)
    jsd          b KL(p||m) + (1-b) KL(q||m),  m = b p + (1-b) q       (1-b) q_j (log q_j - log m_j - KL(q||m))

The last gradient follows from dL/dq_j = (1-b) (log q_j - log m_j) + const, in which the two 1/m terms cancel. All three
vanish exactly when both models make the same logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor

from megatron_tropd.errors import ConfigError
from megatron_tropd.losses._chunking import (
    Buffer,
    Projection,
    ProjectionGradient,
    Tiles,
    check_projection,
    check_temperature,
    plan_tiles,
    shard_of,
    statistics_dtype,
)
from megatron_tropd.losses._divergence_math import (
    CHUNK_GRADIENT,
    KlStatistics,
    TileSoftmax,
    chunk_kl,
    chunk_mixture_kl,
    merge_kl_ranks,
)
from megatron_tropd.losses._statistics import Statistics, chunk_statistics, merge_ranks
from megatron_tropd.parallel.collectives import Group, all_gather_stack, all_reduce_sum

Kind = Literal["forward_kl", "reverse_kl", "jsd"]
_X = TypeVar("_X")


def linear_divergence(
    student_hidden_TD: Tensor,
    student_weight_vD: Tensor,
    teacher_hidden_TE: Tensor,
    teacher_weight_vE: Tensor,
    *,
    kind: str,
    beta: float = 0.5,
    group: Group = None,
    vocab_size: int,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Divergence of two softmaxes per token, ``loss_T``, nats, fp32; gradient to the student's two tensors only.

    Args and sharding as ``linear_logprobs``; one collective forward (two for the jsd), none backward.
        teacher_weight_vE: the teacher's output weight **cut by the student's partition**: row i of this rank is the
            same token as row i of ``student_weight_vD``. Its dtype and hidden size are its own.
        kind: ``forward_kl`` KL(teacher || student), ``reverse_kl`` KL(student || teacher), or ``jsd``.
        beta: weight of the teacher in the jsd's mixture, in [0, 1]; 0 is forward_kl and 1 is reverse_kl.
        vocab_size: true size that both share; each softmax runs over those ids only.

    Raises:
        ConfigError: an unknown kind, or sizes, dtypes or options that do not fit together.
    """
    check_projection(student_hidden_TD, student_weight_vD, who="student ")
    check_projection(teacher_hidden_TE, teacher_weight_vE, who="teacher ")
    check_temperature(temperature)
    if teacher_hidden_TE.shape[0] != student_hidden_TD.shape[0]:
        raise ConfigError(
            f"student has {student_hidden_TD.shape[0]} hidden states and teacher {teacher_hidden_TE.shape[0]}: "
            "both must describe the same tokens."
        )
    if teacher_weight_vE.shape[0] != student_weight_vD.shape[0]:
        raise ConfigError(
            f"the teacher's weight shard has {teacher_weight_vE.shape[0]} rows and the student's "
            f"{student_weight_vD.shape[0]}: cut the teacher's weight by the student's vocabulary partition."
        )
    shard = shard_of(student_weight_vD, vocab_size=vocab_size, group=group)
    tiles = plan_tiles(student_hidden_TD, student_weight_vD, shard, chunk_tokens=chunk_tokens)
    plan = _Plan(kind=_resolve(kind, beta), beta=beta, tiles=tiles, temperature=temperature, group=group)
    return _LinearDivergence.apply(
        student_hidden_TD, student_weight_vD, teacher_hidden_TE.detach(), teacher_weight_vE.detach(), plan
    )


def _resolve(kind: str, beta: float) -> Kind:
    if kind not in get_args(Kind):
        raise ConfigError(f"unknown divergence {kind!r}. Choose one of {', '.join(get_args(Kind))}.")
    if kind != "jsd":
        return kind  # type: ignore[return-value]
    if not 0.0 <= beta <= 1.0:
        raise ConfigError(f"jsd needs beta in [0, 1], got {beta}.")
    return {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd")  # type: ignore[return-value]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    kind: Kind
    beta: float
    tiles: Tiles
    temperature: float
    group: Group


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, plan = args
        value = _jsd_value if plan.kind == "jsd" else _kl_value
        student, teacher, loss_T, centre_T = value(_Pair(tensors, plan), plan)
        ctx.save_for_backward(*tensors, student.max_T, student.sumexp_T, teacher.max_T, teacher.sumexp_T, centre_T)
        ctx.plan = plan
        return loss_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        student_TD, weight_vD, teacher_TE, weight_vE, *saved = ctx.saved_tensors
        plan: _Plan = ctx.plan
        gradient = ProjectionGradient(
            student_TD,
            weight_vD,
            tiles=plan.tiles,
            temperature=plan.temperature,
            needs_hidden=ctx.needs_input_grad[0],
            needs_weight=ctx.needs_input_grad[1],
        )
        pair = _Pair([student_TD, weight_vD, teacher_TE, weight_vE], plan)
        saved_T1 = [x_T.unsqueeze(-1) for x_T in (*saved, grads[0])]
        chunk_gradient = CHUNK_GRADIENT[plan.kind]
        for rows, columns in plan.tiles:
            student_Rw, teacher_Rw = pair.logits(rows, columns)
            max_R1, sumexp_R1, teacher_max_R1, teacher_sumexp_R1, centre_R1, grad_R1 = (x_T1[rows] for x_T1 in saved_T1)
            student = TileSoftmax(logits_Rw=student_Rw, max_R1=max_R1, sumexp_R1=sumexp_R1)
            teacher = TileSoftmax(logits_Rw=teacher_Rw, max_R1=teacher_max_R1, sumexp_R1=teacher_sumexp_R1)
            dlogits_Rw = chunk_gradient(student, teacher, centre_R1=centre_R1, grad_R1=grad_R1, beta=plan.beta)
            gradient.add(rows, columns, dlogits_Rw)
        return *gradient.result(), None, None, None


class _Pair:
    """Makes tiles of both models' logits, in the dtype of the student's statistics."""

    def __init__(self, tensors: Sequence[Tensor], plan: _Plan) -> None:
        student_TD, weight_vD, teacher_TE, weight_vE = tensors
        self.dtype, self.device, self.num_tokens = statistics_dtype(student_TD), student_TD.device, len(student_TD)
        self._student = Projection(student_TD, weight_vD, tiles=plan.tiles, temperature=plan.temperature)
        self._teacher = Projection(teacher_TE, weight_vE, tiles=plan.tiles, temperature=plan.temperature)

    def logits(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """(student, teacher) logits ``[R, w]``, free to overwrite."""
        return self._student.logits(rows, columns), self._teacher.logits(rows, columns).to(self.dtype)

    def no_statistics(self) -> tuple[Statistics, Statistics]:
        """Empty statistics of both."""
        student, teacher = (Statistics.empty(self.num_tokens, dtype=self.dtype, device=self.device) for _ in range(2))
        return student, teacher


# What the two values below return: both models' statistics over all ranks, the loss, and the mean under q that the
# gradient subtracts (``centre`` in _divergence_math).
_Value: TypeAlias = tuple[Statistics, Statistics, Tensor, Tensor]


def _kl_value(pair: _Pair, plan: _Plan) -> _Value:
    """One pass over the tiles and one collective."""
    local = KlStatistics(*pair.no_statistics(), torch.zeros(pair.num_tokens, dtype=pair.dtype, device=pair.device))
    scratch = Buffer(plan.tiles, dtype=pair.dtype, device=pair.device)
    for rows, columns in plan.tiles:
        a_Rw, b_Rw = _ordered(plan, *pair.logits(rows, columns))
        local.merge_(rows, chunk_kl(a_Rw, b_Rw, scratch.tile(rows, columns)))
    whole = merge_kl_ranks(all_gather_stack(local.stacked(), plan.group))
    return *_ordered(plan, whole.first, whole.second), whole.kl_T, whole.mean_gap_T


def _ordered(plan: _Plan, student: _X, teacher: _X) -> tuple[_X, _X]:
    """(the one the expectation is under, the other); its own inverse."""
    return (teacher, student) if plan.kind == "forward_kl" else (student, teacher)


def _jsd_value(pair: _Pair, plan: _Plan) -> _Value:
    """Two passes and two collectives: the mixture needs both log-probabilities."""
    student, teacher = pair.no_statistics()
    scratch = Buffer(plan.tiles, dtype=pair.dtype, device=pair.device)
    for rows, columns in plan.tiles:
        student_Rw, teacher_Rw = pair.logits(rows, columns)
        student.merge_(rows, chunk_statistics(student_Rw, scratch.tile(rows, columns)))
        teacher.merge_(rows, chunk_statistics(teacher_Rw, scratch.tile(rows, columns)))
    every_n6T = all_gather_stack(torch.cat([student.stacked(), teacher.stacked()]), plan.group)
    student, teacher = merge_ranks(every_n6T[:, :3]), merge_ranks(every_n6T[:, 3:])

    kl_2T = torch.zeros(2, pair.num_tokens, dtype=pair.dtype, device=pair.device)  # KL(p||m), KL(q||m)
    for rows, columns in plan.tiles:
        student_Rw, teacher_Rw = pair.logits(rows, columns)
        kl_2T[:, rows] += chunk_mixture_kl(
            TileSoftmax.of(student_Rw, student, rows),
            TileSoftmax.of(teacher_Rw, teacher, rows),
            beta=plan.beta,
        )
    kl_2T = all_reduce_sum(kl_2T, plan.group)
    loss_T = plan.beta * kl_2T[0] + (1.0 - plan.beta) * kl_2T[1]
    return student, teacher, loss_T, kl_2T[1]
