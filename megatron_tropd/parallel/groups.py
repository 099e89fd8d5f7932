"""Process groups of one parallel layout, as an explicit Megatron-Core ``ProcessGroupCollection``.

Student, teacher and sampler may each have their own layout over the same ranks, so nothing here is global. Rank order
is Megatron's default: tensor fastest, then context, data, and pipeline slowest; experts divide the data x context
ranks.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.distributed import distributed_c10d

from megatron_tropd.config.sections import Layout
from megatron_tropd.errors import ConfigError
from megatron_tropd.parallel.device import local_device
from megatron_tropd.parallel.wakeup import interruptible


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """The groups one rank belongs to under one layout, and where in the layout it stands."""

    layout: Layout
    pg: ProcessGroupCollection
    num_replicas: int  # data-parallel size
    replica: int  # data-parallel rank

    @property
    def tensor_rank(self) -> int:
        return self.pg.tp.rank()

    @property
    def context_rank(self) -> int:
        return self.pg.cp.rank()

    @property
    def stage(self) -> int:
        return self.pg.pp.rank()

    @property
    def is_first_stage(self) -> bool:
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        return self.stage == self.layout.pipeline - 1

    @property
    def tp(self) -> dist.ProcessGroup | None:
        """Return the tensor-parallel group, None when it has one rank (what the losses expect)."""
        return self.pg.tp if self.layout.tensor > 1 else None

    def global_rank(self, *, replica: int, stage: int, tensor: int = 0, context: int = 0) -> int:
        """Return the world rank at the given coordinates."""
        return self.layout.rank_at(
            replica=replica, replicas=self.num_replicas, stage=stage, tensor=tensor, context=context
        )


# ranks start at different times: nodes boot, a file system is slow, an environment is unpacked
JOIN_TIMEOUT_S = 1800.0


def initialize_distributed(
    *, timeout_s: float = JOIN_TIMEOUT_S, place: tuple[Any, int, int] | None = None
) -> torch.device:
    """Join torchrun's world, or make a world of one. Return this rank's device.

    Safe to call twice. Uses NCCL where there are GPUs and gloo elsewhere. Joining may take as long as it takes; from
    then on, all ranks having met, a collective over them that lasts longer than ``timeout_s`` is an error. ``place``:
    (store to meet at, rank, size) of a world that is not all of torchrun's.

    Raises:
        ConfigError: this machine has more ranks than GPUs.
    """
    device = local_device(os.environ)
    has_gpu = device.type == "cuda"
    if has_gpu:
        torch.cuda.set_device(device)
    if dist.is_initialized():
        return device
    backend = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
    timeout = datetime.timedelta(seconds=max(timeout_s, JOIN_TIMEOUT_S))
    if place is not None:
        store, rank, size = place
        with interruptible():
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    elif "RANK" in os.environ:
        with interruptible():
            dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    _connect_all(device)
    distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=timeout_s))
    return device


def _connect_all(device: torch.device) -> None:
    """Have all ranks meet in one collective.

    NCCL makes a group's communicator at its first use, by all ranks. Were that a batch of point-to-point messages
    (``PointToPoint.exchange``), in which some ranks have no part, it would wait for those.
    """
    dist.all_reduce(torch.zeros(1, device=device))


class GroupBuilder:
    """Make process groups in the same order on every rank, one per distinct set of ranks.

    Every rank of the world must build the same layouts in the same order: ``new_group`` is collective.
    """

    def __init__(self, *, timeout_s: float = JOIN_TIMEOUT_S) -> None:
        """Keep the groups. ``timeout_s``: a collective or message within a group that takes longer is an error."""
        self._timeout = datetime.timedelta(seconds=timeout_s)
        self._made: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def build(self, layout: Layout) -> Groups:
        """Make the groups of ``layout`` over the whole world."""
        world = dist.get_world_size()
        replicas = layout.data_size(world)
        grid = np.arange(world).reshape(layout.pipeline, replicas, layout.context, layout.tensor)
        axes = {"pp": 0, "dp": 1, "cp": 2, "tp": 3}

        def along(*names: str) -> dist.ProcessGroup | None:
            return self.mine(_subgrids(grid, [axes[name] for name in names]))

        pg = ProcessGroupCollection(
            tp=along("tp"),
            pp=along("pp"),
            cp=along("cp"),
            dp=along("dp"),
            mp=along("pp", "tp"),
            tp_cp=along("cp", "tp"),
            dp_cp=along("dp", "cp"),
            tp_dp_cp=along("dp", "cp", "tp"),
            intra_dist_opt=along("pp", "dp", "cp", "tp"),
        )
        pipelines = _subgrids(grid, [axes["pp"]])
        pg.embd = self.mine([sorted({ranks[0], ranks[-1]}) for ranks in pipelines])
        pg.pos_embd = self.mine([[ranks[0]] for ranks in pipelines])
        pg.intra_dp_cp = pg.dp_cp
        _fill_expert_groups(pg, self, grid, layout, replicas)
        _, replica, _, _ = np.argwhere(grid == dist.get_rank())[0]
        return Groups(layout=layout, pg=pg, num_replicas=replicas, replica=int(replica))

    def mine(self, partitions: list[list[int]]) -> dist.ProcessGroup | None:
        """Return this rank's group among ``partitions``, all of which are made; None when it is in none of them."""
        mine: dist.ProcessGroup | None = None
        for ranks in partitions:
            key = tuple(ranks)
            if key not in self._made:
                self._made[key] = dist.new_group(ranks, timeout=self._timeout)
            if dist.get_rank() in key:
                mine = self._made[key]
        return mine


def _subgrids(grid: np.ndarray, axes: list[int]) -> list[list[int]]:
    """List every set of ranks that differ only along ``axes``, in rank order."""
    others = [axis for axis in range(grid.ndim) if axis not in axes]
    size = int(np.prod([grid.shape[axis] for axis in axes]))
    flat: list[list[int]] = grid.transpose(*others, *sorted(axes)).reshape(-1, size).tolist()
    return flat


def _fill_expert_groups(
    pg: ProcessGroupCollection, builder: GroupBuilder, grid: np.ndarray, layout: Layout, replicas: int
) -> None:
    """Make the expert groups: tensor parallelism is kept, experts are sharded over the data x context ranks.

    Megatron reads absent fields from its global state or the world, silently: so every field is set.
    """
    data_context = replicas * layout.context
    if data_context % layout.expert:
        raise ConfigError(
            f"expert parallel size {layout.expert} does not divide data*context = {replicas}*{layout.context} = "
            f"{data_context}. Choose a divisor of {data_context}."
        )
    expert_grid = grid.reshape(layout.pipeline, data_context // layout.expert, layout.expert, layout.tensor)

    def along(*axes: int) -> dist.ProcessGroup | None:
        return builder.mine(_subgrids(expert_grid, list(axes)))

    pg.ep, pg.expt_tp, pg.expt_dp = along(2), along(3), along(1)
    pg.tp_ep, pg.tp_ep_pp = along(2, 3), along(0, 2, 3)
    pg.intra_expt_dp = pg.expt_dp
