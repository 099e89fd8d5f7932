"""Count the tokens that end a response as one category, where student and teacher end theirs with different ones.

``E`` are the ids, all of them alternatives for one another: ``q(E) = sum_E q_e``. Every other token is a category of
its own, so the class coarsens both distributions alike and each divergence of theirs stays one. Whatever is needed
follows from the log-probs of the |E| ids, which are picked with the others: the same ids for every token, exact under
any sharding.

The first id of E stands for the class: ``represented`` writes it in place of the others, so that listing ids once
(``losses.support.first_of_each``) lists the class once.

Everything is in nats and differentiable in the log-probs; X counts the ids of E.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def is_end(ids: Tensor, end_ids: Sequence[int]) -> Tensor:
    """Mark the ids of the class, bool of the shape of ``ids``."""
    return torch.isin(ids, torch.tensor(list(end_ids), dtype=ids.dtype, device=ids.device))


def represented(ids: Tensor, end_ids: Sequence[int]) -> Tensor:
    """Replace every one of ``end_ids`` by the first of them."""
    return ids.masked_fill(is_end(ids, end_ids), end_ids[0]) if end_ids else ids


def with_ends(ids_TK: Tensor, end_ids: Sequence[int]) -> Tensor:
    """Append the ids of the class to those to be picked: ``[T, K + X]``."""
    if not end_ids:
        return ids_TK
    end_X = torch.tensor(list(end_ids), dtype=ids_TK.dtype, device=ids_TK.device)
    return torch.cat([ids_TK, end_X.expand(len(ids_TK), -1)], dim=1)


def class_logprob(end_TX: Tensor) -> Tensor:
    """Return ``log q(E)``, ``[T]``."""
    return end_TX.logsumexp(-1)


def at_ids(logprob: Tensor, ids: Tensor, end_ids: Sequence[int], end_TX: Tensor) -> Tensor:
    """Return log-probs at ids, ``[T]`` or ``[T, K]``: ``log q(E)`` in place of that of any id of the class."""
    class_T = class_logprob(end_TX)
    return torch.where(is_end(ids, end_ids), class_T if logprob.dim() == 1 else class_T[:, None], logprob)


def tail_outside(
    logtail_T: Tensor, logprob_T: Tensor, *, target_T: Tensor, ids_TK: Tensor, end_ids: Sequence[int], end_TX: Tensor
) -> Tensor:
    """Log mass outside a support, ``[T]``; the class is outside as a whole, or not at all.

    Args:
        logtail_T: log mass on what is neither in the support, nor the target, nor of the class.
        logprob_T: log-prob of the target.
        target_T: the target.
        ids_TK: the support.
        end_ids: the class.
        end_TX: log-probs of its ids.
    """
    inside_T = (ids_TK == target_T[:, None]).any(-1) | is_end(target_T, end_ids)
    logtail_T = torch.where(inside_T, logtail_T, torch.logaddexp(logtail_T, logprob_T))
    class_inside_T = is_end(ids_TK, end_ids).any(-1)
    return torch.where(class_inside_T, logtail_T, torch.logaddexp(logtail_T, class_logprob(end_TX)))


def class_entropy(entropy_T: Tensor, end_TX: Tensor) -> Tensor:
    """Return the entropy with the class as one category: ``H + sum_E q_e log q_e - q(E) log q(E)``, ``[T]``."""
    class_T = class_logprob(end_TX)
    return entropy_T + (end_TX.exp() * end_TX).sum(-1) - class_T.exp() * class_T
