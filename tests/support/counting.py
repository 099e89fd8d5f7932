"""Counts what ranks really hand to each other: every operation of ``torch.distributed``, as it is dispatched.

Two things are made as they are on GPUs: our reduce-scatter, which on gloo is a sum that is cut, scatters; and attention
to keys of other ranks gets its mask as a tensor, since a counting mode cannot see through torch's own kind of mask.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_tropd.engine import context
from megatron_tropd.parallel import collectives

# names of torch's operations -> ours, and which argument is the whole: what a gather makes, what a scatter is given
_OPERATIONS = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "alltoall_base_": ("all_to_all", 1),
    "alltoall_": ("all_to_all", 1),
    "send": ("send", 0),
}
SMALL = 128  # bytes of a call that only carries a number or two; sums kept in fp64 are of that kind too


Counts = dict[tuple[str, str], int]  # (operation, ranks that take part) -> bytes


def ranks_of(operation: str, group: dist.ProcessGroup) -> str:
    """World ranks, such as "0,2"; of messages, which may go through any group, nothing."""
    return "" if operation == "send" else ",".join(map(str, dist.get_process_group_ranks(group)))


class Counting(TorchDispatchMode):
    """Within the block: what this rank takes part in. Ranks that are alone send nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[tuple[str, str]] = Counter()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if func.namespace == "c10d" and name in _OPERATIONS:
            operation, whole = _OPERATIONS[name]
            (boxed,) = [a for a in args if isinstance(a, torch.ScriptObject) and "ProcessGroup" in str(a._type())]
            group = dist.ProcessGroup.unbox(boxed)
            tensors = [x for x in tree_leaves(args[whole]) if isinstance(x, Tensor) and x.dtype != torch.float64]
            size = sum(x.numel() * x.element_size() for x in tensors)
            if size > SMALL and group.size() > 1:
                self.bytes[operation, ranks_of(operation, group)] += size
                self.calls.append((operation, size))
        return func(*args, **(kwargs or {}))


def _scattered(x_TD: Tensor, group: Any) -> Tensor:
    if group is None:
        return x_TD
    share_tD = x_TD.new_empty((x_TD.shape[0] // dist.get_world_size(group), *x_TD.shape[1:]))
    collectives._reduce_scatter_single(share_tD, x_TD.contiguous(), group=group)
    return share_tD


@contextmanager
def as_on_gpus() -> Iterator[None]:
    kept = collectives.reduce_scatter_rows, context.causal_lower_right
    collectives.reduce_scatter_rows = _scattered
    context.causal_lower_right = lambda q, k: torch.ones(q, k, dtype=torch.bool).tril(k - q)  # type: ignore[assignment]
    try:
        yield
    finally:
        collectives.reduce_scatter_rows, context.causal_lower_right = kept  # type: ignore[assignment]
