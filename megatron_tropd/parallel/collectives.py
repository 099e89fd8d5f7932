"""The collectives the package uses: plain ``torch.distributed``, contiguous tensors, ``group=None`` is one rank.

The first half has no autograd (a collective without a backward inside a graph is the classic wrong gradient of
tensor-parallel losses): use it on detached tensors or inside an ``autograd.Function``. The second half holds the
region mappings, which are ``autograd.Function`` themselves.

Megatron-Core's own mappings are not used: its reduction returns a non-contiguous input unreduced.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.errors import ConfigError

Group: TypeAlias = dist.ProcessGroup | None

# torch 2.13 renamed both; the old names warn there, the new ones are missing before
_all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_single: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def group_rank(group: Group) -> int:
    """Return this process's rank within ``group``; 0 when it is None."""
    return 0 if group is None else dist.get_rank(group)


def group_size(group: Group) -> int:
    """Return the number of ranks in ``group``; 1 when it is None."""
    return 1 if group is None else dist.get_world_size(group)


def all_reduce_sum(x: Tensor, group: Group) -> Tensor:
    """Sum ``x`` over the ranks of ``group``, in place when ``x`` is contiguous; return the result. No autograd."""
    return _all_reduce(x, dist.ReduceOp.SUM, group)


def all_reduce_max(x: Tensor, group: Group) -> Tensor:
    """Take the elementwise maximum over the ranks of ``group``, in place when ``x`` is contiguous. No autograd."""
    return _all_reduce(x, dist.ReduceOp.MAX, group)


def _all_reduce(x: Tensor, op: Any, group: Group) -> Tensor:
    if group is None:
        return x
    x = x.contiguous()
    dist.all_reduce(x, op=op, group=group)
    return x


def all_gather_stack(x: Tensor, group: Group) -> Tensor:
    """Gather every rank's ``x`` (same shape everywhere), stacked in rank order: ``[ranks, *x.shape]``. No autograd."""
    if group is None:
        return x.unsqueeze(0)
    gathered = x.new_empty((group_size(group), *x.shape))
    _all_gather_single(gathered, x.contiguous().unsqueeze(0), group=group)
    return gathered


def all_gather_rows(x_tD: Tensor, group: Group) -> Tensor:
    """Gather every rank's rows (same number everywhere), concatenated on dim 0 in rank order. No autograd."""
    return x_tD if group is None else all_gather_stack(x_tD, group).flatten(0, 1)


def reduce_scatter_rows(x_TD: Tensor, group: Group) -> Tensor:
    """Sum over ranks and keep this rank's equal share of the rows (dim 0). No autograd.

    Raises:
        ConfigError: the number of rows is not a multiple of the number of ranks.
    """
    if group is None:
        return x_TD
    ranks = group_size(group)
    if x_TD.shape[0] % ranks:
        raise ConfigError(
            f"{x_TD.shape[0]} rows cannot be shared equally by {ranks} ranks. "
            f"Pad the pack to a multiple of {ranks} tokens."
        )
    rows = x_TD.shape[0] // ranks
    if x_TD.is_cuda:  # NCCL; the group's own name is that of all its backends, "cpu:gloo,cuda:nccl"
        share_tD = x_TD.new_empty((rows, *x_TD.shape[1:]))
        _reduce_scatter_single(share_tD, x_TD.contiguous(), op=dist.ReduceOp.SUM, group=group)
        return share_tD
    # gloo's reduce-scatter lacks some dtypes; the sum of everything, cut, is the same numbers
    total_TD = all_reduce_sum(x_TD.clone(memory_format=torch.contiguous_format), group)
    first = group_rank(group) * rows
    return total_TD[first : first + rows].clone()


class _CopyToRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        # autograd may share the incoming gradient with other branches, so it is never reduced in place
        return all_reduce_sum(grads[0].clone(memory_format=torch.contiguous_format), ctx.group), None


class _GatherSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_tD: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return all_gather_rows(x_tD, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return reduce_scatter_rows(grads[0], ctx.group), None


class _ReduceFromRegion(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return all_reduce_sum(x.clone(memory_format=torch.contiguous_format), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _ScatterSequence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return reduce_scatter_rows(x_TD, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_gather_rows(grads[0], ctx.group), None


def copy_to_region(x: Tensor, group: Group) -> Tensor:
    """Enter a region where each rank of ``group`` uses the same ``x`` for its own part of the work.

    Forward is the identity; backward sums the ranks' partial gradients, so every rank gets the whole gradient.
    """
    return x if group is None else _CopyToRegion.apply(x, group)


def gather_sequence(x_tD: Tensor, group: Group) -> Tensor:
    """Enter such a region from a sequence-parallel one, where each rank holds an equal share of the rows.

    Forward concatenates the shares on dim 0 in rank order, ``[t, D] -> [t * ranks, D]``; backward sums the ranks'
    partial gradients and gives each rank its own rows.
    """
    return x_tD if group is None else _GatherSequence.apply(x_tD, group)


def reduce_from_region(x: Tensor, group: Group) -> Tensor:
    """Leave such a region with the sum of the ranks' partial ``x``, whole on every rank.

    Backward is the identity: every rank has the whole gradient already.
    """
    return x if group is None else _ReduceFromRegion.apply(x, group)


def scatter_sequence(x_TD: Tensor, group: Group) -> Tensor:
    """Leave such a region for a sequence-parallel one: sum the ranks' partial rows, and keep this rank's share.

    Forward takes ``[t * ranks, D] -> [t, D]`` on dim 0; backward gathers the gradients of all rows.
    """
    return x_TD if group is None else _ScatterSequence.apply(x_TD, group)
