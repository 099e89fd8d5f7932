"""Transfers between the ranks of a layout in a step: every transfer with its bytes, by arithmetic.

The tests train tiny models under gloo, count what is really handed to ``torch.distributed``, and compare. Left out are
single numbers and small tables: norms, shapes, counts of tokens per expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from megatron_tropd.config.sections import Layout
from megatron_tropd.engine.adapters import adapter_sizes
from megatron_tropd.planning.parameters import layers_of_stages, padded_buckets, trained_chunks
from megatron_tropd.types import AdapterSpec, Architecture

_FP32 = 4
_STATISTICS = 3  # floats per token and rank that make a softmax whole
_KL, _MIXTURE = 7, 6  # the same of a divergence between two; a mixture sums two more


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTransfer:
    """One kind of message or collective that a rank takes part in."""

    axis: str  # whose ranks: tensor, context, pipeline, expert, data, expert_data, ends (of the pipeline)
    operation: str  # all_reduce, all_gather, reduce_scatter, all_to_all, send
    size: int  # bytes of the whole: the sum, what a gather makes, what a scatter, an exchange or a message is given
    what: str

    def sent(self, ranks: int) -> float:
        """Return the bytes that leave a rank, by the algorithms that send least."""
        if self.operation == "send":
            return float(self.size)
        return self.size * (ranks - 1) / ranks * (2 if self.operation == "all_reduce" else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """One pack, as the ranks of one context coordinate work on it."""

    tokens: int  # that each holds, padding included
    valid: int  # predictions of them that carry loss


def splits_tokens(layout: Layout) -> bool:
    """Say whether tensor ranks share out the tokens between the matrices."""
    return layout.sequence and layout.tensor > 1


def _in_and_out(layout: Layout, size: int, what: str) -> list[RankTransfer]:
    """List the transfers of the forward through a pair of matrices that are cut over the tensor ranks, ``size``
    bytes in and out.
    """
    if layout.tensor == 1:
        return []
    operations = ("all_gather", "reduce_scatter") if splits_tokens(layout) else ("all_reduce",)
    return [RankTransfer(axis="tensor", operation=operation, size=size, what=what) for operation in operations]


def _backward(transfers: Iterable[RankTransfer]) -> list[RankTransfer]:
    """Reverse the transfers: a gather's gradient is scattered, a scatter's gathered; a sum out becomes a sum in."""
    turned = {"all_gather": "reduce_scatter", "reduce_scatter": "all_gather"}
    return [replace(t, operation=turned.get(t.operation, t.operation)) for t in transfers]


def _keys(a: Architecture, layout: Layout, tokens: int, itemsize: int) -> list[RankTransfer]:
    """List the transfers of keys and values, whole for every context rank."""
    if layout.context == 1:
        return []
    size = tokens * layout.context * 2 * (a.num_kv_heads // layout.tensor) * a.head_dim * itemsize
    return [RankTransfer(axis="context", operation="all_gather", size=size, what="keys and values")]


def _experts(a: Architecture, layout: Layout, tokens: int, itemsize: int) -> list[RankTransfer]:
    """List the transfers to the experts and back; ranks get unequal numbers of tokens, and this is their mean."""
    rows = tokens // (layout.tensor if splits_tokens(layout) else 1) * a.experts_per_token
    vectors, weights = rows * a.hidden_size * itemsize, rows * itemsize
    found = []
    if layout.expert > 1:
        found += [("expert", "all_to_all", size) for size in (vectors, weights, vectors)]
    if layout.tensor > 1:
        # an expert is cut over the tensor ranks, which bring different tokens
        found += [("tensor", "all_gather", size * layout.tensor) for size in (vectors, weights)]
        found.append(("tensor", "reduce_scatter", vectors * layout.tensor))
    return [RankTransfer(axis=axis, operation=operation, size=size, what="experts") for axis, operation, size in found]


def _layer(a: Architecture, layout: Layout, tokens: int, itemsize: int) -> list[RankTransfer]:
    """List the transfers of one layer's forward for one pack."""
    size = tokens * a.hidden_size * itemsize
    attention = _in_and_out(layout, size, "layers") + _keys(a, layout, tokens, itemsize)
    mlp = _experts(a, layout, tokens, itemsize) if a.num_experts else _in_and_out(layout, size, "layers")
    return attention + mlp


