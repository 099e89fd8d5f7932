"""Adapters of a whole model: put beside its frozen weights, filled, brought together again, and saved.

``engine.lora`` is what happens in one linear.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_tropd.config.sections import Layout
from megatron_tropd.engine.lora import Adapters, LinearPlace, LowRankUpdate
from megatron_tropd.engine.model import HiddenStateGPT, Model
from megatron_tropd.models.adapters import AdaptedLinear, AdaptedPart, adapted_linears
from megatron_tropd.models.rules import Sliceable
from megatron_tropd.parallel.collectives import all_gather_stack
from megatron_tropd.types import AdapterSpec, Architecture

_CHILD = "adapter"  # of a linear


def is_adapter(name: str) -> bool:
    """Say whether a parameter's name is that of an adapter's matrix."""
    return f".{_CHILD}." in name


def add_adapters(model: Model, spec: AdapterSpec, *, seed: int) -> Model:
    """Freeze the model's weights and put an adapter beside every matrix of ``spec.targets``, to be used in its place.

    A is random, of the spread that `peft` gives it, and B is zero, so that the model is what it was. The numbers are
    the same under every layout: they follow from ``seed`` and the matrix's name.
    """
    adapters, layout = Adapters(spec, seed), model.groups.layout
    place = LinearPlace(
        group=model.groups.tp,
        sequence=bool(model.config.sequence_parallel),
        head_groups=model.architecture.num_kv_heads // layout.tensor,
    )
    for chunk, offset in zip(model.chunks, model.layer_offsets(), strict=True):
        chunk.requires_grad_(False)
        chunk.differentiate_inputs = model.config.recompute_granularity == "full"
        layers = range(offset, offset + len(chunk.decoder.layers))
        for linear in adapted_linears(model.architecture, spec, layers):
            module = _module(chunk, linear, offset)
            update = LowRankUpdate(linear, adapters, place, module.get_parameter("weight"))
            _initialize(update, seed)
            module.add_module(_CHILD, update)
            module.register_forward_hook(partial(_add_update, update))
            if spec.dropout:
                layer = chunk.decoder.layers[linear.layer - offset]
                layer.register_forward_pre_hook(partial(_note_plan, update), with_kwargs=True)
    return replace(model, adapters=adapters)


def _module(chunk: HiddenStateGPT, linear: AdaptedLinear, first_layer: int) -> torch.nn.Module:
    """Find a linear in a chunk, which counts its layers from its own first one."""
    name = linear.weight.replace(f"layers.{linear.layer}.", f"layers.{linear.layer - first_layer}.")
    return chunk.get_submodule(name.removesuffix(".weight"))


def _add_update(update: LowRankUpdate, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    out, bias = output
    return update(args[0], out), bias


def _note_plan(update: LowRankUpdate, module: torch.nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
    update.note_plan(kwargs["packed_seq_params"])


@torch.no_grad()
def _initialize(update: LowRankUpdate, seed: int) -> None:
    for part in update.linear.adapted:
        inputs = part.shape[1]
        digest = hashlib.sha256(f"{seed} {part.key('lora_A')}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        bound = 1 / math.sqrt(inputs)  # Kaiming's, uniform, with a = sqrt(5)
        whole = torch.empty(update.spec.rank, inputs).uniform_(-bound, bound, generator=generator)
        update.matrix(part, "A").copy_(whole[update.span(part, "A")])
        update.matrix(part, "B").zero_()


def updates_of(model: Model) -> Iterator[LowRankUpdate]:
    """List this rank's adapters, in the model's order."""
    for chunk in model.chunks if model.adapters is not None else ():
        yield from (module for module in chunk.modules() if isinstance(module, LowRankUpdate))


def _matrices(model: Model) -> Iterator[tuple[str, LowRankUpdate, AdaptedPart, str]]:
    """List this rank's matrices: `peft`'s name, the adapter, its part, and A or B."""
    for update in updates_of(model):
        for part in update.linear.adapted:
            for name in ("A", "B"):
                yield part.key(f"lora_{name}"), update, part, name


# --------------------------------------------------------------------------- in and out


@torch.no_grad()
def load_adapters(model: Model, tensors: Mapping[str, Sliceable]) -> None:
    """Fill the adapters from whole matrices under `peft`'s names, of which this rank's part alone is read."""
    for key, update, part, name in _matrices(model):
        update.matrix(part, name).copy_(tensors[key][update.span(part, name)])


def adapter_tensors(model: Model) -> Iterator[tuple[str, Tensor]]:
    """Yield every whole matrix under `peft`'s name, on every rank, in the same order. Collective.

    Every rank must run the iterator to its end.
    """
    model.finish_pending_gathers()
    assert model.adapters is not None
    groups, spec = model.groups, model.adapters.spec
    local = {key: (update, update.matrix(part, name).detach()) for key, update, part, name in _matrices(model)}
    for stage, layers in _layers_of_stages(model):
        for linear in adapted_linears(model.architecture, spec, layers):
            for part in linear.adapted:
                shapes = {"A": (spec.rank, part.shape[1]), "B": (part.shape[0], spec.rank)}
                for name, shape in shapes.items():
                    key = part.key(f"lora_{name}")
                    if stage == groups.stage:
                        update, own = local[key]
                        whole = _joined(own, update.cut_axis(name), model)
                    else:
                        whole = torch.empty(shape, dtype=model.dtype, device=model.device)
                    if groups.layout.pipeline > 1:
                        dist.broadcast(whole, src=dist.get_global_rank(groups.pg.pp, stage), group=groups.pg.pp)
                    yield key, whole


def _joined(own: Tensor, axis: int | None, model: Model) -> Tensor:
    """Put the tensor ranks' parts of a matrix together."""
    if axis is None:
        return own.clone()
    return torch.cat(all_gather_stack(own, model.groups.tp).unbind(), dim=axis).contiguous()


