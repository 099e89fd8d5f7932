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
from megatron_tropd.losses.vocab_parallel.backends import kernels
from megatron_tropd.losses.vocab_parallel.backends import triton_tiles as _kernel_tiles
from megatron_tropd.losses.vocab_parallel.backends.torch_divergence import (
    CHUNK_GRADIENT,
    KlStatistics,
    TileSoftmax,
    chunk_kl,
    chunk_mixture_kl,
    merge_kl_ranks,
)
from megatron_tropd.losses.vocab_parallel.backends.torch_statistics import Statistics, chunk_statistics, merge_ranks
from megatron_tropd.losses.vocab_parallel.tiles import (
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
    cache_bytes: int = 0,
) -> Tensor:
    """Divergence of two softmaxes per token, ``loss_T``, nats, fp32; gradient to the student's two tensors only.

    Args and sharding as ``linear_logprobs``; one collective forward (two for the jsd), none backward.
        teacher_weight_vE: the teacher's output weight **cut by the student's partition**: row i of this rank is the
            same token as row i of ``student_weight_vD``. Its dtype and hidden size are its own.
        kind: ``forward_kl`` KL(teacher || student), ``reverse_kl`` KL(student || teacher), or ``jsd``.
        beta: weight of the teacher in the jsd's mixture, in [0, 1]; 0 is forward_kl and 1 is reverse_kl.
        vocab_size: true size that both share; each softmax runs over those ids only.
        cache_bytes: half of it for either model's products.

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
    by_kernels = all(kernels.serve(x.device, x.dtype) for x in (student_hidden_TD, teacher_hidden_TE))
    plan = _Plan(
        kind=_resolve(kind, beta),
        beta=beta,
        tiles=plan_tiles(student_hidden_TD, student_weight_vD, shard, chunk_tokens=chunk_tokens, by_kernels=by_kernels),
        temperature=temperature,
        group=group,
        by_kernels=by_kernels,
        cache_bytes=cache_bytes,
    )
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
    by_kernels: bool
    cache_bytes: int


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, plan = args
        value = _jsd_value if plan.kind == "jsd" else _kl_value
        pair = _Pair(tensors, plan, cache_bytes=plan.cache_bytes if any(ctx.needs_input_grad) else 0)
        student, teacher, loss_T, centre_T = value(pair, plan)
        numbers = (student.max_T, student.sumexp_T, teacher.max_T, teacher.sumexp_T, centre_T)
        ctx.kept = [len(projection.kept) for projection in (pair.student, pair.teacher)]
        ctx.save_for_backward(*tensors, *numbers, *pair.student.kept, *pair.teacher.kept)
        ctx.plan = plan
        return loss_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors, numbers, kept = (
            ctx.saved_tensors[:4],
            [*ctx.saved_tensors[4:9], grads[0].contiguous()],
            ctx.saved_tensors[9:],
        )
        plan: _Plan = ctx.plan
        gradient = ProjectionGradient(
            *tensors[:2],
            tiles=plan.tiles,
            temperature=plan.temperature,
            needs_hidden=ctx.needs_input_grad[0],
            needs_weight=ctx.needs_input_grad[1],
        )
        pair = _Pair(tensors, plan, kept=(kept[: ctx.kept[0]], kept[ctx.kept[0] :]))
        dlogits = _kernel_gradient if plan.by_kernels else _plain_gradient
        for tile in plan.tiles:
            gradient.add(*tile, dlogits(pair, plan, tile, numbers))
        return *gradient.result(), None, None, None


def _plain_gradient(pair: _Pair, plan: _Plan, tile: tuple[slice, slice], numbers: list[Tensor]) -> Tensor:
    student_Rw, teacher_Rw = pair.logits(*tile)
    max_s_R1, sumexp_s_R1, max_t_R1, sumexp_t_R1, centre_R1, grad_R1 = (x_T[tile[0]].unsqueeze(-1) for x_T in numbers)
    return CHUNK_GRADIENT[plan.kind](
        TileSoftmax(logits_Rw=student_Rw, max_R1=max_s_R1, sumexp_R1=sumexp_s_R1),
        TileSoftmax(logits_Rw=teacher_Rw, max_R1=max_t_R1, sumexp_R1=sumexp_t_R1),
        centre_R1=centre_R1,
        grad_R1=grad_R1,
        beta=plan.beta,
    )


def _kernel_gradient(pair: _Pair, plan: _Plan, tile: tuple[slice, slice], numbers: list[Tensor]) -> Tensor:
    return _kernel_tiles.divergence_gradient(pair.student, pair.teacher, tile, numbers, kind=plan.kind, beta=plan.beta)


class _Pair:
    """Makes tiles of both models' logits, in the dtype of the student's statistics."""

    def __init__(
        self,
        tensors: Sequence[Tensor],
        plan: _Plan,
        *,
        cache_bytes: int = 0,
        kept: tuple[Sequence[Tensor], Sequence[Tensor]] = ((), ()),
    ) -> None:
        student_TD, weight_vD, teacher_TE, weight_vE = tensors
        self.dtype, self.device, self.num_tokens = statistics_dtype(student_TD), student_TD.device, len(student_TD)
        self.student, self.teacher = (
            Projection(
                *model,
                tiles=plan.tiles,
                temperature=plan.temperature,
                cache_bytes=cache_bytes // 2,
                kept=kept[number],
            )
            for number, model in enumerate([(student_TD, weight_vD), (teacher_TE, weight_vE)])
        )

    def logits(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """(student, teacher) logits ``[R, w]``, free to overwrite."""
        return self.student.logits(rows, columns), self.teacher.logits(rows, columns).to(self.dtype)

    def nothing(self) -> KlStatistics:
        """Empty statistics of both."""
        student, teacher = (Statistics.empty(self.num_tokens, dtype=self.dtype, device=self.device) for _ in range(2))
        return KlStatistics(student, teacher, torch.zeros(self.num_tokens, dtype=self.dtype, device=self.device))


# What the two values below return: both models' statistics over all ranks, the loss, and the mean under q that the
# gradient subtracts (``centre`` in _divergence_math).
_Value: TypeAlias = tuple[Statistics, Statistics, Tensor, Tensor]


def _kl_value(pair: _Pair, plan: _Plan) -> _Value:
    """One pass over the tiles and one collective."""
    local = pair.nothing()
    if plan.by_kernels:
        _kernel_tiles.add_pair(*_ordered(plan, pair.student, pair.teacher), plan.tiles, local)
    else:
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
    local = pair.nothing()
    if plan.by_kernels:
        _kernel_tiles.add_pair(pair.student, pair.teacher, plan.tiles, local)
    else:
        scratch = Buffer(plan.tiles, dtype=pair.dtype, device=pair.device)
        for rows, columns in plan.tiles:
            student_Rw, teacher_Rw = pair.logits(rows, columns)
            local.first.merge_(rows, chunk_statistics(student_Rw, scratch.tile(rows, columns)))
            local.second.merge_(rows, chunk_statistics(teacher_Rw, scratch.tile(rows, columns)))
    every_n6T = all_gather_stack(local.stacked()[:6], plan.group)
    student, teacher = merge_ranks(every_n6T[:, :3]), merge_ranks(every_n6T[:, 3:])

    kl_2T = all_reduce_sum(_mixture_kl(pair, plan, student, teacher), plan.group)
    loss_T = plan.beta * kl_2T[0] + (1.0 - plan.beta) * kl_2T[1]
    return student, teacher, loss_T, kl_2T[1]


def _mixture_kl(pair: _Pair, plan: _Plan, student: Statistics, teacher: Statistics) -> Tensor:
    """This rank's part of KL(p||m) and KL(q||m), ``[2, T]``."""
    if plan.by_kernels:
        numbers = [student.max_T, student.sumexp_T, teacher.max_T, teacher.sumexp_T]
        return _kernel_tiles.mixture_kl(pair.student, pair.teacher, plan.tiles, numbers, beta=plan.beta)
    kl_2T = torch.zeros(2, pair.num_tokens, dtype=pair.dtype, device=pair.device)
    for rows, columns in plan.tiles:
        student_Rw, teacher_Rw = pair.logits(rows, columns)
        kl_2T[:, rows] += chunk_mixture_kl(
            TileSoftmax.of(student_Rw, student, rows),
            TileSoftmax.of(teacher_Rw, teacher, rows),
            beta=plan.beta,
        )
    return kl_2T