def _layer_backward(a: Architecture, layout: Layout, tokens: int, itemsize: int, recompute: str) -> list[RankTransfer]:
    forward = _layer(a, layout, tokens, itemsize)
    again = {
        "none": [],
        "selective": _keys(a, layout, tokens, itemsize),
        "full": forward,
    }[recompute]
    if splits_tokens(layout):
        # what entered a matrix was released but for this rank's share, and its weight's gradient wants all of it
        whole = RankTransfer(
            axis="tensor", operation="all_gather", size=tokens * a.hidden_size * itemsize, what="layers"
        )
        again = [*again, *[whole] * (1 if a.num_experts else 2)]
    return _backward(forward) + again


def _ends(
    a: Architecture, layout: Layout, load: Load, itemsize: int, *, stage: int, backward: bool
) -> list[RankTransfer]:
    """List the transfers of the embedding on the first stage, and of the hidden states that the last hands to the
    loss.
    """
    if layout.tensor == 1:
        return []
    row, split, found = a.hidden_size * itemsize, splits_tokens(layout), []
    if stage == 0 and (split or not backward):
        operation = {(True, False): "reduce_scatter", (True, True): "all_gather"}.get((split, backward), "all_reduce")
        found.append(RankTransfer(axis="tensor", operation=operation, size=load.tokens * row, what="embedding"))
    if stage == layout.pipeline - 1 and (split or backward):
        operation = {(True, False): "all_gather", (True, True): "reduce_scatter"}.get((split, backward), "all_reduce")
        rows = load.tokens if split else load.valid
        found.append(RankTransfer(axis="tensor", operation=operation, size=rows * row, what="hidden states"))
    return found


def _stages(
    a: Architecture, layout: Layout, load: Load, itemsize: int, *, stage: int, backward: bool
) -> list[RankTransfer]:
    """List the transfers of activations to the next stage, or their gradients to the one before, of every chunk of
    this one.
    """
    last = layout.pipeline - 1
    exempt = stage == (0 if backward else last)  # the model ends there, with one of its chunks
    size = load.tokens * a.hidden_size * itemsize // (layout.tensor if splits_tokens(layout) else 1)
    sends = (layout.virtual_pipeline - exempt) * (layout.pipeline > 1)
    return [RankTransfer(axis="pipeline", operation="send", size=size, what="stages")] * sends


def forward_transfers(
    a: Architecture, layout: Layout, loads: Sequence[Load], *, stage: int, itemsize: int
) -> list[RankTransfer]:
    """List the transfers of packs that are only scored; those of the loss are separate."""
    layers = layers_of_stages(a.num_layers, layout)[stage]
    found = []
    for load in loads:
        found += _layer(a, layout, load.tokens, itemsize) * layers
        found += _ends(a, layout, load, itemsize, stage=stage, backward=False)
        found += _stages(a, layout, load, itemsize, stage=stage, backward=False)
    return found


def backward_transfers(
    a: Architecture, layout: Layout, loads: Sequence[Load], *, stage: int, itemsize: int, recompute: str = "none"
) -> list[RankTransfer]:
    """List the transfers of the packs' gradients down to the inputs of the stage."""
    layers = layers_of_stages(a.num_layers, layout)[stage]
    found = []
    for load in loads:
        found += _layer_backward(a, layout, load.tokens, itemsize, recompute) * layers
        found += _ends(a, layout, load, itemsize, stage=stage, backward=True)
        found += _stages(a, layout, load, itemsize, stage=stage, backward=True)
    return found


