"""Bytes that grow with the tokens of a pack: what backward needs of a layer, and every tensor with a row per token.

The counts of a layer are those of its operations as this package builds them; a test watches what autograd keeps.
"""

from __future__ import annotations

from typing import Any

from megatron_tropd.config.sections import Layout
from megatron_tropd.planning.parameters import layers_of_stages
from megatron_tropd.teacher.protocol import TeacherRequest
from megatron_tropd.types import Architecture

_FP32 = 4


def layer_bytes(
    a: Architecture, layout: Layout, *, itemsize: int, recompute: str = "none", keys_per_row: float = 1.0
) -> float:
    """Return the bytes of one layer, per row that a rank holds. Attention is taken to keep its inputs, its output
    and a sum; ``keys_per_row``: what it gathers along the paths of sequences that begin alike.
    """
    if recompute == "full":
        return a.hidden_size / _token_ranks(layout) * itemsize
    t, query, key = layout.tensor, a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    # both norms' inputs and outputs, and the sums that follow; positions are turned into angles in every layer
    values = 6 * a.hidden_size / _token_ranks(layout) + 4 * a.head_dim
    values += (3 * query + 3 * key) / t + a.qk_norm * (2 * query + key) / t
    numbers = 2.0 + a.num_heads / t * (recompute == "none") + a.qk_norm * (a.num_heads + a.num_kv_heads) / t
    if a.num_experts:
        chosen = a.experts_per_token
        # tokens that meet their experts are cut as the experts are; each brings its rows with it
        values += chosen * (a.hidden_size + 6 * a.ffn_size / t)
        numbers += (6 * chosen + a.num_experts + 3) / _token_ranks(layout)
    else:
        values += 5 * a.ffn_size / t
    if recompute == "none":
        # sequences of a pack are attended to in groups of similar length; keys of other ranks are gathered and put in
        # order besides
        values += (2 * query + key + 2 * key * (keys_per_row - 1)) / t
        values += (key + 2 * layout.context * 2 * key) / t * (layout.context > 1)
    return values * itemsize + numbers * _FP32


def _token_ranks(layout: Layout) -> int:
    return layout.tensor if layout.sequence else 1


def pack_bytes(
    a: Architecture,
    layout: Layout,
    tokens: int,
    *,
    stage: int,
    itemsize: int,
    recompute: str = "none",
    keys_per_row: float = 1.0,
) -> float:
    """Return the bytes that a rank of ``stage`` keeps from forward to backward of one pack of so many rows, the
    loss aside.
    """
    held = tokens / layout.context
    layers = layers_of_stages(a.num_layers, layout)[stage]
    kept = layers * layer_bytes(a, layout, itemsize=itemsize, recompute=recompute, keys_per_row=keys_per_row)
    if stage == layout.pipeline - 1:
        kept += 2 * a.hidden_size / _token_ranks(layout) * itemsize
    return held * kept


def packs_in_flight(layout: Layout, stage: int) -> float:
    """Return the packs whose activations a stage holds at once, in packs through all of its layers."""
    if layout.virtual_pipeline == 1:
        return layout.pipeline - stage
    chunks = (layout.pipeline - stage - 1) * 2 + (layout.virtual_pipeline - 1) * layout.pipeline + 1
    return chunks / layout.virtual_pipeline


def activation_bytes(
    a: Architecture, layout: Layout, tokens: int, *, itemsize: int, recompute: str, keys_per_row: float = 1.0
) -> float:
    """Return the most that any stage keeps at once, of all its packs in flight."""
    options: dict[str, Any] = {"itemsize": itemsize, "keys_per_row": keys_per_row}
    most = max(
        pack_bytes(a, layout, tokens, stage=stage, recompute=recompute, **options) * packs_in_flight(layout, stage)
        for stage in range(layout.pipeline)
    )
    if recompute == "full":  # the layer whose backward runs is there whole
        most += layer_bytes(a, layout, **options) * tokens / layout.context
    return most


def per_token_bytes(
    student: Architecture, teacher: Architecture, layout: Layout, spec: TeacherRequest, *, itemsize: int, recompute: str
) -> dict[str, float]:
    """List every tensor with a row per token: bytes of one row on a rank of the last stage."""
    candidates = 1 + (spec.top_k + spec.queries)
    rows = {
        # ids, targets, positions: int64; region; gate's uniform, sampler's log-prob and weight: fp32; sequence: int64
        "pack: ids, targets, positions, regions": 3 * 8 + 1 + 8.0,
        "batch: uniforms, sampled log-probs, weights": 3.0 * _FP32,
        "activations of one layer": layer_bytes(student, layout, itemsize=itemsize, recompute=recompute),
        "final hidden states": float(student.hidden_size * itemsize),
        "loss: log-probs and ids of candidates": candidates * (_FP32 + 8.0),
        "loss: softmax statistics": 6.0 * _FP32,
        "loss: gradient of hidden states": float(student.hidden_size * (_FP32 + (itemsize if itemsize < _FP32 else 0))),
        "scores of the teacher": float(spec.bytes_per_row(hidden_bytes=teacher.hidden_size * itemsize)),
    }
    return rows
