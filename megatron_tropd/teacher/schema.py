"""The one table of what a teacher says of a prediction; requests, the wire, checks, recordings and messages follow it.

To have teachers say something more, add a row to ``SCORE_FIELDS`` and an attribute to ``types.TeacherOutputs``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_tropd.errors import EngineError
from megatron_tropd.types import Needs, TeacherOutputs

Kind = Literal["logprob", "log_mass", "nats", "id", "hidden"]
Author = Literal["teacher", "student", "base model"]

_BYTES_PER_VALUE = 4  # fp32 or int32 on the wire; hidden states are of the teacher's dtype
_AXES = {"top_k": "K", "queries": "J", "hidden_size": "E", "ends": "X"}
# rounding may lift the log-prob of a certain token above 0
_ABOVE_ZERO = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRequest:
    """The quantities requested of the teacher for each valid prediction, besides the log-prob of the target."""

    top_k: int = 0
    queries: int = 0  # ids that the caller names, for their log-probs
    entropy: bool = True
    entropy_needed: bool = False  # exactly, and not for a metric alone
    entropy_bound: bool = False  # an upper bound of it, from the top k, where the teacher does not know it exactly
    hidden_states: bool = False
    base: bool = False  # also a base model's log-prob of the target
    tail_mass: bool = False  # also the mass outside the top k, the query ids, the target and end_ids
    end_ids: tuple[int, ...] = ()  # the same ids at every prediction, for their log-probs

    @property
    def has_tail(self) -> bool:
        """Say whether there are tails in the outputs."""
        return self.tail_mass and self.top_k + self.queries > 0

    def bytes_per_row(self, *, hidden_bytes: int) -> int:
        """Count the bytes of one prediction on their way to the student; ``hidden_bytes``: of one hidden state."""
        fields = [field for field in SCORE_FIELDS if field.author != "student"]
        return sum(
            field.columns(self) * (hidden_bytes if field.width == "hidden_size" else _BYTES_PER_VALUE)
            for field in fields
        )

    @property
    def query_bytes_per_row(self) -> int:
        """Count the bytes of the ids of one prediction on their way to the teacher."""
        return _BYTES_PER_VALUE * sum(field.columns(self) for field in SCORE_FIELDS if field.author == "student")

    @staticmethod
    def of(needs: Needs) -> TeacherRequest:
        """Request what a method with these needs looks at."""
        return TeacherRequest(
            top_k=needs.top_k if needs.support != "student" else 0,
            queries=needs.top_k if needs.support in ("student", "union") else 0,
            entropy_needed=needs.teacher_entropy,
            hidden_states=needs.hidden_states,
            base=needs.base_model,
            tail_mass=needs.tail_mass,
            end_ids=needs.end_ids,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One quantity with a row per prediction."""

    name: str  # of a recording's column, and of vLLM's answers
    width: Literal[1, "top_k", "queries", "hidden_size", "ends"] = 1
    kind: Kind
    means: str  # in messages; {n}: how many were requested
    wanted: Callable[[TeacherRequest], bool | int]  # for a width that a request does not name
    author: Author = "teacher"  # who says it
    optional: Callable[[TeacherRequest], bool] = lambda request: False  # requested, and yet a method works without

    @property
    def attribute(self) -> str:
        """Return its name in ``TeacherOutputs``, which ends in its dimensions."""
        return f"{self.name}_N{_AXES.get(str(self.width), '')}"

    @property
    def is_id(self) -> bool:
        """Say whether its values are token ids: int64 in ``TeacherOutputs``, int32 on the wire."""
        return self.kind == "id"

    def columns(self, request: TeacherRequest) -> int:
        """Count its requested columns; of hidden states, whose size is the teacher's, 1 stands for all."""
        return int(self.wanted(request))

    def label(self, request: TeacherRequest, found: int = 0) -> str:
        """Name what is requested, and how much less there is."""
        of_many = self.width in ("top_k", "queries")
        return self.means.format(n=self.columns(request)) + (f" (it has {found})" if of_many else "")


