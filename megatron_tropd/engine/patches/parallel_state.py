"""Point Megatron-Core's remaining global reads at one layout, for the duration of a block.

The model, DDP, optimizer and schedules take explicit groups, but a few places in megatron-core 0.16 still read
``parallel_state`` (cross_entropy, attention, layers under sequence parallel, layer layout): with another layout's
globals they would be silently wrong, without any they raise. The names are private: the version is pinned.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch.distributed as dist
from megatron.core import parallel_state

from megatron_tropd.errors import EngineError
from megatron_tropd.parallel.groups import Groups


def _globals_of(groups: Groups) -> dict[str, object]:
    pg = groups.pg
    ranks = dist.get_process_group_ranks
    virtual = groups.layout.virtual_pipeline
    return {
        "_TENSOR_MODEL_PARALLEL_GROUP": pg.tp,
        "_PIPELINE_MODEL_PARALLEL_GROUP": pg.pp,
        "_MODEL_PARALLEL_GROUP": pg.mp,
        "_DATA_PARALLEL_GROUP": pg.dp,
        "_DATA_PARALLEL_GROUP_WITH_CP": pg.dp_cp,
        "_INTRA_PARTIAL_DATA_PARALLEL_GROUP_WITH_CP": pg.dp_cp,
        "_CONTEXT_PARALLEL_GROUP": pg.cp,
        "_CONTEXT_PARALLEL_GLOBAL_RANKS": ranks(pg.cp),
        "_EMBEDDING_GROUP": pg.embd,
        "_POSITION_EMBEDDING_GROUP": pg.pos_embd,
        "_TENSOR_AND_CONTEXT_PARALLEL_GROUP": pg.tp_cp,
        "_TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": pg.tp_dp_cp,
        "_EXPERT_MODEL_PARALLEL_GROUP": pg.ep,
        "_EXPERT_TENSOR_PARALLEL_GROUP": pg.expt_tp,
        "_EXPERT_DATA_PARALLEL_GROUP": pg.expt_dp,
        "_EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": pg.tp_ep,
        "_EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP": pg.tp_ep_pp,
        "_TENSOR_MODEL_PARALLEL_GLOBAL_RANKS": ranks(pg.tp),
        "_PIPELINE_GLOBAL_RANKS": ranks(pg.pp),
        "_DATA_PARALLEL_GLOBAL_RANKS": ranks(pg.dp),
        "_VIRTUAL_PIPELINE_MODEL_PARALLEL_WORLD_SIZE": virtual if virtual > 1 else None,
        "_VIRTUAL_PIPELINE_MODEL_PARALLEL_RANK": 0 if virtual > 1 else None,
    }


@contextlib.contextmanager
def use_parallel_state(groups: Groups) -> Iterator[None]:
    """Let Megatron-Core's globals describe ``groups`` within the block.

    What builds, saves and loads also names CUDA devices: ``cuda_calls.cuda_names_mean_cpu`` beside this one.
    """
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()
    wanted = _globals_of(groups)
    missing = [name for name in wanted if not hasattr(parallel_state, name)]
    if missing:
        raise EngineError(
            f"this megatron-core has no parallel_state.{missing[0]}: it is not the version this package was built for. "
            "Install the pinned version (see constraints.txt)."
        )
    before = {name: getattr(parallel_state, name) for name in wanted}
    vars(parallel_state).update(wanted)
    try:
        yield
    finally:
        vars(parallel_state).update(before)
