"""One optimizer step over packs: views for the method, loss, gradients divided once, metrics summed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from torch import Tensor

from megatron_tropd.engine.forward import run_packs
from megatron_tropd.engine.model import Model
from megatron_tropd.engine.optimizer import Optimization
from megatron_tropd.engine.view import megatron_sees
from megatron_tropd.errors import EngineError
from megatron_tropd.losses.vocab_parallel import linear_divergence, linear_logprobs
from megatron_tropd.methods import Method
from megatron_tropd.types import Pack, Region, Signal, StudentView, TeacherView, TokenLoss, TokenView


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainPack:
    """A pack and everything the method needs to know of its N valid predictions, in stream order, on the device.

    The tensors are only needed on last-stage ranks; elsewhere they may be empty.
    """

    pack: Pack
    tokens: TokenView
    weight_N: Tensor  # normalisation weight, sums to the number of valid predictions over the global minibatch
    signal: Signal | None = None  # None when the method needs no teacher (pre-training)
    support_ids_NK: Tensor | None = None
    support_logprob_NK: Tensor | None = None
    support_mask_NK: Tensor | None = None
    old_logprob_N: Tensor | None = None
    old_entropy_N: Tensor | None = None


@dataclass(slots=True)
class _Sums:
    """Running sums of one step on this rank."""

    loss: Tensor
    denominator: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, value_N: Tensor, mask_N: Tensor) -> None:
        value = (value_N.detach().double() * mask_N).sum()
        self.stats[name] = self.stats.get(name, 0) + value
        self.counts[name] = self.counts.get(name, 0) + mask_N.double().sum()


@dataclass(frozen=True, slots=True)
class StepResult:
    """Loss and statistics of one update, equal on every rank."""

    loss: float
    grad_norm: float
    lr: float
    stats: Mapping[str, float]


TeacherOutput = Callable[[], Tensor]  # the teacher's output weight, cut by the student's vocabulary partition


class Trainer:
    """Trains one Megatron model with one method, a minibatch of packs at a time."""

    def __init__(
        self,
        model: Model,
        optimization: Optimization,
        method: Method,
        *,
        temperature: float = 1.0,
        teacher_weight: TeacherOutput | None = None,
    ) -> None:
        self.model = model
        self.optimization = optimization
        self.method = method
        self.temperature = temperature
        self._teacher_weight = teacher_weight
        self._sums = self._new_sums()
        self._stat_names: list[str] | None = None
        model.config.finalize_model_grads_func = self._finalize_gradients

    def step(self, packs: Sequence[TrainPack], *, update: int) -> StepResult:
        """One update from this replica's packs. Collective.

        Raises:
            EngineError: the loss or the gradient norm is not finite; weights are left as they were.
        """
        optimization = self.optimization
        lr = optimization.set_update(update)
        for module in optimization.wrapped:
            module.zero_grad_buffer()
        optimization.optimizer.zero_grad()
        self._sums = self._new_sums()
        run_packs(
            self.model,
            [item.pack for item in packs],
            lambda number, hidden, weight: (self._pack_loss(packs[number], hidden, weight), None),
            wrapped=optimization.wrapped,
            backward=True,
        )
        loss, stats = self._reduce_sums()
        if not torch.isfinite(torch.tensor(loss)):
            raise EngineError(
                f"the loss of update {update} is {loss}. No weight was changed. "
                "Lower optimizer.lr, or check the teacher with `tropd check`."
            )
        with megatron_sees(self.model.groups):
            succeeded, grad_norm, _ = optimization.optimizer.step()
        if not succeeded or not torch.isfinite(torch.tensor(float(grad_norm))):
            raise EngineError(f"the gradient norm of update {update} is {grad_norm}. Lower optimizer.lr.")
        return StepResult(loss, float(grad_norm), lr, stats)

    def _new_sums(self) -> _Sums:
        zero = torch.zeros((), dtype=torch.float64, device=self.model.device)
        return _Sums(zero.clone(), zero.clone())

    def _pack_loss(self, item: TrainPack, hidden_ND: Tensor, weight_vD: Tensor) -> Tensor:
        """Sum of one pack's weighted token losses."""
        student = self._student_view(item, hidden_ND, weight_vD)
        teacher = _teacher_view(item, student.logprob_T)
        answer: TokenLoss = self.method.token_loss(student, teacher, item.tokens)
        weight_N = item.weight_N if answer.weight_T is None else item.weight_N * answer.weight_T
        loss = (answer.loss_T * weight_N).sum()
        self._sums.loss += loss.detach().double()
        self._sums.denominator += weight_N.double().sum()
        self._add_stats(answer, student, item)
        return loss

    def _student_view(self, item: TrainPack, hidden_ND: Tensor, weight_vD: Tensor) -> StudentView:
        model, support = self.model, item.support_ids_NK
        target_N1 = item.tokens.target_T[:, None]
        ids = target_N1 if support is None else torch.cat([target_N1, support], dim=1)
        out = linear_logprobs(
            hidden_ND,
            weight_vD,
            ids,
            group=model.groups.tp,
            vocab_size=model.architecture.vocab_size,
            temperature=self.temperature,
        )
        logprob = out.logprob_TK[:, 0]
        old = item.old_logprob_N
        return StudentView(
            logprob_T=logprob,
            old_logprob_T=logprob.detach() if old is None else old,
            support_logprob_TK=None if support is None else out.logprob_TK[:, 1:],
            entropy_T=out.entropy_T,
            old_entropy_T=out.entropy_T.detach() if item.old_entropy_N is None else item.old_entropy_N,
            divergence=self._divergence(item, hidden_ND, weight_vD),
        )

    def _divergence(
        self, item: TrainPack, hidden_ND: Tensor, weight_vD: Tensor
    ) -> Callable[[str, float], Tensor] | None:
        signal = item.signal
        if signal is None or signal.hidden_NE is None or self._teacher_weight is None:
            return None
        teacher_hidden, teacher_weight = signal.hidden_NE, self._teacher_weight()

        def divergence(kind: str, beta: float) -> Tensor:
            return linear_divergence(
                hidden_ND,
                weight_vD,
                teacher_hidden,
                teacher_weight,
                kind=kind,
                beta=beta,
                group=self.model.groups.tp,
                vocab_size=self.model.architecture.vocab_size,
                temperature=self.temperature,
            )

        return divergence

    def _add_stats(self, answer: TokenLoss, student: StudentView, item: TrainPack) -> None:
        prefix_N = item.tokens.region_T == Region.PREFIX
        continuation_N = item.tokens.region_T == Region.CONTINUATION
        add = self._sums.add
        if student.entropy_T is not None:
            add("student_entropy", student.entropy_T, continuation_N)
        if item.signal is not None and item.signal.entropy_N is not None:
            add("teacher_entropy", item.signal.entropy_N, continuation_N)
        for name, value_N in answer.stats.items():
            add(name, value_N, prefix_N if name.startswith("prefix_") else continuation_N)

    def _finalize_gradients(
        self, modules: Sequence[torch.nn.Module], num_tokens: Tensor | None = None, **options: object
    ) -> None:
        """Megatron's gradient synchronisation, then one division by the global sum of weights."""
        del num_tokens
        finalize_model_grads(list(modules), None, **options)
        groups = self.model.groups
        denominator = self._sums.denominator
        dist.all_reduce(denominator, group=groups.pg.dp_cp)
        if groups.layout.pipeline > 1:
            last = dist.get_global_rank(groups.pg.pp, groups.layout.pipeline - 1)
            dist.broadcast(denominator, src=last, group=groups.pg.pp)
        if denominator > 0:
            for module in modules:
                module.scale_gradients((1.0 / denominator).item())

    def _reduce_sums(self) -> tuple[float, dict[str, float]]:
        """Global loss and means of statistics, on every rank. The denominator is already global."""
        sums, groups = self._sums, self.model.groups
        names = self._names_of_stats()
        flat = torch.zeros(1 + 2 * len(names), dtype=torch.float64, device=self.model.device)
        if groups.is_last_stage:
            flat[0] = sums.loss
            for i, name in enumerate(names):
                flat[1 + 2 * i] = sums.stats[name]
                flat[2 + 2 * i] = sums.counts[name]
            dist.all_reduce(flat, group=groups.pg.dp_cp)
        if groups.layout.pipeline > 1:
            last = dist.get_global_rank(groups.pg.pp, groups.layout.pipeline - 1)
            dist.broadcast(flat, src=last, group=groups.pg.pp)
        total, *pairs = flat.tolist()
        means = {
            name: value / count
            for name, value, count in zip(names, pairs[::2], pairs[1::2], strict=True)
            if count > 0
        }
        return total / max(float(sums.denominator), 1.0), means

    def _names_of_stats(self) -> list[str]:
        """Names of the statistics in a fixed order; other stages learn them once from the last."""
        if self._stat_names is None:
            groups = self.model.groups
            names = [sorted(self._sums.stats)]
            if groups.layout.pipeline > 1:
                last = dist.get_global_rank(groups.pg.pp, groups.layout.pipeline - 1)
                dist.broadcast_object_list(names, src=last, group=groups.pg.pp)
            self._stat_names = names[0]
        return self._stat_names


def _teacher_view(item: TrainPack, logprob_N: Tensor) -> TeacherView:
    signal = item.signal
    if signal is None:  # no teacher: the views agree, so every term that compares them is zero
        return TeacherView(logprob_T=logprob_N.detach())
    return TeacherView(
        logprob_T=signal.logprob_N,
        support_ids_TK=item.support_ids_NK,
        support_logprob_TK=item.support_logprob_NK,
        support_mask_TK=item.support_mask_NK,
        entropy_T=signal.entropy_N,
    )