def _layers_of_stages(model: Model) -> Iterator[tuple[int, range]]:
    """List the layers of every chunk of the model with the stage that holds it, in the order of the layers."""
    layout, config = model.groups.layout, model.config
    for chunk in range(layout.virtual_pipeline):
        virtual = chunk if layout.virtual_pipeline > 1 else None
        for stage in range(layout.pipeline):
            first = get_transformer_layer_offset(config, virtual, pp_rank=stage)
            yield stage, range(first, first + get_num_layers_to_build(config, virtual, pp_rank=stage))


# --------------------------------------------------------------------------- checkpoints


def sharded_adapters(model: Model) -> dict[str, ShardedTensor]:
    """Describe this rank's matrices to Megatron's checkpoints, by which any layout can read them."""
    groups = model.groups
    found = {}
    for key, update, part, name in _matrices(model):
        axis = update.cut_axis(name)
        cuts = () if axis is None else ((axis, groups.tensor_rank, groups.layout.tensor),)
        replica = (0, groups.tensor_rank if axis is None else 0, groups.pg.dp_cp.rank())
        parameter = update.matrix(part, name)
        found[key] = ShardedTensor.from_rank_offsets(key, parameter, *cuts, replica_id=replica)
    return found


@torch.no_grad()
def restore_adapters(model: Model, loaded: Mapping[str, Tensor]) -> None:
    """Take what a checkpoint holds for ``sharded_adapters``."""
    for key, update, part, name in _matrices(model):
        update.matrix(part, name).copy_(loaded[key])


# --------------------------------------------------------------------------- sizes


def adapter_sizes(architecture: Architecture, layout: Layout, spec: AdapterSpec) -> tuple[tuple[int, ...], int]:
    """Return the elements of every matrix of a layer's adapters on one rank, and of those that tensor ranks have alike
    but see other tokens of (none without sequence parallelism).
    """
    sizes, partial_sums = [], 0
    for linear in adapted_linears(architecture, spec, range(1)):
        for part in linear.adapted:
            rows, columns = part.shape
            whole, cut = (rows, columns) if linear.by_input else (columns, rows)
            sizes += [whole * spec.rank, cut // layout.tensor * spec.rank]
            partial_sums += whole * spec.rank
    return tuple(sizes), partial_sums if layout.sequence and layout.tensor > 1 else 0
