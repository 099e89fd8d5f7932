"""The ends of responses as one category (``losses/end_class.py``) of a full divergence.

The passes count every column by itself; what the class changes of their numbers follows from the logits of its few ids.
Where one model ends its responses with one id and the other with another, the class's own columns are some 25 nats
apart, and the gradients of "all columns" and of "less these columns, plus their class" would each be a thousand times
what is left of them. So the gradient is formed once, with the class's numbers in it, before anything is rounded to the
dtype of a product: nothing large is ever written, in bf16 no more than in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tropd.errors import ConfigError
from megatron_tropd.losses.end_class import class_divergence, class_logprob
from megatron_tropd.losses.vocab_parallel.backends.protocol import Kind
from megatron_tropd.losses.vocab_parallel.projection import Factors, project
from megatron_tropd.losses.vocab_parallel.statistics import Normalizer
from megatron_tropd.losses.vocab_parallel.tiles import Shard, Tile, Tiles
from megatron_tropd.parallel.collectives import Group, all_reduce_sum


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

    def logprobs(
        self, models: Sequence[tuple[Factors, Normalizer]], *, tiles: Tiles, temperature: float, group: Group
    ) -> list[Tensor]:
        """Return each model's log-probs of the ids, ``[T, X]``, on every rank. One collective."""
        first, _ = models[0]
        shape = (len(models), tiles.num_tokens, len(self.ids))
        logits_nTX = torch.zeros(shape, dtype=first.product_dtype, device=first.device)
        numbers, columns = ([pair[k] for pair in self.local] for k in (0, 1))
        for logits_TX, (factors, _) in zip(logits_nTX, models, strict=True):
            hidden_TD, weight_vD = factors.matrices
            for top in range(0, tiles.num_tokens if columns else 0, tiles.rows):
                rows = slice(top, top + tiles.rows)
                logits_TX[rows, numbers] = project(hidden_TD[rows], weight_vD[columns]).to(logits_TX.dtype)
        all_reduce_sum(logits_nTX.mul_(1.0 / temperature), group)  # every id lies on one rank
        return [
            logits_TX - of.max_T.unsqueeze(-1) - of.sumexp_T.log().unsqueeze(-1)
            for logits_TX, (_, of) in zip(logits_nTX, models, strict=True)
        ]

    def put(self, dlogits_Rw: Tensor, tile: Tile, *, replaced_TX: Tensor, grad_T: Tensor) -> None:
        """Write the class's gradient over that of its columns in a tile."""
        rows, columns = tile
        for x, column in self.local:
            if columns.start <= column < columns.stop:
                dlogits_Rw[:, column - columns.start] = replaced_TX[rows, x] * grad_T[rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassDivergence:
    """A divergence with the class in it."""

    loss_T: Tensor
    center_T: Tensor  # as in ``backends/torch/divergence.py``
    replaced_TX: Tensor  # d loss / d logits of the class's ids

    @staticmethod
    def of(
        loss_T: Tensor, center_T: Tensor, logq_TX: Tensor, logp_TX: Tensor, *, kind: Kind, beta: float
    ) -> ClassDivergence:
        """Put the class into numbers that count its ids one by one; ``q`` is the student's, ``p`` the teacher's.

        Of what an id of the class gets, its share ``q_e / q(E)`` of the class's own gradient:
        ``q(E) - p(E)``, ``q(E) (log q(E)/p(E) - KL)``, ``(1-b) q(E) (log q(E)/m(E) - KL(q||m))``.
        """
        class_T = class_divergence(loss_T, logq_TX, logp_TX, kind=kind, beta=beta)
        logq_T1, logp_T1 = (class_logprob(log_TX).unsqueeze(-1) for log_TX in (logq_TX, logp_TX))
        q_TX = logq_TX.exp()
        if kind == "forward_kl":
            replaced_TX = q_TX - (logp_T1 + logq_TX - logq_T1).exp()
        elif kind == "reverse_kl":
            center_T = center_T + (class_T - loss_T)
            replaced_TX = q_TX * (logq_T1 - logp_T1 - class_T.unsqueeze(-1))
        else:
            logm_TX = torch.logaddexp(logp_TX + _log(beta, logp_TX), logq_TX + _log(1.0 - beta, logq_TX))
            center_T = class_divergence(center_T, logq_TX, logm_TX, kind="reverse_kl", beta=beta)
            above_T1 = logq_T1 - class_logprob(logm_TX).unsqueeze(-1)
            replaced_TX = (1.0 - beta) * q_TX * (above_T1 - center_T.unsqueeze(-1))
        return ClassDivergence(loss_T=class_T, center_T=center_T, replaced_TX=replaced_TX)


def _log(weight: float, like: Tensor) -> Tensor:
    return like.new_tensor(weight).log()
