"""One table says what a teacher's scores are; the wire, the finite check and the sizes follow it."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest
import torch
from torch import Tensor

from megatron_tropd.errors import EngineError
from megatron_tropd.teacher import schema
from megatron_tropd.teacher.schema import SCORE_FIELDS, Field, TeacherRequest, check_finite, lacking
from megatron_tropd.teacher.wire import HiddenKind, blank_wire, from_wire, to_wire
from megatron_tropd.types import TeacherOutputs

ALL = TeacherRequest(
    top_k=3, queries=2, entropy_bound=True, hidden_states=True, base=True, tail_mass=True, end_ids=(9, 4)
)
N, E = 5, 7


@dataclass(frozen=True, slots=True, kw_only=True)
class WithToy(TeacherOutputs):
    toy_NK: Tensor | None = None


TOY = Field(name="toy", width="top_k", kind="nats", means="toys", wanted=lambda request: request.top_k)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Field:
    """A quantity that nothing but the table and the class knows."""
    monkeypatch.setattr(schema, "SCORE_FIELDS", (*SCORE_FIELDS, TOY))
    monkeypatch.setattr(schema, "Outputs", WithToy)
    return TOY


def outputs(kind: type[TeacherOutputs] = TeacherOutputs, **changes: Tensor) -> TeacherOutputs:
    generator = torch.Generator().manual_seed(0)

    def draw(*columns: int) -> Tensor:
        return -torch.rand(N, *columns, generator=generator)

    values = {
        "logprob_N": draw(),
        "topk_ids_NK": torch.randint(2**31 - 1, (N, 3), generator=generator),
        "topk_logprob_NK": draw(3),
        "query_logprob_NJ": draw(2),
        "logtail_N": draw().masked_fill(torch.arange(N) == 1, -torch.inf),
        "entropy_N": -draw(),
        "entropy_bound_N": -draw(),
        "hidden_NE": draw(E).bfloat16(),
        "end_logprob_NX": draw(2),
    }
    return kind(**(values | changes))


def assert_equal(found: TeacherOutputs, expected: TeacherOutputs) -> None:
    assert type(found) is type(expected)
    for field in fields(expected):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        assert (a is None) == (b is None), field.name
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b)), field.name


def test_every_attribute_of_the_outputs_has_its_row_and_every_row_its_attribute():
    assert [field.attribute for field in SCORE_FIELDS] == [field.name for field in fields(TeacherOutputs)]


def test_what_travels_arrives_as_it_was():
    wire = to_wire(outputs(), ALL)
    # log-prob, 3 and 2 candidates, tail, entropy and its bound, 2 ends; 3 ids; hidden states
    assert [(part.dtype, part.shape[1]) for part in wire] == [
        (torch.float32, 1 + 3 + 2 + 3 + 2),
        (torch.int32, 3),
        (torch.bfloat16, E),
    ]
    blank = blank_wire(N, ALL, HiddenKind(E, torch.bfloat16), torch.device("cpu"))
    assert [(part.dtype, part.shape) for part in blank] == [(part.dtype, part.shape) for part in wire]
    assert_equal(from_wire(wire, ALL), outputs())
    least = TeacherRequest(entropy=False)
    (only,) = to_wire(outputs(), least)
    assert only.shape == (N, 1) and torch.equal(from_wire([only], least).logprob_N, outputs().logprob_N)


def test_bytes_of_a_row_are_those_of_its_wire_and_of_the_base_model_s_log_prob():
    found = sum(part[0].numel() * part.element_size() for part in to_wire(outputs(), ALL))
    assert found == 4 * (11 + 3) + 2 * E
    assert ALL.bytes_per_row(hidden_bytes=2 * E) == found + 4 * (1 + 2) and ALL.query_bytes_per_row == 4 * 2
    assert TeacherRequest(entropy=False).bytes_per_row(hidden_bytes=99) == 4


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", [f.attribute for f in SCORE_FIELDS if not f.is_id])
def test_a_value_that_is_not_finite_is_stopped_whichever_it_is(name: str, bad: float):
    value = getattr(outputs(), name)
    value = torch.zeros(N) if value is None else value.clone()
    value.view(-1)[3] = bad
    if name == "logtail_N" and bad == -torch.inf:
        check_finite(outputs(logtail_N=value))  # nothing lies outside what is listed
        return
    with pytest.raises(EngineError, match=f"base model gave a {name.rsplit('_', 1)[0]} that is not finite"):
        check_finite(outputs(**{name: value}), role="base model")


def test_a_log_prob_above_0_is_stopped_where_rounding_is_not():
    check_finite(outputs(logprob_N=torch.full((N,), 5e-4)))
    with pytest.raises(EngineError, match=r"the teacher gave a logprob that is above 0 \(0\.002\)"):
        check_finite(outputs(logprob_N=torch.full((N,), 2e-3)))
    check_finite(outputs(entropy_N=torch.full((N,), 3.0)))


def test_a_new_field_travels_and_is_checked_without_further_edits(toy: Field):
    given = outputs(WithToy, toy_NK=torch.arange(15.0).view(N, 3))
    assert_equal(from_wire(to_wire(given, ALL), ALL), given)
    assert ALL.bytes_per_row(hidden_bytes=0) == 4 * (1 + 11 + 3 + 2 + 3)
    with pytest.raises(EngineError, match="the teacher gave a toy that is not finite"):
        check_finite(outputs(WithToy, toy_NK=torch.full((N, 3), torch.nan)))
    every = {field.name: 3 for field in SCORE_FIELDS}
    assert lacking(every, ALL) == ["toys (it has 0)"] and lacking(every | {"toy": 3}, ALL) == []


def test_what_is_lacking_is_named_with_what_there_is():
    assert lacking({}, TeacherRequest(top_k=3, tail_mass=True, entropy_needed=True, base=True, queries=2)) == [
        "log-probs",
        "the 3 likeliest tokens (it has 0)",
        "the teacher's scores of the student's 2 likeliest tokens (it has 0)",
        "tail masses",
        "entropies",
        "log-probs of a base model",
    ]
    found = {"logprob": 1, "topk_ids": 3, "topk_logprob": 3}
    assert lacking(found, TeacherRequest(top_k=4)) == ["the 4 likeliest tokens (it has 3)"]
    assert lacking(found, TeacherRequest(top_k=2, hidden_states=True)) == ["hidden states"]
    assert lacking(found, TeacherRequest(top_k=2), optional=True) == ["entropies"]
