"""Full-vocabulary divergences between a student and a teacher, from hidden states and output weights.

With ``q`` the student's softmax, ``p`` the teacher's and ``z`` the student's logits (methods.md):

    kind         loss                                                  d loss / d z_j
    forward_kl   sum p (log p - log q)                                 q_j - p_j
    reverse_kl   sum q (log q - log p)                                 q_j (log q_j - log p_j - KL)
    jsd          b KL(p||m) + (1-b) KL(q||m),  m = b p + (1-b) q       (1-b) q_j (log q_j - log m_j - KL(q||m))

The last gradient follows from dL/dq_j = (1-b) (log q_j - log m_j) + const, in which the two 1/m terms cancel. All three
vanish exactly when both models make the same logits. With ``end_ids``, these are one category of ``q``, ``p`` and ``m``
(``end_columns.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor

from megatron_tropd.errors import ConfigError
from megatron_tropd.losses.vocab_parallel.backends import choose_backend
from megatron_tropd.losses.vocab_parallel.backends.protocol import Backend, DivergenceGradient, Kind
from megatron_tropd.losses.vocab_parallel.checks import check_projection, check_temperature
from megatron_tropd.losses.vocab_parallel.end_columns import EndColumns, gradient_of_ids
from megatron_tropd.losses.vocab_parallel.projection import Factors, Projection, ProjectionGradient
from megatron_tropd.losses.vocab_parallel.statistics import KlStatistics, Normalizer, merge_kl_ranks, merge_ranks
from megatron_tropd.losses.vocab_parallel.tiles import Tiles, plan_tiles, shard_of
from megatron_tropd.parallel.collectives import Group, all_gather_stack, all_reduce_sum

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
    end_ids: Sequence[int] = (),
) -> Tensor:
    """Take the divergence of two softmaxes per token, ``loss_T``, nats, fp32; gradient to the student's two only.

    Args and sharding as ``linear_logprobs``; one collective forward (two for the jsd, one more for ``end_ids``), none
    backward.
        teacher_weight_vE: the teacher's output weight **cut by the student's partition**: row i of this rank is the
            same token as row i of ``student_weight_vD``. Its dtype and hidden size are its own.
        kind: ``forward_kl`` KL(teacher || student), ``reverse_kl`` KL(student || teacher), or ``jsd``.
        beta: weight of the teacher in the jsd's mixture, in [0, 1]; 0 is forward_kl and 1 is reverse_kl.
        vocab_size: true size that both share; each softmax runs over those ids only.
        cache_bytes: half of it for either model's logits.
        end_ids: ids that count as one category of both softmaxes, such as all that end a response.

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
    backend = choose_backend(student_hidden_TD, teacher_hidden_TE)
    limits = backend.limits(student_hidden_TD.device)
    plan = _DivergencePlan(
        kind=_resolve(kind, beta),
        beta=beta,
        tiles=plan_tiles(student_hidden_TD, student_weight_vD, shard, chunk_tokens=chunk_tokens, limits=limits),
        temperature=temperature,
        group=group,
        backend=backend,
        cache_bytes=cache_bytes,
        ends=EndColumns.of(end_ids, shard, vocab_size=vocab_size) if end_ids else None,
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
class _DivergencePlan:
    kind: Kind
    beta: float
    tiles: Tiles
    temperature: float
    group: Group
    backend: Backend
    cache_bytes: int
    ends: EndColumns | None

    def ordered(self, student: _X, teacher: _X) -> tuple[_X, _X]:
        """Return (the one the expectation is under, the other); its own inverse."""
        return (teacher, student) if self.kind == "forward_kl" else (student, teacher)

    def projections(
        self,
        student: Factors,
        teacher: Factors,
        *,
        cache_bytes: int = 0,
        cached_tiles: tuple[Sequence[Tensor], Sequence[Tensor]] = ((), ()),
        ends_nTX: Tensor | None = None,
    ) -> _Pair:
        """Project both models' hidden states; the cache is shared half and half. ``ends_nTX``: products of the ends."""
        shape: dict[str, Any] = {"tiles": self.tiles, "temperature": self.temperature, "cache_bytes": cache_bytes // 2}
        class_columns: list[Sequence[tuple[int, Tensor]]] = [(), ()]
        if ends_nTX is not None and self.ends is not None:
            class_columns = [self.ends.replaced(ends_TX, temperature=self.temperature) for ends_TX in ends_nTX]
        return (
            Projection(student, cached_tiles=cached_tiles[0], replaced=class_columns[0], **shape),
            Projection(teacher, cached_tiles=cached_tiles[1], replaced=class_columns[1], **shape),
        )


class _LinearDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        *tensors, plan = args
        factors = (Factors(*tensors[:2]), Factors(*tensors[2:]))
        ends_nTX = None
        if plan.ends is not None:
            ends_nTX = plan.ends.products(factors, tiles=plan.tiles, group=plan.group)
        cache_bytes = plan.cache_bytes if any(ctx.needs_input_grad) else 0
        pair = plan.projections(*factors, cache_bytes=cache_bytes, ends_nTX=ends_nTX)
        value = _jsd_value if plan.kind == "jsd" else _kl_value
        student, teacher, loss_T, center_T = value(pair, plan)
        numbers = (student.max_T, student.sumexp_T, teacher.max_T, teacher.sumexp_T, center_T, loss_T, ends_nTX)
        ctx.num_cached = len(pair[0].cached_tiles)
        ctx.save_for_backward(*tensors, *numbers, *pair[0].cached_tiles, *pair[1].cached_tiles)
        ctx.plan = plan
        return loss_T

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, max_s_T, sumexp_s_T, max_t_T, sumexp_t_T, center_T, loss_T, ends_nTX = ctx.saved_tensors[:11]
        cached_tiles, plan = ctx.saved_tensors[11:], ctx.plan
        student, teacher = Factors(*tensors[:2]), Factors(*tensors[2:])
        split = (cached_tiles[: ctx.num_cached], cached_tiles[ctx.num_cached :])
        gradient = DivergenceGradient(
            kind=plan.kind,
            beta=plan.beta,
            student=Normalizer(max_s_T, sumexp_s_T),
            teacher=Normalizer(max_t_T, sumexp_t_T),
            center_T=center_T,
            grad_T=grads[0],
        )
        sums = ProjectionGradient(
            student,
            tiles=plan.tiles,
            temperature=plan.temperature,
            needs_hidden=ctx.needs_input_grad[0],
            needs_weight=ctx.needs_input_grad[1],
        )
        pair = plan.projections(student, teacher, cached_tiles=split, ends_nTX=ends_nTX)
        of_ends_TX = None if ends_nTX is None else _gradient_of_ends(ends_nTX, gradient, loss_T, plan)
        dlogits = plan.backend.divergence_gradient(*pair, gradient)
        for tile in plan.tiles:
            dlogits_Rw = dlogits.at(tile)
            if plan.ends is not None and of_ends_TX is not None:
                plan.ends.put(dlogits_Rw, tile, gradient_TX=of_ends_TX)
            sums.add(tile, dlogits_Rw)
        return *sums.result(), None, None, None


_Pair: TypeAlias = tuple[Projection, Projection]  # student, teacher
# Both models' softmaxes over all ranks, the loss, and the mean under q that the gradient subtracts.
_Value: TypeAlias = tuple[Normalizer, Normalizer, Tensor, Tensor]


def _kl_value(pair: _Pair, plan: _DivergencePlan) -> _Value:
    """Take one pass over the tiles and one collective."""
    local = _local_statistics(*plan.ordered(*pair), plan)
    full = merge_kl_ranks(all_gather_stack(local.stacked(), plan.group))
    return *plan.ordered(full.first.normalizer, full.second.normalizer), full.kl_T, full.mean_gap_T


def _jsd_value(pair: _Pair, plan: _DivergencePlan) -> _Value:
    """Take two passes and two collectives: the mixture needs both log-probabilities."""
    every_n6T = all_gather_stack(_local_statistics(*pair, plan).stacked()[:6], plan.group)
    student, teacher = merge_ranks(every_n6T[:, :3]).normalizer, merge_ranks(every_n6T[:, 3:]).normalizer
    kl_2T = all_reduce_sum(_local_mixture_kl(pair, plan, student, teacher), plan.group)
    loss_T = plan.beta * kl_2T[0] + (1.0 - plan.beta) * kl_2T[1]
    return student, teacher, loss_T, kl_2T[1]


def _gradient_of_ends(ends_nTX: Tensor, of: DivergenceGradient, loss_T: Tensor, plan: _DivergencePlan) -> Tensor:
    """Return d loss / d logits of the ends' ids, ``[T, X]``, times the gradient of the loss."""
    both = [
        ends_TX / plan.temperature - one.max_T.unsqueeze(-1) - one.sumexp_T.log().unsqueeze(-1)
        for ends_TX, one in zip(ends_nTX, (of.student, of.teacher), strict=True)
    ]
    values = {"loss_T": loss_T, "center_T": of.center_T}
    return gradient_of_ids(*both, **values, kind=plan.kind, beta=plan.beta) * of.grad_T.unsqueeze(-1)


def _local_statistics(first: Projection, second: Projection, plan: _DivergencePlan) -> KlStatistics:
    work = plan.backend.kl_statistics(first, second)
    for tile in plan.tiles:
        work.add(tile)
    return work.result()


def _local_mixture_kl(pair: _Pair, plan: _DivergencePlan, student: Normalizer, teacher: Normalizer) -> Tensor:
    """Take this rank's part of KL(p||m) and KL(q||m), ``[2, T]``."""
    work = plan.backend.mixture_kl(*pair, normalizers=(student, teacher), beta=plan.beta)
    for tile in plan.tiles:
        work.add(tile)
    return work.result()