def loss_transfers(layout: Layout, *, valid: int, candidates: int, divergence: str = "") -> list[RankTransfer]:
    """List the transfers of the loss over the vocabulary, on the last stage, forward; backward has none.

    Args:
        candidates: ids whose log-probs are taken, the sampled token among them.
        divergence: "kl" or "jsd" where there is one over all ids besides.
    """
    if layout.tensor == 1:
        return []
    gathered = _STATISTICS + {"": 0, "kl": _KL, "jsd": _MIXTURE}[divergence]
    summed = candidates + 2 * (divergence == "jsd")
    sizes = {"all_gather": gathered * layout.tensor, "all_reduce": summed}
    return [
        RankTransfer(axis="tensor", operation=operation, size=_FP32 * floats * valid, what="loss")
        for operation, floats in sizes.items()
    ]


def scoring_transfers(layout: Layout, *, valid: int, top_k: int, queries: int) -> list[RankTransfer]:
    """List the transfers of a model that reports its ``top_k`` likeliest ids, and log-probs of the token and of
    ``queries`` ids.
    """
    if layout.tensor == 1:
        return []
    if not top_k:
        return loss_transfers(layout, valid=valid, candidates=1 + queries)
    width = 8 * (top_k + -(-(_STATISTICS + 1 + queries) // 2))  # floats travel two to an id
    return [RankTransfer(axis="tensor", operation="all_gather", size=width * valid * layout.tensor, what="loss")]


def gradient_transfers(
    a: Architecture,
    layout: Layout,
    *,
    stage: int,
    data_ranks: int,
    itemsize: int,
    distributed: bool,
    adapters: AdapterSpec | None = None,
) -> list[RankTransfer]:
    """List the transfers of an update: gradients of ranks that hold the same weights and, where states are cut, the
    new weights. ``adapters``: what alone is trained.
    """
    chunks = trained_chunks(a, layout, stage, adapters)
    found = []
    for axis, ranks, sizes in (
        ("data", data_ranks, [[*c.shared, *c.embedding] for c in chunks]),
        ("expert_data", data_ranks // layout.expert, [c.experts for c in chunks]),
    ):
        elements = sum(map(sum, sizes))
        if ranks > 1 and elements and not distributed:
            found.append((axis, "all_reduce", elements * _FP32))
    # each of the two optimizers that Megatron-Core makes where experts are separate gathers the weights of both
    gathers = 2 if layout.expert > 1 else 1
    if distributed:
        for size, ranks, experts in [b for c in chunks for b in padded_buckets(c, data_ranks, layout.expert)]:
            axis = "expert_data" if experts else "data"
            if ranks > 1:
                found += [(axis, "reduce_scatter", size * _FP32), *[(axis, "all_gather", size * itemsize)] * gathers]
    if adapters is None and a.tied_embeddings and layout.pipeline > 1 and stage in (0, layout.pipeline - 1):
        found.append(("ends", "all_reduce", sum(sum(c.embedding) for c in chunks) * _FP32))
    norms = _partial_sums(a, layout, stage, adapters) * (layout.tensor > 1)
    if norms:
        found.append(("tensor", "all_reduce", norms * _FP32))
    return [
        RankTransfer(axis=axis, operation=operation, size=size, what="gradients")
        for axis, operation, size in found
        if size
    ]


def _partial_sums(a: Architecture, layout: Layout, stage: int, adapters: AdapterSpec | None) -> int:
    """Count the elements that tensor ranks hold alike but see other tokens or heads of: of norms, or of adapters."""
    layers, last = layers_of_stages(a.num_layers, layout)[stage], stage == layout.pipeline - 1
    if adapters is not None:
        return layers * adapter_sizes(a, layout, adapters)[1]
    heads = 2 * a.head_dim * a.qk_norm
    if not splits_tokens(layout):
        return layers * heads
    return layers * (heads + 2 * a.hidden_size + a.num_experts * a.hidden_size) + a.hidden_size * last