SCORE_FIELDS: tuple[Field, ...] = (
    Field(name="logprob", kind="logprob", means="log-probs", wanted=lambda request: True),
    Field(name="topk_ids", width="top_k", kind="id", means="the {n} likeliest tokens", wanted=lambda r: r.top_k),
    Field(
        name="topk_logprob",
        width="top_k",
        kind="logprob",
        means="log-probs of the {n} likeliest tokens",
        wanted=lambda r: r.top_k,
    ),
    Field(
        name="query_ids",
        width="queries",
        kind="id",
        means="the teacher's scores of the student's {n} likeliest tokens",
        wanted=lambda r: r.queries,
        author="student",
    ),
    Field(
        name="query_logprob",
        width="queries",
        kind="logprob",
        means="log-probs of the student's {n} likeliest tokens",
        wanted=lambda r: r.queries,
    ),
    Field(name="logtail", kind="log_mass", means="tail masses", wanted=lambda r: r.has_tail),
    Field(
        name="entropy",
        kind="nats",
        means="entropies",
        wanted=lambda r: r.entropy,
        optional=lambda r: not r.entropy_needed,
    ),
    Field(
        name="entropy_bound",
        kind="nats",
        means="bounds on the entropies",
        wanted=lambda r: r.entropy_bound,
        optional=lambda r: True,
    ),
    Field(
        name="base_logprob",
        kind="logprob",
        means="log-probs of a base model",
        wanted=lambda r: r.base,
        author="base model",
    ),
    Field(
        name="end_logprob",
        width="ends",
        kind="logprob",
        means="log-probs of the {n} ids that end a response",
        wanted=lambda r: len(r.end_ids),
    ),
    Field(
        name="base_end_logprob",
        width="ends",
        kind="logprob",
        means="log-probs of the {n} ids that end a response, of a base model",
        wanted=lambda r: len(r.end_ids) * r.base,
        author="base model",
    ),
    Field(name="hidden", width="hidden_size", kind="hidden", means="hidden states", wanted=lambda r: r.hidden_states),
)
Outputs = TeacherOutputs  # the class with an attribute per field


def requested(request: TeacherRequest, *authors: Author) -> list[Field]:
    """List the fields that a request has, of these authors or of all, in the table's order."""
    return [f for f in SCORE_FIELDS if f.columns(request) and (not authors or f.author in authors)]


def present(outputs: TeacherOutputs) -> Iterator[tuple[Field, Tensor]]:
    """Iterate over the fields that outputs hold."""
    for field in SCORE_FIELDS:
        value = getattr(outputs, field.attribute)
        if value is not None:
            yield field, value


def outputs_of(values: Mapping[str, Tensor]) -> TeacherOutputs:
    """Build outputs from values by the fields' names."""
    fields: dict[str, Any] = {field.attribute: values[field.name] for field in SCORE_FIELDS if field.name in values}
    return Outputs(**fields)


def mapped(outputs: TeacherOutputs, change: Callable[[Tensor], Tensor]) -> TeacherOutputs:
    """Apply a change, such as a choice of rows, to every field that is there."""
    return outputs_of({field.name: change(value) for field, value in present(outputs)})


def lacking(columns: Mapping[str, int], request: TeacherRequest, *, optional: bool = False) -> list[str]:
    """Name what is requested and not there, by the number of columns of every field that is.

    ``optional``: what a method can do without counts, too.
    """
    short = {
        field.name: field
        for field in requested(request)
        if columns.get(field.name, 0) < field.columns(request) and (optional or not field.optional(request))
    }
    # ids and their log-probs are one thing to lack
    for name in [name for name in short if name.replace("_logprob", "_ids") in short and name.endswith("_logprob")]:
        del short[name]
    return [field.label(request, columns.get(name, 0)) for name, field in short.items()]


def check_finite(outputs: TeacherOutputs, *, role: str = "teacher") -> None:
    """Stop a bad number at the teacher's door, before it can hide behind a mask.

    Raises:
        EngineError: a value is not finite, or a log-prob is positive beyond rounding.
    """
    for field, value in present(outputs):
        if field.is_id:
            continue
        # an empty tail is -inf
        checked = value.masked_fill(value == -torch.inf, 0.0) if field.kind == "log_mass" else value
        if not bool(torch.isfinite(checked).all()):
            problem = "not finite"
        elif field.kind in ("logprob", "log_mass") and checked.numel() and float(checked.max()) > _ABOVE_ZERO:
            problem = f"above 0 ({float(checked.max()):.3g})"
        else:
            continue
        raise EngineError(
            f"the {role} gave a {field.name} that is {problem}. Its weights or dtype are broken: "
            "try dtype=fp32, or check the checkpoint with `tropd check`."
        )
