"""The ends of responses as one category (``losses/end_class.py``) of a full divergence.

In every pass, one column holds the class: the log of the sum of its ids' exponentials; the other ids have no
probability. So no pass counts them one by one. Where one model ends its responses with one id and the other with
another, they are some 25 nats apart, and taking that out of a sum again would leave its rounding, in fp32 a hundred
times that of what is left. Backward, the class's gradient goes to its ids by their shares of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tropd.errors import ConfigError
from megatron_tropd.losses.end_class import class_logprob
from megatron_tropd.losses.vocab_parallel.backends.protocol import Kind
from megatron_tropd.losses.vocab_parallel.projection import Factors, project
from megatron_tropd.losses.vocab_parallel.tiles import Shard, Tile, Tiles
from megatron_tropd.parallel.collectives import Group, all_reduce_sum

_NOTHING = -1e30  # its exponential is 0, and the difference of two of them, unlike that of infinities, is 0


@dataclass(frozen=True, slots=True)
class EndColumns:
    """The ids of the class, and where this rank holds them."""

    ids: tuple[int, ...]
    local: tuple[tuple[int, int], ...]  # (number of the id, local column)

    @staticmethod
    def of(end_ids: Sequence[int], shard: Shard, *, vocab_size: int) -> EndColumns:
        """Find the columns.

        Raises:
            ConfigError: an id outside the vocabulary, or one that is there twice.
        """
        ids = tuple(end_ids)
        if len(set(ids)) < len(ids) or any(not 0 <= i < vocab_size for i in ids):
            raise ConfigError(f"end_ids={list(ids)} must be different ids below vocab_size={vocab_size}.")
        local = tuple((x, i - shard.start) for x, i in enumerate(ids) if 0 <= i - shard.start < shard.width)
        return EndColumns(ids, local)

    def products(self, models: Sequence[Factors], *, tiles: Tiles, group: Group) -> Tensor:
        """Return each model's products of the ids, ``[models, T, X]``, on every rank. One collective."""
        first = models[0]
        shape = (len(models), tiles.num_tokens, len(self.ids))
        product_nTX = torch.zeros(shape, dtype=first.product_dtype, device=first.device)
        numbers, columns = ([pair[k] for pair in self.local] for k in (0, 1))
        for product_TX, factors in zip(product_nTX, models, strict=True):
            hidden_TD, weight_vD = factors.matrices
            for top in range(0, tiles.num_tokens if columns else 0, tiles.rows):
                rows = slice(top, top + tiles.rows)
                product_TX[rows, numbers] = project(hidden_TD[rows], weight_vD[columns]).to(product_TX.dtype)
        return all_reduce_sum(product_nTX, group)  # every id lies on one rank

    def replaced(self, product_TX: Tensor, *, temperature: float) -> list[tuple[int, Tensor]]:
        """Return what stands in this rank's columns of the class: all of it in the first id's, nothing in the others'.

        Products, which are yet to be divided by the temperature.
        """
        class_T = (product_TX / temperature).logsumexp(-1) * temperature
        return [(column, torch.full_like(class_T, _NOTHING) if x else class_T) for x, column in self.local]

    def put(self, dlogits_Rw: Tensor, tile: Tile, *, gradient_TX: Tensor) -> None:
        """Write the gradient of the ids over what a tile has in their columns."""
        rows, columns = tile
        for x, column in self.local:
            if columns.start <= column < columns.stop:
                dlogits_Rw[:, column - columns.start] = gradient_TX[rows, x]


def gradient_of_ids(
    student_TX: Tensor, teacher_TX: Tensor, *, loss_T: Tensor, center_T: Tensor, kind: Kind, beta: float
) -> Tensor:
    """Return d loss / d logits of the class's ids, ``[T, X]``: each one's share ``q_e / q(E)`` of the class's own.

    That is ``q(E) - p(E)``, ``q(E) (log q(E)/p(E) - KL)`` or ``(1-b) q(E) (log q(E)/m(E) - KL(q||m))``; ``q`` is the
    student's, ``p`` the teacher's.

    Args:
        student_TX: log q of the ids.
        teacher_TX: log p of them.
        loss_T: the divergence.
        center_T: KL(q||m) of the jsd.
    """
    logq_T1, logp_T1 = (class_logprob(log_TX).unsqueeze(-1) for log_TX in (student_TX, teacher_TX))
    q_TX = student_TX.exp()
    if kind == "forward_kl":
        return q_TX - (logp_T1 + student_TX - logq_T1).exp()
    if kind == "reverse_kl":
        return q_TX * (logq_T1 - logp_T1 - loss_T.unsqueeze(-1))
    logm_T1 = torch.logaddexp(logp_T1 + _log(beta, logp_T1), logq_T1 + _log(1.0 - beta, logq_T1))
    return (1.0 - beta) * q_TX * (logq_T1 - logm_T1 - center_T.unsqueeze(-1))


def _log(weight: float, like: Tensor) -> Tensor:
    return like.new_tensor(weight).log()
