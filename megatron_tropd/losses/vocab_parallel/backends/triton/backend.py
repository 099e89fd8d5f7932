"""The Triton backend: passes over products as the matrix units leave them, each tile read once by one kernel.

A kernel merges a tile into the running numbers itself, and writes its gradient in the dtype of the next product's
factors. Imports Triton: ``choose_backend`` imports this module when kernels are to serve.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_tropd.losses.vocab_parallel.backends.protocol import (
    Accumulator,
    DivergenceGradient,
    Found,
    GradientTiles,
    ListedIds,
    SoftmaxGradient,
)
from megatron_tropd.losses.vocab_parallel.backends.torch.backend import TorchBackend
from megatron_tropd.losses.vocab_parallel.backends.triton.kernels.divergence import (
    add_mixture_kl,
    add_pair,
    form_divergence_gradient,
)
from megatron_tropd.losses.vocab_parallel.backends.triton.kernels.gradient import fold_duplicates, form_gradient
from megatron_tropd.losses.vocab_parallel.backends.triton.kernels.statistics import add_statistics
from megatron_tropd.losses.vocab_parallel.backends.triton.kernels.topk import CandidateLists, add_candidates
from megatron_tropd.losses.vocab_parallel.candidates import keyed_statistics
from megatron_tropd.losses.vocab_parallel.projection import Projection
from megatron_tropd.losses.vocab_parallel.statistics import KlStatistics, Normalizer, Statistics
from megatron_tropd.losses.vocab_parallel.tiles import Tile, TileLimits

# Wide tiles, since each adds to the full hidden gradient, of all tokens where possible, since then a slice of the
# weight's gradient is one product: 512 MiB of fp32 logits, and half as much for a bf16 gradient
_GPU = TileLimits(elements=2**27, rows=2**15)


class TritonBackend:
    """Triton kernels: compiled on a GPU, interpreted elsewhere."""

    def limits(self, device: torch.device) -> TileLimits:
        """Say how large its tiles should be."""
        return TorchBackend().limits(device) if device.type == "cpu" else _GPU

    def statistics(self, projection: Projection, listed: ListedIds) -> Accumulator[tuple[Statistics, Tensor]]:
        """Take (statistics, logits of the listed ids)."""
        return _StatisticsPass(projection, listed)

    def candidates(self, projection: Projection, listed: ListedIds, *, k: int) -> Accumulator[Found]:
        """Take the keys of the best k columns too."""
        return _CandidatesPass(projection, listed, k)

    def softmax_gradient(self, projection: Projection, gradient: SoftmaxGradient) -> GradientTiles:
        """Form the gradient of softmax statistics and picked log-probabilities."""
        return _SoftmaxGradientTiles(projection, gradient)

    def kl_statistics(self, first: Projection, second: Projection) -> Accumulator[KlStatistics]:
        """Take the statistics of two models and their mean gap under the first."""
        return _KlPass(first, second)

    def mixture_kl(
        self, student: Projection, teacher: Projection, *, normalizers: tuple[Normalizer, Normalizer], beta: float
    ) -> Accumulator[Tensor]:
        """Take KL(p||m) and KL(q||m)."""
        return _MixturePass(student, teacher, normalizers, beta)

    def divergence_gradient(
        self, student: Projection, teacher: Projection, gradient: DivergenceGradient
    ) -> GradientTiles:
        """Form the gradient of a divergence with respect to the student's logits."""
        return _DivergenceGradientTiles(student, teacher, gradient)


def _numbers(statistics: Statistics, rows: slice) -> dict[str, Tensor]:
    return {
        "max_R": statistics.max_T[rows],
        "sumexp_R": statistics.sumexp_T[rows],
        "weighted_R": statistics.weighted_T[rows],
    }


class _StatisticsPass:
    def __init__(self, projection: Projection, listed: ListedIds) -> None:
        self._projection, self._first_id, self._mask = projection, listed.first_id, listed.is_first_TK is not None
        self._ids_TK = listed.ids_TK.contiguous()
        self._picked_TK = torch.zeros(listed.ids_TK.shape, dtype=projection.dtype, device=projection.device)
        self._sum = Statistics.empty(projection.tiles.num_tokens, dtype=projection.dtype, device=projection.device)

    def add(self, tile: Tile) -> None:
        rows, columns = tile
        add_statistics(
            self._projection.product(tile),
            scale=self._projection.scale,
            **_numbers(self._sum, rows),
            ids_RK=self._ids_TK[rows],
            picked_RK=self._picked_TK[rows],
            first_id=self._first_id + columns.start,
            mask=self._mask,
        )

    def result(self) -> tuple[Statistics, Tensor]:
        return self._sum, self._picked_TK


