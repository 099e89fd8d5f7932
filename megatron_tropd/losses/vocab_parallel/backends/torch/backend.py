"""The torch backend: passes over tiles of scaled logits, free to overwrite."""

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
from megatron_tropd.losses.vocab_parallel.backends.torch.divergence import (
    CHUNK_GRADIENT,
    TileSoftmax,
    chunk_kl,
    chunk_mixture_kl,
)
from megatron_tropd.losses.vocab_parallel.backends.torch.softmax import Picks, chunk_gradient
from megatron_tropd.losses.vocab_parallel.candidates import (
    NO_CANDIDATE,
    entrants,
    keyed_statistics,
    mask_candidates_,
)
from megatron_tropd.losses.vocab_parallel.projection import Projection
from megatron_tropd.losses.vocab_parallel.statistics import (
    KlStatistics,
    Normalizer,
    Statistics,
    chunk_statistics,
    drop_fully_masked,
)
from megatron_tropd.losses.vocab_parallel.tiles import Tile, TileLimits

# On one CPU thread a tile and its weights stay in the cache, where the passes over it are free next to the product;
# several threads pay for each parallel region they enter, so they get fewer and larger ones; a GPU wants few, large
# launches.
_CPU = TileLimits(elements=2**21, rows=1024)
_CPU_THREADS = TileLimits(elements=2**22, rows=2048)
_GPU = TileLimits(elements=2**26, rows=2**14)


class TorchBackend:
    """Plain torch on any device."""

    def limits(self, device: torch.device) -> TileLimits:
        """Say how large its tiles should be."""
        if device.type != "cpu":
            return _GPU
        return _CPU_THREADS if torch.get_num_threads() > 1 else _CPU

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


def _picks(listed: ListedIds, tile: Tile) -> Picks:
    rows, columns = tile
    return Picks.of(listed.ids_TK[rows], first_id=listed.first_id + columns.start, width=columns.stop - columns.start)


class _StatisticsPass:
    def __init__(self, projection: Projection, listed: ListedIds) -> None:
        self._projection, self._listed, self._scratch = projection, listed, projection.buffer()
        self._picked_TK = torch.zeros(listed.ids_TK.shape, dtype=projection.dtype, device=projection.device)
        self._sum = Statistics.empty(projection.tiles.num_tokens, dtype=projection.dtype, device=projection.device)

    def add(self, tile: Tile) -> None:
        rows, masked_TK = tile[0], self._listed.is_first_TK
        logits_Rw = self._projection.logits(tile)
        picks = _picks(self._listed, tile)
        picks.read_into(self._picked_TK[rows], logits_Rw)
        if masked_TK is not None:
            picks.mask_columns(logits_Rw, masked_TK[rows])
        found = chunk_statistics(logits_Rw, self._scratch.shaped(tile))
        self._sum.merge_(rows, found if masked_TK is None else drop_fully_masked(found))

    def result(self) -> tuple[Statistics, Tensor]:
        return self._sum, self._picked_TK


class _CandidatesPass:
    def __init__(self, projection: Projection, listed: ListedIds, k: int) -> None:
        tokens, device = projection.tiles.num_tokens, projection.device
        self._projection, self._listed, self._k = projection, listed, k
        self._scratch = projection.buffer(torch.float32)
        self._keys_TK = torch.full((tokens, k), NO_CANDIDATE, dtype=torch.int64, device=device)
        self._picked_TK = torch.zeros(listed.ids_TK.shape, dtype=torch.float32, device=device)
        self._sum = Statistics.empty(tokens, dtype=torch.float32, device=device)

    def add(self, tile: Tile) -> None:
        rows, masked_TK = tile[0], self._listed.is_first_TK
        logits_Rw = self._projection.logits(tile).float()
        picks = _picks(self._listed, tile)
        picks.read_into(self._picked_TK[rows], logits_Rw)
        if masked_TK is not None:
            picks.mask_columns(logits_Rw, masked_TK[rows])
        first_id = self._listed.first_id + tile[1].start
        best_RX = entrants(logits_Rw, self._keys_TK[rows], first_id=first_id)
        if masked_TK is None:
            self._keys_TK[rows] = torch.cat([self._keys_TK[rows], best_RX], dim=-1).topk(self._k, sorted=False).values
            self._sum.merge_(rows, chunk_statistics(logits_Rw, self._scratch.shaped(tile)))
        else:
            self._add_outside(tile, logits_Rw, mask_candidates_(logits_Rw, best_RX, first_id=first_id))

    def _add_outside(self, tile: Tile, logits_Rw: Tensor, best_RX: Tensor) -> None:
        """Include what is left of the tile, and what the tile's best have driven from the best k."""
        rows = tile[0]
        sorted_RX = torch.cat([self._keys_TK[rows], best_RX], dim=-1).sort(dim=-1, descending=True).values
        self._keys_TK[rows] = sorted_RX[:, : self._k]
        self._sum.merge_(rows, drop_fully_masked(chunk_statistics(logits_Rw, self._scratch.shaped(tile))))
        self._sum.merge_(rows, keyed_statistics(sorted_RX[:, self._k :]))

    def result(self) -> Found:
        return self._keys_TK, self._sum, self._picked_TK


