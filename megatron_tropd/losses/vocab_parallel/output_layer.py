"""Put the fused losses in the place of a ``GPTModel``'s output layer, in whosever trainer.

The layer keeps its parameter, and with it its name in checkpoints, its place in DDP's buckets and its share in tied
embeddings. Only its product is left out: the model then answers with hidden states, which ``enter_vocabulary`` brings
to every rank of the vocabulary, and which the ``linear_*`` losses multiply with ``output_weight``, tile by tile.

Who sums which gradient: that of the hidden states is a partial sum per vocabulary shard, which ``enter_vocabulary``
adds up (an all-reduce, or under sequence parallelism a reduce-scatter); that of the weight is complete for the shard; a
tied weight also has the embedding's, which autograd adds on one stage and Megatron's ``finalize_model_grads`` between
two.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_tropd.errors import ConfigError
from megatron_tropd.parallel.collectives import Group, copy_to_region, gather_sequence


def hand_on_hidden_states(model: Any) -> None:
    """Let a ``GPTModel`` answer with its final (normed) hidden states ``[b, s, D]`` where it is called without labels.

    Args:
        model: of megatron-core, not wrapped in DDP yet. On stages without an output layer nothing changes.

    Raises:
        ConfigError: it has a head of multi-token prediction, which would have no logits.
    """
    if not getattr(model, "post_process", True):
        return
    if getattr(model, "mtp_process", False):
        raise ConfigError("the model has multi-token prediction, whose heads need logits. Build it without.")
    model.output_layer.forward = _hidden_states


def _hidden_states(hidden: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    return hidden, None


def output_weight(model: Any) -> Tensor:
    """Return ``[v, D]``: this rank's rows of the output weight, the embedding's where the two are tied."""
    model = unwrapped(model)
    tied = model.share_embeddings_and_output_weights
    own: Tensor = model.shared_embedding_or_output_weight() if tied else model.output_layer.weight
    return own


def unwrapped(model: Any) -> Any:
    """Return the model within DDP and Float16Module."""
    while hasattr(model, "module"):
        model = model.module
    return model


def enter_vocabulary(hidden_bsD: Tensor, group: Group, *, sequence_parallel: bool = False) -> Tensor:
    """Return the hidden states ``[s * b, D]`` of every rank of ``group``, in Megatron's order: position by position.

    Its backward adds up what the ranks' vocabulary shards say. Labels and masks ``[b, s]`` are put in the same order by
    ``x.transpose(0, 1).reshape(-1)``.

    Args:
        hidden_bsD: as the model hands them on; with ``sequence_parallel`` this rank's share of the positions.
    """
    rows = hidden_bsD.transpose(0, 1).contiguous()
    whole: Tensor = gather_sequence(rows, group) if sequence_parallel else copy_to_region(rows, group)
    return torch.flatten(whole, 0, 1)