class _CandidatesPass:
    def __init__(self, projection: Projection, listed: ListedIds, k: int) -> None:
        tokens, device = projection.tiles.num_tokens, projection.device
        self._projection, self._first_id, self._tail = projection, listed.first_id, listed.is_first_TK is not None
        self._ids_TK = listed.ids_TK.contiguous()
        self._lists = CandidateLists.empty(tokens, k, device=device)
        self._picked_TK = torch.zeros(listed.ids_TK.shape, dtype=torch.float32, device=device)
        self._sum = Statistics.empty(tokens, dtype=torch.float32, device=device)

    def add(self, tile: Tile) -> None:
        rows, columns = tile
        add_candidates(
            self._projection.product(tile),
            self._lists,
            rows,
            scale=self._projection.scale,
            **_numbers(self._sum, rows),
            ids_RK=self._ids_TK[rows],
            picked_RK=self._picked_TK[rows],
            first_id=self._first_id + columns.start,
            tail=self._tail,
        )

    def result(self) -> Found:
        keys_TC, k = self._lists.keys(), self._lists.k
        if not self._tail:
            return keys_TC.topk(k, sorted=False).values, self._sum, self._picked_TK
        sorted_TC = keys_TC.sort(dim=-1, descending=True).values
        self._sum.merge_(slice(None), keyed_statistics(sorted_TC[:, k:]))
        return sorted_TC[:, :k], self._sum, self._picked_TK


class _SoftmaxGradientTiles:
    def __init__(self, projection: Projection, gradient: SoftmaxGradient) -> None:
        self._projection, self._normalizer, listed = projection, gradient.normalizer, gradient.listed
        # what autograd hands in is often expanded, and so may be the ids
        self._constant_T = gradient.constant_T.contiguous()
        self._slope_T = None if gradient.slope_T is None else gradient.slope_T.contiguous()
        self._ids_TK, self._first_id = listed.ids_TK.contiguous(), listed.first_id
        self._masked = listed.is_first_TK is not None
        grad_TK = gradient.grad_TK
        self._folded_TK = None if grad_TK is None else fold_duplicates(self._ids_TK, grad_TK.contiguous())

    def at(self, tile: Tile) -> Tensor:
        rows, columns = tile
        max_R, sumexp_R = self._normalizer.rows(rows)
        return form_gradient(
            self._projection.product(tile),
            self._projection.scratch_tile(tile),
            scale=self._projection.scale,
            max_R=max_R,
            sumexp_R=sumexp_R,
            constant_R=self._constant_T[rows],
            slope_R=None if self._slope_T is None else self._slope_T[rows],
            ids_RK=self._ids_TK[rows],
            folded_RK=None if self._folded_TK is None else self._folded_TK[rows],
            first_id=self._first_id + columns.start,
            masked=self._masked,
        )


class _KlPass:
    def __init__(self, first: Projection, second: Projection) -> None:
        self._first, self._second = first, second
        self._sum = KlStatistics.empty(first.tiles.num_tokens, dtype=first.dtype, device=first.device)

    def add(self, tile: Tile) -> None:
        rows, found = tile[0], self._sum
        add_pair(
            self._first.product(tile),
            self._second.product(tile),
            scale=self._first.scale,
            max_a_R=found.first.max_T[rows],
            sumexp_a_R=found.first.sumexp_T[rows],
            max_b_R=found.second.max_T[rows],
            sumexp_b_R=found.second.sumexp_T[rows],
            gap_R=found.gap_T[rows],
        )

    def result(self) -> KlStatistics:
        return self._sum


def _of_both(student: Normalizer, teacher: Normalizer, rows: slice) -> dict[str, Tensor]:
    (max_s_R, sumexp_s_R), (max_t_R, sumexp_t_R) = student.rows(rows), teacher.rows(rows)
    return {"max_s_R": max_s_R, "sumexp_s_R": sumexp_s_R, "max_t_R": max_t_R, "sumexp_t_R": sumexp_t_R}


class _MixturePass:
    def __init__(
        self, student: Projection, teacher: Projection, normalizers: tuple[Normalizer, Normalizer], beta: float
    ) -> None:
        self._student, self._teacher, self._normalizers, self._beta = student, teacher, normalizers, beta
        self._kl_2T = torch.zeros(2, student.tiles.num_tokens, device=student.device)

    def add(self, tile: Tile) -> None:
        add_mixture_kl(
            self._student.product(tile),
            self._teacher.product(tile),
            self._kl_2T[:, tile[0]],
            scale=self._student.scale,
            beta=self._beta,
            **_of_both(*self._normalizers, tile[0]),
        )

    def result(self) -> Tensor:
        return self._kl_2T


class _DivergenceGradientTiles:
    def __init__(self, student: Projection, teacher: Projection, gradient: DivergenceGradient) -> None:
        self._student, self._teacher, self._gradient = student, teacher, gradient
        self._grad_T = gradient.grad_T.contiguous()

    def at(self, tile: Tile) -> Tensor:
        rows, gradient = tile[0], self._gradient
        return form_divergence_gradient(
            self._student.product(tile),
            self._teacher.product(tile),
            self._student.scratch_tile(tile),
            kind=gradient.kind,
            scale=self._student.scale,
            beta=gradient.beta,
            **_of_both(gradient.student, gradient.teacher, rows),
            center_R=gradient.center_T[rows],
            grad_R=self._grad_T[rows],
        )
