"""Run packs through a model under its pipeline schedule, handing the last stage hidden states of valid predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from megatron_tropd.config.sections import Layout
from megatron_tropd.engine.attention import PackedPlan, Plan
from megatron_tropd.engine.context import ContextPlan, held_tokens, own_valid_positions
from megatron_tropd.engine.dropout import row_histories
from megatron_tropd.engine.forest import ForestPlan
from megatron_tropd.engine.model import HiddenStateGPT, Model
from megatron_tropd.engine.patches.parallel_state import use_parallel_state
from megatron_tropd.engine.rows import computed_rows, gather_rows, is_forest, row_inputs, row_of
from megatron_tropd.parallel.collectives import copy_to_region, gather_sequence
from megatron_tropd.progress.phases import Phase
from megatron_tropd.types import Int64Array, Pack, Region

# (number of the pack in the call, hidden states of its valid predictions [N, D], output weight shard [v, D])
LastStage = Callable[[int, Tensor, Tensor], Any]


@dataclass(frozen=True, slots=True)
class _Inputs:
    """One pack on the device."""

    number: int
    ids: Tensor  # [1, r]
    positions: Tensor  # [1, r]
    plan: Plan
    read_N: Tensor  # of this rank's rows, those that predictions which carry loss read
    history_r: Tensor | None  # of each row's tokens, where inputs of adapters are dropped by it
    unbalanced: Tensor | None  # [1, r] bool, True where a row does not count for the balance of experts' loads


def _inputs(number: int, pack: Pack, model: Model) -> _Inputs:
    groups, device = model.groups, model.device
    held_r = held_tokens(computed_rows(pack), rank=groups.context_rank, ranks=groups.layout.context)
    ids, positions = row_inputs(pack)
    row_N = row_of(pack)[own_valid_positions(pack, groups)]
    tokens_r = np.bincount(row_N, minlength=computed_rows(pack))[held_r]  # predictions that read each row
    return _Inputs(
        number=number,
        ids=torch.from_numpy(ids[held_r])[None].to(device),
        positions=torch.from_numpy(positions[held_r])[None].to(device),
        plan=_plan(pack, tokens_r, model),
        read_N=torch.from_numpy(np.searchsorted(held_r, row_N)).to(device),
        history_r=torch.from_numpy(row_histories(pack)[held_r]).to(device) if _drops(model) else None,
        unbalanced=torch.from_numpy(tokens_r == 0)[None].to(device) if model.config.moe_aux_loss_coeff else None,
    )


def _drops(model: Model) -> bool:
    """Say whether inputs of adapters are dropped in passes with a backward."""
    adapters = model.adapters
    return adapters is not None and adapters.update is not None and adapters.spec.dropout > 0


def _plan(pack: Pack, tokens_r: Int64Array, model: Model) -> Plan:
    if is_forest(pack):
        return ForestPlan.build(pack, tokens_r, model.groups.pg.cp, model.device)
    if model.groups.layout.context == 1:
        return PackedPlan.build(pack.cu_seqlens, model.device)
    return ContextPlan.build(pack.cu_seqlens, model.groups.pg.cp, model.device)


def run_packs(
    model: Model,
    packs: Sequence[Pack],
    last_stage: LastStage,
    *,
    wrapped: Sequence[torch.nn.Module] | None = None,
    backward: bool = False,
) -> list[Any]:
    """Send ``packs`` through the model, one microbatch each, and collect what ``last_stage`` returns.

    Every rank of the model's replica must pass the same packs. Without ``backward`` the result (on last-stage ranks;
    others get an empty list) holds one value per pack. With it, ``last_stage`` returns ``(loss, info)``, gradients are
    accumulated into ``wrapped`` (the DDP-wrapped chunks), and the result holds the infos.
    """
    model.finish_pending_gathers()  # on all ranks alike: stages wait for one another
    modules = list(wrapped if wrapped is not None else model.chunks)
    groups, virtual = model.groups, model.groups.layout.virtual_pipeline
    prepared = [_inputs(i, pack, model) for i, pack in enumerate([*packs, *_fillers(len(packs), groups.layout)])]

    def last_of_packs(number: int, hidden_ND: Tensor, weight_vD: Tensor) -> Any:
        if number < len(packs):
            return last_stage(number, hidden_ND, weight_vD)
        # every weight has a gradient, if a vanishing one: reduction waits for all of them
        return (hidden_ND.sum() + 0.0 * weight_vD.sum(), None) if backward else None

    def forward_step(batches: Iterator[_Inputs], module: torch.nn.Module) -> tuple[Tensor, Callable[..., Any]]:
        batch = next(batches)
        phase.reach(batch.number)
        hidden = module(batch.ids, batch.positions, None, packed_seq_params=batch.plan, padding_mask=batch.unbalanced)
        return hidden, partial(_finish, batch=batch, module=module, model=model, last_stage=last_of_packs)

    schedule = get_forward_backward_func(pp_size=groups.layout.pipeline, vp_size=virtual if virtual > 1 else None)
    options: dict[str, Any] = {}
    if groups.layout.pipeline > 1:
        options["p2p_communicator"] = P2PCommunicator(groups.pg.pp, model.config)
    phase = Phase("packs", total=len(prepared))
    histories = {id(one.plan): one.history_r for one in prepared if backward and one.history_r is not None}
    with use_parallel_state(groups), model.in_use(histories), torch.set_grad_enabled(backward), phase:
        collected: list[Any] = schedule(
            forward_step_func=forward_step,
            data_iterator=[iter(prepared) for _ in modules],
            model=modules,
            num_microbatches=len(prepared),
            seq_length=max(computed_rows(pack) for pack in packs) // groups.layout.context,
            micro_batch_size=1,
            forward_only=not backward,
            collect_non_loss_data=not backward,
            pg_collection=groups.pg,
            **options,
        )
    return collected[: len(packs)]


def _fillers(count: int, layout: Layout) -> list[Pack]:
    """Make packs of padding: interleaved stages take microbatches by the whole round of the pipeline."""
    if layout.virtual_pipeline == 1:
        return []
    length = layout.tensor * layout.context * 2
    zeros = np.zeros(length, np.int64)
    filler = Pack(
        token_T=zeros,
        target_T=zeros,
        position_T=np.arange(length),
        region_T=np.full(length, Region.PAD, np.uint8),
        sequence_T=np.full(length, -1),
        cu_seqlens=np.array([0, length], np.int32),
        sequence_ids=np.empty(0, np.int64),
        num_valid=0,
    )
    return [filler] * (-count % layout.pipeline)


def _finish(
    hidden: Tensor,
    non_loss_data: bool = False,
    *,
    batch: _Inputs,
    module: torch.nn.Module,
    model: Model,
    last_stage: LastStage,
) -> Any:
    """Return the function that the schedule calls on the last stage."""
    chunk = unwrap(module)
    result = last_stage(batch.number, _read_hidden(hidden, batch.read_N, model), chunk.output_weight())
    if non_loss_data:
        return result
    loss, info = result
    # the schedule expects a token count; the division by the global weight happens once, after the last microbatch
    return loss, torch.zeros((), dtype=torch.int), info


def _read_hidden(hidden: Tensor, read_N: Tensor, model: Model) -> Tensor:
    """Pick, of ``[r / tp or r, 1, D]``, the ``[N, D]`` rows that predictions read, whole on every tensor rank.

    Backward adds up the tensor ranks' partial gradients (the losses return one per vocabulary shard).
    """
    rows = hidden.squeeze(1)
    if model.config.sequence_parallel:
        return gather_rows(gather_sequence(rows, model.groups.tp), read_N)
    return copy_to_region(gather_rows(rows, read_N), model.groups.tp)


def unwrap(module: torch.nn.Module) -> HiddenStateGPT:
    """Return the model inside DDP."""
    inner = module.module if hasattr(module, "module") else module
    assert isinstance(inner, HiddenStateGPT)
    return inner
