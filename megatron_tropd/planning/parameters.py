"""Bytes of weights, gradients and optimizer states that each rank of a layout holds: exactly, padding included.

The sizes are those that Megatron-Core builds under ``engine.model`` and ``engine.optimizer``; the tests count them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_tropd.config.sections import Layout
from megatron_tropd.engine.adapters import adapter_sizes
from megatron_tropd.engine.model import padded_vocab_size, uneven_stages
from megatron_tropd.types import AdapterSpec, Architecture

_GRADIENT_BYTES = 4  # gradients are summed and reduced in fp32
# of the distributed optimizer's buffers, in elements: where a parameter may start, and the least a bucket's end divides
_PARAMETER_ALIGNMENT, _BUCKET_ALIGNMENT = 64, 128


@dataclass(frozen=True, slots=True)
class Chunk:
    """Elements of every parameter that one rank holds of one model chunk (a pipeline stage, or a virtual one)."""

    shared: tuple[int, ...]  # reduced over all data ranks
    embedding: tuple[int, ...]  # the same, of a tied embedding that two stages hold: a bucket of its own
    experts: tuple[int, ...]  # reduced over the data ranks that hold the same experts

    @property
    def total(self) -> int:
        return sum(self.shared) + sum(self.embedding) + sum(self.experts)


@dataclass(frozen=True, slots=True, kw_only=True)
class States:
    """Bytes of what one rank keeps of a model from step to step."""

    weights: int
    gradients: int = 0
    optimizer: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer


def layers_of_stages(num_layers: int, layout: Layout) -> list[int]:
    """Return the layers of every pipeline stage: even, or with a shorter last one."""
    even, left = divmod(num_layers, layout.pipeline)
    if not left:
        return [even] * layout.pipeline
    last = uneven_stages(num_layers, layout.pipeline)["num_layers_in_last_pipeline_stage"]
    return [(num_layers - last) // (layout.pipeline - 1)] * (layout.pipeline - 1) + [last]


def chunks_of_stage(a: Architecture, layout: Layout, stage: int) -> list[Chunk]:
    """List what a rank of ``stage`` holds, chunk by chunk."""
    layers = layers_of_stages(a.num_layers, layout)[stage] // layout.virtual_pipeline
    last_stage, last_chunk = layout.pipeline - 1, layout.virtual_pipeline - 1
    return [
        _chunk(
            a,
            layout,
            layers=layers,
            first=stage == 0 and number == 0,
            last=stage == last_stage and number == last_chunk,
        )
        for number in range(layout.virtual_pipeline)
    ]


def trained_chunks(a: Architecture, layout: Layout, stage: int, adapters: AdapterSpec | None) -> list[Chunk]:
    """List what a rank of ``stage`` trains, chunk by chunk: all it holds, or its adapters alone."""
    if adapters is None:
        return chunks_of_stage(a, layout, stage)
    layers = layers_of_stages(a.num_layers, layout)[stage] // layout.virtual_pipeline
    sizes, _ = adapter_sizes(a, layout, adapters)
    return [Chunk(shared=sizes * layers, embedding=(), experts=())] * layout.virtual_pipeline


def _chunk(a: Architecture, layout: Layout, *, layers: int, first: bool, last: bool) -> Chunk:
    vocabulary = padded_vocab_size(a.vocab_size, layout.tensor) // layout.tensor * a.hidden_size
    repeated = a.tied_embeddings and layout.pipeline > 1
    shared, experts = _layer(a, layout)
    own = shared * layers
    ends = []
    if first:
        ends.append(vocabulary)
    if last:
        own += (a.hidden_size,)  # the final norm
        if not a.tied_embeddings or not first:
            ends.append(vocabulary)
    return Chunk(
        shared=own if repeated else (*own, *ends),
        embedding=tuple(ends) if repeated else (),
        experts=experts * layers,
    )


def _layer(a: Architecture, layout: Layout) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return (parameters, experts held separately) of one layer on one rank. Without expert parallelism none are
    separate.
    """
    hidden, queries = a.hidden_size, a.num_heads * a.head_dim // layout.tensor
    rows = queries + 2 * a.num_kv_heads * a.head_dim // layout.tensor
    ffn = a.ffn_size // layout.tensor
    sizes = [hidden, rows * hidden, queries * hidden, hidden]
    sizes += [rows] * a.qkv_bias + [a.head_dim] * (2 * a.qk_norm)
    mlp = [2 * ffn * hidden, ffn * hidden]
    if not a.num_experts:
        return (*sizes, *mlp), ()
    experts = mlp * (a.num_experts // layout.expert)
    router = a.num_experts * hidden
    return ((*sizes, router), tuple(experts)) if layout.expert > 1 else ((*sizes, router, *experts), ())


def frozen_states(a: Architecture, layout: Layout, *, itemsize: int) -> States:
    """Return the states of a model for inference only, on the rank that holds most."""
    return States(weights=max(_elements(a, layout, stage) for stage in range(layout.pipeline)) * itemsize)


def trained_states(
    a: Architecture,
    layout: Layout,
    *,
    data_ranks: int,
    itemsize: int,
    moments: int = 2,
    distributed: bool = False,
    stage: int | None = None,
    adapters: AdapterSpec | None = None,
) -> States:
    """Return the states of a model that is trained, on a rank of ``stage``, or (None) of the stage that holds most.

    Args:
        data_ranks: data-parallel times context-parallel ranks, which reduce gradients together.
        itemsize: bytes of a weight; below 4 the optimizer keeps fp32 copies.
        moments: fp32 numbers that the optimizer keeps per parameter (Adam 2, SGD 0, with momentum 1).
        distributed: optimizer states cut over the data ranks. A rank's share is then an upper bound: what is padding
            in it needs no state.
        adapters: what alone is trained, where the model's own weights are frozen.
    """
    if stage is None:
        every = [
            trained_states(
                a,
                layout,
                data_ranks=data_ranks,
                itemsize=itemsize,
                moments=moments,
                distributed=distributed,
                stage=number,
                adapters=adapters,
            )
            for number in range(layout.pipeline)
        ]
        return max(every, key=lambda states: states.total)
    frozen = 0 if adapters is None else _elements(a, layout, stage) * itemsize
    chunks = trained_chunks(a, layout, stage, adapters)
    kept = 4 * (moments + (itemsize < 4))
    if not distributed:
        elements = sum(chunk.total for chunk in chunks)
        weights = frozen + elements * itemsize
        return States(weights=weights, gradients=elements * _GRADIENT_BYTES, optimizer=elements * kept)
    buffers = [bucket for chunk in chunks for bucket in padded_buckets(chunk, data_ranks, layout.expert)]
    padded, share = sum(size for size, _, _ in buffers), sum(size // ranks for size, ranks, _ in buffers)
    return States(weights=frozen + padded * itemsize, gradients=padded * _GRADIENT_BYTES, optimizer=share * kept)


def padded_buckets(chunk: Chunk, data_ranks: int, expert: int) -> list[tuple[int, int, bool]]:
    """List (elements, ranks it is cut over, whether of experts) of every bucket of the distributed optimizer."""
    buckets = [
        (chunk.shared, data_ranks, False),
        (chunk.embedding, data_ranks, False),
        (chunk.experts, data_ranks // expert, True),
    ]
    return [(_padded(sizes, ranks), ranks, experts) for sizes, ranks, experts in buckets if sizes]


def _padded(sizes: tuple[int, ...], ranks: int) -> int:
    aligned = sum(-(-size // _PARAMETER_ALIGNMENT) * _PARAMETER_ALIGNMENT for size in sizes)
    multiple = math.lcm(ranks, _BUCKET_ALIGNMENT)
    return -(-aligned // multiple) * multiple


def _elements(a: Architecture, layout: Layout, stage: int) -> int:
    return sum(chunk.total for chunk in chunks_of_stage(a, layout, stage))


def total_parameters(a: Architecture) -> int:
    """Count the parameters of the whole model, without padding of the vocabulary."""
    padding = padded_vocab_size(a.vocab_size, 1) - a.vocab_size
    return _elements(a, Layout(), 0) - padding * a.hidden_size * (1 if a.tied_embeddings else 2)