class _SoftmaxGradientTiles:
    def __init__(self, projection: Projection, gradient: SoftmaxGradient) -> None:
        self._projection, self._gradient, self._scratch = projection, gradient, projection.buffer()

    def at(self, tile: Tile) -> Tensor:
        rows, gradient = tile[0], self._gradient
        logits_Rw = self._projection.logits(tile)
        picks = _picks(gradient.listed, tile)
        if gradient.listed.is_first_TK is not None:
            picks.mask_columns(logits_Rw, gradient.listed.is_first_TK[rows])
        max_R, sumexp_R = gradient.normalizer.rows(rows)
        dlogits_Rw = chunk_gradient(
            logits_Rw,
            self._scratch.shaped(tile),
            max_R=max_R,
            sumexp_R=sumexp_R,
            constant_R=gradient.constant_T[rows],
            slope_R=None if gradient.slope_T is None else gradient.slope_T[rows],
        )
        if gradient.grad_TK is not None:
            picks.add_to(dlogits_Rw, gradient.grad_TK[rows])
        return dlogits_Rw


class _KlPass:
    def __init__(self, first: Projection, second: Projection) -> None:
        self._first, self._second, self._scratch = first, second, first.buffer()
        self._sum = KlStatistics.empty(first.tiles.num_tokens, dtype=first.dtype, device=first.device)

    def add(self, tile: Tile) -> None:
        a_Rw, b_Rw = self._first.logits(tile), self._second.logits(tile)
        self._sum.merge_(tile[0], chunk_kl(a_Rw, b_Rw.to(a_Rw.dtype), self._scratch.shaped(tile)))

    def result(self) -> KlStatistics:
        return self._sum


class _MixturePass:
    def __init__(
        self, student: Projection, teacher: Projection, normalizers: tuple[Normalizer, Normalizer], beta: float
    ) -> None:
        self._models = tuple(zip((student, teacher), normalizers, strict=True))
        self._beta = beta
        self._kl_2T = torch.zeros(2, student.tiles.num_tokens, dtype=student.dtype, device=student.device)

    def add(self, tile: Tile) -> None:
        pair = (TileSoftmax.of(model.logits(tile).to(self._kl_2T.dtype), of, tile[0]) for model, of in self._models)
        self._kl_2T[:, tile[0]] += chunk_mixture_kl(*pair, beta=self._beta)

    def result(self) -> Tensor:
        return self._kl_2T


class _DivergenceGradientTiles:
    def __init__(self, student: Projection, teacher: Projection, gradient: DivergenceGradient) -> None:
        self._student, self._teacher, self._gradient = student, teacher, gradient

    def at(self, tile: Tile) -> Tensor:
        rows, gradient, dtype = tile[0], self._gradient, self._student.dtype
        return CHUNK_GRADIENT[gradient.kind](
            TileSoftmax.of(self._student.logits(tile), gradient.student, rows),
            TileSoftmax.of(self._teacher.logits(tile).to(dtype), gradient.teacher, rows),
            center_R1=gradient.center_T[rows].unsqueeze(-1),
            grad_R1=gradient.grad_T[rows].unsqueeze(-1),
            beta=gradient.beta,
        )
