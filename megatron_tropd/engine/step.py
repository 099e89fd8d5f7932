"""Take one optimizer step over packs: loss, gradients divided once, metrics summed once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from torch import Tensor

from megatron_tropd.engine.forward import run_packs
from megatron_tropd.engine.model import Model
from megatron_tropd.engine.offload import wait_for_device
from megatron_tropd.engine.optimizer import Optimization
from megatron_tropd.engine.patches.parallel_state import use_parallel_state
from megatron_tropd.engine.views import StudentRows, TrainPack, picked_ids, student_rows, views_of
from megatron_tropd.errors import EngineError
from megatron_tropd.losses.logprob_mismatch import BUCKETS, LARGEST, MEAN, bucket_of
from megatron_tropd.losses.vocab_parallel import linear_divergence, linear_logprobs
from megatron_tropd.methods import Method
from megatron_tropd.types import Region, TokenLoss


@dataclass(slots=True)
class _Sums:
    """Running sums of one step on this rank."""

    loss: Tensor
    denominator: Tensor
    predictions: Tensor  # with a weight
    gap_max: Tensor  # largest difference between the sampler's and the trainer's log-prob
    stats: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, value_N: Tensor, mask_N: Tensor, weight_N: Tensor | None = None) -> None:
        """Add what a statistic is a mean of, over the tokens of a mask; ``weight_N``: what each counts, if not 1."""
        count_N = mask_N.double() if weight_N is None else torch.where(mask_N, weight_N.detach(), 0.0).double()
        value_N = torch.where(mask_N, value_N.detach(), 0.0).double()
        self.stats[name] = self.stats.get(name, 0) + (value_N if weight_N is None else value_N * count_N).sum()
        self.counts[name] = self.counts.get(name, 0) + count_N.sum()


@dataclass(frozen=True, slots=True)
class StepResult:
    """Loss and statistics of one update, equal on every rank."""

    loss: float
    grad_norm: float
    lr: float
    stats: Mapping[str, float]
    optimizer_seconds: float = 0.0  # gradient norm and update, of the step's wall time
    predictions: int = 0  # that carried loss: those that are masked do not
    weight: float = 0.0  # sum of the weights that the loss is a mean under
    counts: Mapping[str, float] = field(default_factory=dict)  # tokens, or weights, that each statistic is a mean of


def means_over_tokens(results: Sequence[StepResult]) -> tuple[float, dict[str, float]]:
    """Return the loss and statistics of several minibatches together: means over their tokens, not over minibatches."""
    total = sum(result.weight for result in results)
    loss = sum(result.loss * result.weight for result in results) / total if total > 0 else 0.0
    stats: dict[str, float] = {}
    for name in sorted(set().union(*(result.stats for result in results))):
        having = [result for result in results if name in result.stats]
        if name == LARGEST:
            stats[name] = float(np.max([result.stats[name] for result in having]))
            continue
        tokens = sum(result.counts[name] for result in having)
        stats[name] = sum(result.stats[name] * result.counts[name] for result in having) / tokens
    return loss, stats


class Trainer:
    """Trainer of one Megatron model with one method, a minibatch of packs at a time."""

    def __init__(
        self,
        model: Model,
        optimization: Optimization,
        method: Method,
        *,
        vocab_size: int | None = None,
        teacher_weight_vE: Tensor | None = None,
        keep_logits_bytes: int = 0,
    ) -> None:
        """Prepare the step. ``vocab_size``: ids both models know (default: all of the student's).

        ``teacher_weight_vE``: the teacher's output weight under the student's vocabulary partition, for methods that
        need full-vocabulary divergences; only read on the last stage.
        ``keep_logits_bytes``: of a pack's logits, kept from the loss's forward to its backward.
        """
        self.model = model
        self.optimization = optimization
        self.method = method
        self._vocab_size = vocab_size or model.architecture.vocab_size
        self._teacher_weight_vE = teacher_weight_vE
        # a method with a divergence has two losses over the vocabulary
        self._keep_bytes = keep_logits_bytes // (1 if teacher_weight_vE is None else 2)
        self._sums = self._new_sums()
        self._stat_names: list[str] | None = None

    def use_teacher_weight(self, weight_vE: Tensor | None) -> None:
        """Multiply the teacher's hidden states with this output weight from now on: of a teacher that moves."""
        self._teacher_weight_vE = weight_vE

    def step(
        self, packs: Sequence[TrainPack], *, update: int, before_update: Callable[[], None] | None = None
    ) -> StepResult:
        """Make one update from this replica's packs. Collective.

        ``before_update`` is called when gradients are there and the weights are still those that made them.

        Raises:
            EngineError: the loss or the gradient norm is not finite; weights are left as they were.
        """
        optimization = self.optimization
        lr = optimization.set_update(update)
        adapters = self.model.adapters
        with nullcontext() if adapters is None else adapters.dropping(update):
            sums = self._accumulate(packs)
        loss = sums.loss
        if not math.isfinite(loss):
            raise EngineError(f"the loss of update {update} is {loss}. {self._blame(update)}")
        if before_update is not None:
            before_update()
        started = time.perf_counter()
        grad_norm = self._gradient_norm()
        if not math.isfinite(grad_norm):
            raise EngineError(
                f"the gradient norm of update {update} is {grad_norm}. No weight was changed. Lower optimizer.lr."
            )
        with optimization.states.present(), use_parallel_state(self.model.groups):
            optimization.apply(grad_norm)
        if optimization.overlap is not None:
            optimization.overlap.updated()
        wait_for_device(self.model.device)  # or the seconds would be those of asking for it
        return replace(sums, grad_norm=grad_norm, lr=lr, optimizer_seconds=time.perf_counter() - started)

    def probe(self, packs: Sequence[TrainPack]) -> StepResult:
        """Return loss and gradient norm of the packs without an update; the gradients stay in ``main_grad``.
        Collective.
        """
        sums = self._accumulate(packs)
        return replace(sums, grad_norm=self._gradient_norm())

    def _blame(self, update: int) -> str:
        """Say whether the weights were whole before an update that failed, as far as this rank holds them."""
        if all(bool(p.isfinite().all()) for chunk in self.model.chunks for p in chunk.parameters()):
            return "No weight was changed. Lower optimizer.lr, or check the models with `tropd check`."
        before = "as they were loaded" if update == 0 else "since an update before this one"
        return (
            f"Weights are infinite or not a number {before}, and no later checkpoint is of use. Resume from an earlier "
            "one with a lower optimizer.lr or a larger optimizer.eps."
        )

    def end_step(self) -> None:
        """Complete the weights after the updates of a step, and offload what only updates need. Collective."""
        self.optimization.end_step()

    def _accumulate(self, packs: Sequence[TrainPack]) -> StepResult:
        """Compute fresh gradients of the packs; return their loss and statistics, without norm and learning rate."""
        self.optimization.gradients.onload()
        for module in self.optimization.wrapped:
            module.zero_grad_buffer()
        self.optimization.optimizer.zero_grad()
        self._sums = self._new_sums()
        self.model.config.finalize_model_grads_func = self._finalize_gradients
        with self.optimization.training():
            run_packs(
                self.model,
                [item.pack for item in packs],
                lambda number, hidden, weight: (self._pack_loss(packs[number], hidden, weight), None),
                wrapped=self.optimization.wrapped,
                backward=True,
            )
        return self._reduce_sums()

    def _gradient_norm(self) -> float:
        with use_parallel_state(self.model.groups):
            self.optimization.optimizer.prepare_grads()
            return float(self.optimization.optimizer.get_grad_norm())

    def _new_sums(self) -> _Sums:
        zero = torch.zeros((), dtype=torch.float64, device=self.model.device)
        return _Sums(zero.clone(), zero.clone(), zero.clone(), zero.clone())

    def _pack_loss(self, item: TrainPack, hidden_ND: Tensor, weight_vD: Tensor) -> Tensor:
        """Sum one pack's weighted token losses."""
        views = views_of(item, self._student_rows(item, hidden_ND, weight_vD))
        answer: TokenLoss = self.method.token_loss(*views)
        weight_N = item.weight_N if answer.weight_T is None else item.weight_N * answer.weight_T
        loss = (answer.loss_T * weight_N).sum()
        self._sums.loss += loss.detach().double()
        self._sums.denominator += weight_N.double().sum()
        self._sums.predictions += (weight_N != 0).sum()
        self._add_stats(answer, item)
        return loss

    def _model_logprob(self, item: TrainPack, hidden_ND: Tensor, weight_vD: Tensor) -> Tensor | None:
        """Return ``[N]`` log-prob at temperature 1, where only another one of the method's takes a pass for it."""
        if self.method.temperature == 1.0 or item.old is not None:
            return None
        target_N, groups = item.tokens.target_T, self.model.groups
        return model_logprob(hidden_ND, weight_vD, target_N, group=groups.tp, vocab_size=self._vocab_size)

    def _student_rows(self, item: TrainPack, hidden_ND: Tensor, weight_vD: Tensor) -> StudentRows:
        out = linear_logprobs(
            hidden_ND,
            weight_vD,
            picked_ids(item),
            group=self.model.groups.tp,
            vocab_size=self._vocab_size,
            temperature=self.method.temperature,
            tail=item.support.ids_NK is not None and self.method.needs.tail_mass,
            cache_bytes=self._keep_bytes,
        )
        return student_rows(
            out,
            item,
            divergence=self._divergence(item, hidden_ND, weight_vD),
            model_logprob_N=self._model_logprob(item, hidden_ND, weight_vD),
        )

    def _divergence(
        self, item: TrainPack, hidden_ND: Tensor, weight_vD: Tensor
    ) -> Callable[[str, float], Tensor] | None:
        outputs = item.outputs
        if outputs is None or outputs.hidden_NE is None or self._teacher_weight_vE is None:
            return None
        teacher_hidden, teacher_weight = outputs.hidden_NE, self._teacher_weight_vE

        def divergence(kind: str, beta: float) -> Tensor:
            return linear_divergence(
                hidden_ND,
                weight_vD,
                teacher_hidden,
                teacher_weight,
                kind=kind,
                beta=beta,
                group=self.model.groups.tp,
                vocab_size=self._vocab_size,
                temperature=self.method.temperature,
                cache_bytes=self._keep_bytes,
                end_ids=item.end_ids,
            )

        return divergence

    def _add_stats(self, answer: TokenLoss, item: TrainPack) -> None:
        prefix_N = item.tokens.region_T == Region.PREFIX
        continuation_N = item.tokens.region_T == Region.CONTINUATION
        gap_N = torch.where(continuation_N, answer.stats.get("logprob_gap", item.weight_N.new_zeros(())), 0.0)
        if gap_N.numel():
            self._sums.gap_max = torch.maximum(self._sums.gap_max, gap_N.detach().double().max())
        if "logprob_gap" in answer.stats:
            bucket_N = bucket_of(item.tokens.position_T)
            for number, bucket in enumerate(BUCKETS):
                here_N = continuation_N & (bucket_N == number)
                self._sums.add(f"logprob_gap/{bucket}", answer.stats["logprob_gap"], here_N)
        for name, value_N in answer.stats.items():
            mask_N = prefix_N if name.startswith("prefix_") else continuation_N
            self._sums.add(name, value_N, mask_N, answer.stat_weights.get(name))

    def _finalize_gradients(
        self, modules: Sequence[DistributedDataParallel], num_tokens: Tensor | None = None, **options: object
    ) -> None:
        """Run Megatron's gradient synchronization, then divide once by the global sum of weights."""
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

    def _reduce_sums(self) -> StepResult:
        """Return global loss and means of statistics, on every rank. The denominator is already global."""
        sums, groups = self._sums, self.model.groups
        names = self._names_of_stats()
        flat = torch.zeros(3 + 2 * len(names), dtype=torch.float64, device=self.model.device)
        if groups.is_last_stage:
            flat[0], flat[1] = sums.loss, sums.predictions
            for i, name in enumerate(names):
                flat[3 + 2 * i] = sums.stats[name]
                flat[4 + 2 * i] = sums.counts[name]
            dist.all_reduce(flat, group=groups.pg.dp_cp)
            dist.all_reduce(sums.gap_max, op=dist.ReduceOp.MAX, group=groups.pg.dp_cp)
            flat[2] = sums.gap_max
        if groups.layout.pipeline > 1:
            last = dist.get_global_rank(groups.pg.pp, groups.layout.pipeline - 1)
            dist.broadcast(flat, src=last, group=groups.pg.pp)
        total, predictions, gap_max, *pairs = flat.tolist()
        counts = {name: count for name, count in zip(names, pairs[1::2], strict=True) if count > 0}
        means = {name: value / counts[name] for name, value in zip(names, pairs[::2], strict=True) if name in counts}
        for name in [name for name in means if name.split("/")[0] == "logprob_gap"]:
            published = name.replace("logprob_gap", MEAN)
            means[published], counts[published] = means.pop(name), counts.pop(name)
        if MEAN in means:
            means[LARGEST] = gap_max
        denominator = float(sums.denominator)
        loss = total / denominator if denominator > 0 else 0.0
        return StepResult(loss, 0.0, 0.0, means, predictions=round(predictions), weight=denominator, counts=counts)

    def _names_of_stats(self) -> list[str]:
        """Return the names of the statistics in a fixed order; other stages learn them once from the last."""
        if self._stat_names is None:
            groups = self.model.groups
            names = [sorted(self._sums.stats)]
            if groups.layout.pipeline > 1:
                last = dist.get_global_rank(groups.pg.pp, groups.layout.pipeline - 1)
                dist.broadcast_object_list(names, src=last, group=groups.pg.pp)
            self._stat_names = names[0]
        return self._stat_names


@torch.no_grad()
def model_logprob(
    hidden_ND: Tensor, weight_vD: Tensor, target_N: Tensor, *, group: dist.ProcessGroup | None, vocab_size: int
) -> Tensor:
    """Return ``[N]`` log-prob of each target under the model itself (temperature 1), nats, no gradient."""
    out = linear_logprobs(hidden_ND, weight_vD, target_N[:, None], group=group, vocab_size=vocab_size)
    return out.logprob_TK[:, 0]
