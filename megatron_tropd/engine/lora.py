"""Low-rank adapters (LoRA, arXiv 2106.09685) as modules inside Megatron's tensor-parallel linears.

Tensor ranks cut an adapter as they cut the matrix beside it. Of a linear cut by its rows (``linear_qkv``,
``linear_fc1``), B is cut and every rank has all of A; of one cut by its columns (``linear_proj``, ``linear_fc2``), A is
cut and every rank has all of B. What crosses ranks is ``A x``, of ``rank`` numbers per token. Under sequence
parallelism the matrix that all ranks have sees the tokens of one rank alone, so its gradient is a part of the whole:
Megatron adds these up at the end of backward for weights that are marked ``sequence_parallel``, as it does for norms.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from torch import Tensor

from megatron_tropd.engine.dropout import kept, key_of
from megatron_tropd.models.adapters import AdaptedLinear, AdaptedPart
from megatron_tropd.parallel.collectives import (
    Group,
    copy_to_region,
    gather_sequence,
    group_rank,
    group_size,
    reduce_from_region,
    scatter_sequence,
)
from megatron_tropd.types import AdapterSpec

# what a merged weight is computed in, before it is rounded once
_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


@dataclass(slots=True)
class Adapters:
    """The adapters of a model, and whether they take part in its passes: without them it is the frozen base."""

    spec: AdapterSpec
    seed: int  # of what is dropped
    on: bool = True
    update: int | None = None  # the one whose gradients are taken; None: nothing is dropped
    histories: Mapping[int, Tensor] = field(default_factory=dict)  # [r] of passes under way, by id of the plan

    @contextmanager
    def used(self, histories: Mapping[int, Tensor], *, on: bool) -> Iterator[None]:
        """Switch them on or off for the passes within the block. ``histories``: what their inputs are dropped by."""
        before, self.on, self.histories = self.on, on, histories
        try:
            yield
        finally:
            self.on, self.histories = before, {}

    @contextmanager
    def dropping(self, update: int) -> Iterator[None]:
        """Drop inputs, in passes within the block that have a backward."""
        self.update = update
        try:
            yield
        finally:
            self.update = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearPlace:
    """Where a linear stands: the group that cuts it, whether sequences are cut too, and its groups of heads here."""

    group: Group
    sequence: bool
    head_groups: int  # of this rank


class LowRankUpdate(torch.nn.Module):
    """``scale * B (A x)`` for each adapted matrix of a linear, in the order of the linear's output.

    Parameters ``TARGET_A`` ``[rank, in]`` and ``TARGET_B`` ``[out, rank]`` are this rank's part of those of `peft`.
    """

    def __init__(self, linear: AdaptedLinear, adapters: Adapters, place: LinearPlace, like: Tensor) -> None:
        """Make room for the matrices, not filled. ``like``: a tensor of their dtype and device."""
        super().__init__()
        self.linear, self.spec, self.place, self._adapters = linear, adapters.spec, place, adapters
        self._history: Tensor | None = None  # [r] of the pass under way, where inputs are dropped
        ranks = group_size(place.group)
        for part in linear.adapted:
            rows, columns = part.shape
            inputs, outputs = (columns // ranks, rows) if linear.by_input else (columns, rows // ranks)
            for name, shape in (("A", (self.spec.rank, inputs)), ("B", (outputs, self.spec.rank))):
                parameter = torch.nn.Parameter(torch.empty(shape, dtype=like.dtype, device=like.device))
                self.register_parameter(f"{part.target}_{name}", parameter)
                self._mark(parameter, self.cut_axis(name))

    def _mark(self, parameter: torch.nn.Parameter, axis: int | None) -> None:
        """Say how tensor ranks share a matrix: its gradient's norm is counted, and its parts are added up, by that."""
        set_tensor_model_parallel_attributes(parameter, axis is not None, -1 if axis is None else axis, 1)
        parameter.sequence_parallel = axis is None and self.place.sequence  # type: ignore[attr-defined]

    def cut_axis(self, name: str) -> int | None:
        """Return the axis along which tensor ranks cut a matrix, A or B; None where all have the whole."""
        if self.linear.by_input:
            return 1 if name == "A" else None
        return 0 if name == "B" else None

    def matrix(self, part: AdaptedPart, name: str) -> torch.nn.Parameter:
        """Return this rank's part of a matrix, A or B."""
        parameter: torch.nn.Parameter = getattr(self, f"{part.target}_{name}")
        return parameter

    def span(self, part: AdaptedPart, name: str) -> tuple[slice, slice]:
        """Return the rows and columns of the whole matrix that this rank has."""
        spans, axis = [slice(None), slice(None)], self.cut_axis(name)
        if axis is not None:
            share = self.matrix(part, name).shape[axis]
            first = group_rank(self.place.group) * share
            spans[axis] = slice(first, first + share)
        return spans[0], spans[1]

    def forward(self, x: Tensor, output: Tensor) -> Tensor:
        """Add the update to ``output``: ``[s, b, in]`` and ``[s, b, out]``, cut as the linear's own are."""
        if not self._adapters.on:
            return output
        group, sequence = self.place.group, self.place.sequence
        h = self._down(x)  # [s, b, rank of each]
        if self.linear.by_input:
            h = scatter_sequence(h, group) if sequence else reduce_from_region(h, group)
        else:
            h = gather_sequence(h, group) if sequence else copy_to_region(h, group)
        return output + self.spec.scale * self._up(h)

    def note_plan(self, plan: Any) -> None:
        """Take note of the pass that is under way in this layer, or that it is recomputed for."""
        self._history = self._adapters.histories.get(id(plan))

    def _down(self, x: Tensor) -> Tensor:
        """Multiply by every A. Each has a mask of its own, as in `peft`."""
        down: list[Tensor] = [self.matrix(part, "A") for part in self.linear.adapted]
        if self._history is None:
            return F.linear(x, down[0] if len(down) == 1 else torch.cat(down))
        masked = [x * self._mask(part, x) for part in self.linear.adapted]
        return torch.cat([F.linear(own, matrix) for own, matrix in zip(masked, down, strict=True)], dim=-1)

    def _mask(self, part: AdaptedPart, x: Tensor) -> Tensor:
        """Return ``[s, 1, in]``, 0 where a number is dropped and 1 / (1 - dropout) elsewhere."""
        assert self._history is not None
        rank, ranks = group_rank(self.place.group), group_size(self.place.group)
        history, share = self._history, self.spec.dropout
        first = rank * x.shape[-1] if self.linear.by_input else 0
        if self.place.sequence and not self.linear.by_input:
            history = history.chunk(ranks)[rank]
        key = key_of(self._adapters.seed, self._adapters.update, part.module)
        mask = kept(history, key, range(first, first + x.shape[-1]), share)
        return mask[:, None].to(x.dtype) / (1 - share)

    def _up(self, h: Tensor) -> Tensor:
        """Multiply by every B and put the results where the linear has the rows of its matrices."""
        adapted = self.linear.adapted
        updates = {
            part.module: F.linear(low, self.matrix(part, "B"))
            for part, low in zip(adapted, h.split(self.spec.rank, dim=-1), strict=True)
        }
        if len(self.linear.parts) == 1:
            return updates[adapted[0].module]
        by_group = []
        for part, rows in zip(self.linear.parts, self._rows_per_group(), strict=True):
            update = updates.get(part.module)
            shape = (*h.shape[:-1], self._groups, rows)
            by_group.append(h.new_zeros(shape) if update is None else update.view(shape))
        return torch.cat(by_group, dim=-1).flatten(-2)

    @property
    def _groups(self) -> int:
        return self.place.head_groups if self.linear.per_head_group else 1

    def _rows_per_group(self) -> list[int]:
        """Return how many rows of each part follow one another in this rank's weight."""
        ranks = 1 if self.linear.by_input else group_size(self.place.group)
        return [part.shape[0] // ranks // self._groups for part in self.linear.parts]

    @torch.no_grad()
    def merged(self, weight: Tensor, rows: slice) -> Tensor:
        """Return ``rows`` of this rank's ``weight`` with the update added, in the weight's dtype.

        Products and sums are taken in the next wider type (fp64 for fp32) and rounded once.
        """
        wider = _WIDER.get(weight.dtype, weight.dtype)
        first, last, _ = rows.indices(len(weight))
        total = weight[first:last].to(wider, copy=True)
        for part, at in zip(self.linear.parts, self._rows_of_parts(weight.device), strict=True):
            if not part.adapted:
                continue
            mine = (at >= first) & (at < last)
            up, down = self.matrix(part, "B")[mine].to(wider), self.matrix(part, "A").to(wider)
            total.index_add_(0, at[mine] - first, self.spec.scale * (up @ down))
        return total.to(weight.dtype)

    def _rows_of_parts(self, device: torch.device) -> Sequence[Tensor]:
        """Return, for each part, the rows of this rank's weight at which its own stand, in order."""
        sizes = self._rows_per_group()
        numbers = torch.arange(self._groups * sum(sizes), device=device).view(self._groups, -1)
        return [rows.reshape(-1) for rows in numbers.split(sizes, dim=1)]
