"""Walking the tree of config models: what a dotted key is, and the table of all keys. Part of the config room."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_tropd.config.run import RunConfig
from megatron_tropd.config.sections import AUTO, is_chosen

Loc = tuple[int | str, ...]
Model = type[BaseModel]


def dotted(loc: Loc) -> str:
    """Write ``("evaluate", "suites", 0, "name")`` as ``evaluate.suites[0].name``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).removeprefix(".")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceRow:
    """One key of the config, for the generated reference. ``default`` is empty when the key is required."""

    key: str
    type: str
    default: str
    meaning: str


def reference_rows(model: Model, prefix: str = "") -> Iterator[ReferenceRow]:
    """List every leaf key, in the order of the tree. Items of a list are shown as ``key[i].name``."""
    for name, field in model.model_fields.items():
        section = _model_of(field.annotation)
        is_list = typing.get_origin(field.annotation) is tuple
        if section is not None and is_chosen(field):
            meaning = field.description or ""
            yield ReferenceRow(key=prefix + name, type="`auto` or keys", default=json.dumps(AUTO), meaning=meaning)
        if section is None or is_list:
            yield ReferenceRow(
                key=prefix + name, type=_type_name(field), default=_default(field), meaning=field.description or ""
            )
        if section is not None:
            yield from reference_rows(section, f"{prefix}{name}{'[i]' if is_list else ''}.")


def config_reference() -> str:
    """Describe every key with type, default and meaning, as a Markdown table."""
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for row in reference_rows(RunConfig):
        cells = (f"`{row.key}`", row.type, f"`{row.default}`" if row.default else "required", row.meaning)
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows) + "\n"


class _Target(NamedTuple):
    field: FieldInfo | None
    section: Model | None


def _target(model: Model, loc: Loc) -> _Target:
    """Return the field and, where it is one, the section that ``loc`` points to."""
    field, section = None, model
    for part in loc:
        if isinstance(part, int):
            continue
        field = section.model_fields.get(part) if section else None
        section = _model_of(field.annotation) if field else None  # type: ignore[assignment]
    return _Target(field, section)


def section_at(model: Model, loc: Loc) -> Model | None:
    return _target(model, loc).section


def required_keys(section: Model | None) -> list[str]:
    return [name for name, field in section.model_fields.items() if field.is_required()] if section else []


def describe(model: Model, loc: Loc) -> str:
    field, section = _target(model, loc)
    description = (field.description if field else None) or (section.__doc__ if section else None) or ""
    return description.splitlines()[0] if description else "it has no default."


def choices_at(model: Model, loc: Loc) -> list[str]:
    field = _target(model, loc).field
    return _choices(field.annotation) if field else []


def _choices(annotation: Any) -> list[str]:
    """Return the choices of a literal, or of the literals of a union such as ``Literal[...] | None``."""
    if typing.get_origin(annotation) is Literal:
        return [str(choice) for choice in typing.get_args(annotation)]
    return [choice for inner in typing.get_args(annotation) for choice in _choices(inner)]


def _model_of(annotation: Any) -> Model | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in typing.get_args(annotation) if (found := _model_of(inner))), None)


_TYPE_NAMES = {int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path"}


def _type_name(field: FieldInfo) -> str:
    name, null, _ = _annotation_name(field.annotation).partition(" | null")
    return " ".join(filter(None, [name, _bounds(field)])) + null + " | `auto`" * is_chosen(field)


def _annotation_name(annotation: Any) -> str:
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " | ".join(f"`{choice}`" for choice in inner)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(_annotation_name(item) for item in inner)
    if origin is typing.Annotated:
        return _annotation_name(inner[0])
    if annotation is type(None):
        return "null"
    if origin is dict:
        return "mapping"
    return "list" if origin is tuple else _TYPE_NAMES[annotation]


def _bounds(field: FieldInfo) -> str:
    signs = (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<"))
    found = [f"{sign} {getattr(m, name)}" for m in field.metadata for name, sign in signs if hasattr(m, name)]
    return ", ".join(found)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    if is_chosen(field):
        return json.dumps(AUTO)
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, tuple):
        value = [item.model_dump(exclude_defaults=True) if isinstance(item, BaseModel) else item for item in value]
    return json.dumps(value)
