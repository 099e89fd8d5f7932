"""The walks over tiles where kernels do the work: the same sums as the loops in ``vocab_parallel``, ``_topk`` and
``_divergence``, from the products as the matrix units leave them (``kernels``).

A kernel merges a tile into the running numbers itself and writes its gradient in the dtype of the next product, so that
each tile is read once and no wider copy of it exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_tropd.losses.vocab_parallel.backends.torch_divergence import KlStatistics
from megatron_tropd.losses.vocab_parallel.backends.torch_statistics import Statistics
from megatron_tropd.losses.vocab_parallel.tiles import Projection, Tiles


def add_statistics(
    projection: Projection,
    tiles: Tiles,
    local: Statistics,
    picked_TK: Tensor,
    *,
    ids_TK: Tensor,
    first_id: int,
    hide: bool,
) -> None:
    """Fills in the statistics of all tiles and the picked logits; with ``hide`` the picked columns do not count."""
    from megatron_tropd.losses.vocab_parallel.backends.kernels.statistics import add_statistics as add_tile

    ids_TK = ids_TK.contiguous()
    for rows, columns in tiles:
        add_tile(
            projection.product(rows, columns),
            scale=projection.scale,
            **_of(local, rows),
            ids_RK=ids_TK[rows],
            picked_RK=picked_TK[rows],
            first_id=first_id + columns.start,
            hide=hide,
        )


def _of(statistics: Statistics, rows: slice) -> dict[str, Tensor]:
    return {
        "max_R": statistics.max_T[rows],
        "sumexp_R": statistics.sumexp_T[rows],
        "weighted_R": statistics.weighted_T[rows],
    }


class SoftmaxGradient:
    """Makes the tiles of ``q (constant + slope log q)`` plus what the picked ids add."""

    def __init__(
        self,
        projection: Projection,
        *,
        numbers: tuple[Tensor, Tensor, Tensor, Tensor | None],
        ids_TK: Tensor,
        grad_TK: Tensor | None,
        is_first_TK: Tensor | None,
        first_id: int,
    ) -> None:
        """``numbers``: max, sumexp, constant and slope per token. ``is_first_TK``: the picked columns are hidden."""
        from megatron_tropd.losses.vocab_parallel.backends.kernels.gradient import fold_duplicates, form_gradient

        self._projection, self._form = projection, form_gradient
        # what autograd hands in is often expanded, and so may be the ids
        *always, slope_T = numbers
        self._numbers = [x_T.contiguous() for x_T in always]
        self._slope_T = None if slope_T is None else slope_T.contiguous()
        self._ids_TK, self._first_id, self._hidden = ids_TK.contiguous(), first_id, is_first_TK is not None
        self._folded_TK = None if grad_TK is None else fold_duplicates(self._ids_TK, grad_TK.contiguous())

    def tile(self, rows: slice, columns: slice) -> Tensor:
        """``[R, w]`` in the inputs' dtype, valid until the next call."""
        (max_T, sumexp_T, constant_T), slope_T = self._numbers, self._slope_T
        return self._form(
            self._projection.product(rows, columns),
            self._projection.room(rows, columns),
            scale=self._projection.scale,
            max_R=max_T[rows],
            sumexp_R=sumexp_T[rows],
            constant_R=constant_T[rows],
            slope_R=None if slope_T is None else slope_T[rows],
            ids_RK=self._ids_TK[rows],
            folded_RK=None if self._folded_TK is None else self._folded_TK[rows],
            first_id=self._first_id + columns.start,
            hidden=self._hidden,
        )


def candidates(
    projection: Projection,
    tiles: Tiles,
    k: int,
    local: Statistics,
    picked_TJ: Tensor,
    *,
    ids_TJ: Tensor,
    first_id: int,
    tail: bool,
) -> Tensor:
    """``[T, C]`` keys, the best k and some others, unsorted. Fills in the statistics and the picked logits.

    With ``tail`` the statistics leave out the picked ids, which are no candidates then, and all that has a key here.
    """
    from megatron_tropd.losses.vocab_parallel.backends.kernels.topk import Candidates, add_candidates

    ids_TJ = ids_TJ.contiguous()
    found = Candidates.empty(tiles.num_tokens, k, device=picked_TJ.device)
    for rows, columns in tiles:
        add_candidates(
            projection.product(rows, columns),
            found,
            rows,
            scale=projection.scale,
            **_of(local, rows),
            ids_RK=ids_TJ[rows],
            picked_RK=picked_TJ[rows],
            first_id=first_id + columns.start,
            tail=tail,
        )
    return found.keys()


def add_pair(first: Projection, second: Projection, tiles: Tiles, local: KlStatistics) -> None:
    """Fills in the statistics of both models over all tiles (``weighted`` stays 0)."""
    from megatron_tropd.losses.vocab_parallel.backends.kernels.divergence import add_pair as add_tile

    for rows, columns in tiles:
        add_tile(
            first.product(rows, columns),
            second.product(rows, columns),
            scale=first.scale,
            max_a_R=local.first.max_T[rows],
            sumexp_a_R=local.first.sumexp_T[rows],
            max_b_R=local.second.max_T[rows],
            sumexp_b_R=local.second.sumexp_T[rows],
            gap_R=local.gap_T[rows],
        )


def mixture_kl(student: Projection, teacher: Projection, tiles: Tiles, numbers: list[Tensor], *, beta: float) -> Tensor:
    """``[2, T]``: this rank's part of KL(p||m), KL(q||m). ``numbers``: max and sumexp of student, then of teacher."""
    from megatron_tropd.losses.vocab_parallel.backends.kernels.divergence import add_mixture_kl

    kl_2T = torch.zeros(2, tiles.num_tokens, device=numbers[0].device)
    for rows, columns in tiles:
        max_s_R, sumexp_s_R, max_t_R, sumexp_t_R = (x_T[rows] for x_T in numbers)
        add_mixture_kl(
            student.product(rows, columns),
            teacher.product(rows, columns),
            kl_2T[:, rows],
            scale=student.scale,
            beta=beta,
            max_s_R=max_s_R,
            sumexp_s_R=sumexp_s_R,
            max_t_R=max_t_R,
            sumexp_t_R=sumexp_t_R,
        )
    return kl_2T


def divergence_gradient(
    student: Projection,
    teacher: Projection,
    tile: tuple[slice, slice],
    numbers: list[Tensor],
    *,
    kind: str,
    beta: float,
) -> Tensor:
    """d loss / d student logits of one tile, in the dtype of its product, valid until the next call.

    ``numbers``: max and sumexp of student, then of teacher, centre and gradient of the loss, per token.
    """
    from megatron_tropd.losses.vocab_parallel.backends.kernels.divergence import form_divergence_gradient

    max_s_R, sumexp_s_R, max_t_R, sumexp_t_R, centre_R, grad_R = (x_T[tile[0]] for x_T in numbers)
    return form_divergence_gradient(
        student.product(*tile),
        teacher.product(*tile),
        student.room(*tile),
        kind=kind,
        scale=student.scale,
        beta=beta,
        max_s_R=max_s_R,
        sumexp_s_R=sumexp_s_R,
        max_t_R=max_t_R,
        sumexp_t_R=sumexp_t_R,
        centre_R=centre_R,
        grad_R=grad_R,
    )
