"""The work of a backend on the tiles of one pass. The drivers own the loops, the collectives and the maths around them.

A pass over tiles is an ``Accumulator``; a backward is a source of ``GradientTiles``. Both get the tiles in the order of
``Tiles``, every one once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, TypeAlias, TypeVar

import torch
from torch import Tensor

from megatron_tropd.losses.vocab_parallel.projection import Projection
from megatron_tropd.losses.vocab_parallel.statistics import KlStatistics, Normalizer, Statistics
from megatron_tropd.losses.vocab_parallel.tiles import Tile, TileLimits

Kind = Literal["forward_kl", "reverse_kl", "jsd"]
Found: TypeAlias = tuple[Tensor, Statistics, Tensor]  # candidates' keys [T, k], statistics, picked logits [T, K]
_Result = TypeVar("_Result", covariant=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedIds:
    """Given ids of each token. With ``is_first_TK`` their columns are masked: out of the statistics, once each."""

    ids_TK: Tensor  # global, int64
    first_id: int  # global id of this shard's column 0
    is_first_TK: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftmaxGradient:
    """d loss / d logits as ``q (constant + slope log q)``, plus what the listed ids add at their columns.

    ``q`` is the softmax that ``normalizer`` makes; masked columns get what their ids add and nothing else.
    """

    normalizer: Normalizer
    constant_T: Tensor
    slope_T: Tensor | None
    listed: ListedIds
    grad_TK: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DivergenceGradient:
    """The inputs of a divergence's gradient with respect to the student's logits, besides both models' logits."""

    kind: Kind
    beta: float  # of the jsd
    student: Normalizer
    teacher: Normalizer
    center_T: Tensor  # the mean under q that the gradient subtracts (``backends/torch/divergence.py``)
    grad_T: Tensor  # of each token's loss


class Accumulator(Protocol[_Result]):
    """A pass over all tiles."""

    def add(self, tile: Tile) -> None:
        """Include a tile."""

    def result(self) -> _Result:
        """Return what the tiles have given, of this rank's columns."""


class GradientTiles(Protocol):
    """Make tiles of d loss / d (scaled) logits."""

    def at(self, tile: Tile) -> Tensor:
        """Return ``[R, w]``, in fp32 or in the dtype of the next product's factors, valid until the next call."""


class Backend(Protocol):
    """Work on tiles by one means. A backend holds no state; what it returns does, for one pass."""

    def limits(self, device: torch.device) -> TileLimits:
        """Say how large its tiles should be."""

    def statistics(self, projection: Projection, listed: ListedIds) -> Accumulator[tuple[Statistics, Tensor]]:
        """Take (statistics, logits ``[T, K]`` of the listed ids, 0 where another rank holds them)."""

    def candidates(self, projection: Projection, listed: ListedIds, *, k: int) -> Accumulator[Found]:
        """Take the keys of the best k columns too.

        Where the listed ids are masked they are no candidates, and the statistics are of the columns that are neither
        listed nor among the best k.
        """

    def softmax_gradient(self, projection: Projection, gradient: SoftmaxGradient) -> GradientTiles:
        """Form the gradient of anything made of softmax statistics and picked log-probabilities."""

    def kl_statistics(self, first: Projection, second: Projection) -> Accumulator[KlStatistics]:
        """Take the statistics of two models, ``weighted`` left at 0, and their mean gap under the first."""

    def mixture_kl(
        self, student: Projection, teacher: Projection, *, normalizers: tuple[Normalizer, Normalizer], beta: float
    ) -> Accumulator[Tensor]:
        """Take ``[2, T]``: KL(p||m) and KL(q||m), ``m = beta p + (1 - beta) q``."""

    def divergence_gradient(
        self, student: Projection, teacher: Projection, gradient: DivergenceGradient
    ) -> GradientTiles:
        """Form the gradient of a divergence with respect to the student's logits."""
