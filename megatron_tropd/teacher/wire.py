"""The teacher's scores of the rows of a pack as few tensors, for the way from its ranks to the student's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tropd.teacher.schema import Field, TeacherRequest, outputs_of, requested
from megatron_tropd.teacher.transfer import Wire
from megatron_tropd.types import TeacherOutputs


@dataclass(frozen=True, slots=True)
class HiddenKind:
    """Size and type of the hidden states of a teacher."""

    size: int
    dtype: torch.dtype


def to_wire(outputs: TeacherOutputs, request: TeacherRequest) -> Wire:
    """Join all values as fp32, all ids as int32; hidden states stay as they are."""
    wire = []
    for fields in _tensors(request):
        values = [getattr(outputs, field.attribute) for field in fields]
        joined = torch.cat([value if value.dim() == 2 else value[:, None] for value in values], dim=1)
        wire.append(joined if fields[0].width == "hidden_size" else joined.to(_dtype(fields[0])))
    return wire


def from_wire(wire: Wire, request: TeacherRequest) -> TeacherOutputs:
    """Split what ``to_wire`` has joined."""
    values: dict[str, Tensor] = {}
    for tensor, fields in zip(wire, _tensors(request), strict=True):
        if fields[0].width == "hidden_size":
            values[fields[0].name] = tensor
            continue
        parts = tensor.split([field.columns(request) for field in fields], dim=1)
        for field, part in zip(fields, parts, strict=True):
            value = part.long() if field.is_id else part
            values[field.name] = value[:, 0] if field.width == 1 else value
    return outputs_of(values)


def blank_wire(rows: int, request: TeacherRequest, hidden: HiddenKind | None, device: torch.device) -> Wire:
    """Allocate what so many rows of a wire are received into."""
    wire = []
    for fields in _tensors(request):
        if fields[0].width == "hidden_size":
            assert hidden is not None  # setup/validate.py sees to it
            wire.append(torch.empty(rows, hidden.size, dtype=hidden.dtype, device=device))
        else:
            columns = sum(field.columns(request) for field in fields)
            wire.append(torch.empty(rows, columns, dtype=_dtype(fields[0]), device=device))
    return wire


def _tensors(request: TeacherRequest) -> list[list[Field]]:
    """Group the teacher's fields by the tensor that they travel in."""
    fields = requested(request, "teacher")
    states = [field for field in fields if field.width == "hidden_size"]
    values = [field for field in fields if not field.is_id and field not in states]
    ids = [field for field in fields if field.is_id]
    return [group for group in (values, ids, *([field] for field in states)) if group]


def _dtype(field: Field) -> torch.dtype:
    return torch.int32 if field.is_id else torch.float32
