"""Reading YAML and turning pydantic's, OmegaConf's and the parser's complaints into messages a user can act on.

Part of the config room; besides it only the options of methods, which are sections too, are explained here. Every
message names the full dotted key, the value seen, the rule, and where the key was written (line of the file, or the
override).
"""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import ValidationError

from megatron_tropd.config.megatron_flags import answer_to
from megatron_tropd.config.reference import (
    Loc,
    Model,
    choices_at,
    describe,
    dotted,
    reference_rows,
    required_keys,
    section_at,
)
from megatron_tropd.errors import ConfigError

# --------------------------------------------------------------------------- reading


def read_tree(
    path: Path | None, overrides: Sequence[str], named: Mapping[str, Named] = MappingProxyType({})
) -> tuple[dict[str, Any], str]:
    """Return the file, overrides applied and interpolations resolved, as plain data, and the file's text.

    ``path``: None is an empty file. ``named``: by key, what options of the command line say.
    """
    text = "" if path is None else _read_text(path)
    path = path or Path(NO_FILE)
    config = _parse(text, path)
    for override in overrides:
        _apply(config, override)
    for key, one in named.items():
        at = where(_parts(key), text, overrides).removesuffix(": ")
        _enter(config, key, one, f"{path}, {at}" if at.startswith("line") else at)
    try:
        tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{path}: {error.full_key} is '???', which means that you must set it.") from None
    except OmegaConfBaseException as error:
        if unset := re.search(r"Environment variable '(\w+)' not found", str(error)):
            raise ConfigError(
                f"{path}: {error.full_key} needs the environment variable {unset[1]}, which is not set. Set it first: "
                f"`export {unset[1]}=...`, or give {error.full_key} on the command line."
            ) from None
        raise ConfigError(
            f"{path}: {error.full_key}: {_first_line(error)}. "
            "An interpolation ${...} sees only keys that are written in the file or an override."
        ) from None
    return typing.cast("dict[str, Any]", _string_keys(tree)), text


NO_FILE = "command line"


class Named(NamedTuple):
    """The value that an option of the command line gives a key."""

    option: str  # such as --student
    value: str | list[str]


def _parts(key: str) -> Loc:
    return tuple(key.split("."))


def _enter(config: DictConfig, key: str, one: Named, place: str) -> None:
    """Set a key to what an option says. ConfigError when the file, or an override, says something else."""
    there = OmegaConf.to_container(config, resolve=False)
    for part in _parts(key):
        there = there.get(str(part)) if isinstance(there, dict) else None
    if there not in (None, "???") and _as_paths(there) != _as_paths(one.value):
        raise ConfigError(
            f"{one.option} says {_listed(one.value)}, and {place} says {key} = {_listed(there)}. Leave one of them out."
        )
    OmegaConf.update(config, key, one.value)


def _as_paths(value: object) -> list[Path]:
    return [Path(str(item)).expanduser().absolute() for item in (value if isinstance(value, list) else [value])]


def _listed(value: object) -> str:
    return ", ".join(map(str, value if isinstance(value, list) else [value]))


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"there is no config file {path} ({path.absolute()}). Check the path.") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a directory ({path.absolute()}). Give the YAML file itself.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the config file {path}: {error}. It must be a UTF-8 text file.") from None


def _parse(text: str, path: Path) -> DictConfig:
    try:
        # the parser on its own first: OmegaConf takes a bare word for a key without a value
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None and not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}: the file must hold `key: value` lines, got {_node_kind(root)}.")
        config = OmegaConf.create(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}{_mark(error)}: not valid YAML: {_yaml_problem(error)}.") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error.full_key}: {_first_line(error)}. Check the ${{...}} in it.") from None
    return typing.cast(DictConfig, config)


def _apply(config: DictConfig, override: str) -> None:
    key, equals, _ = override.partition("=")
    if key.startswith("--") and (answer := answer_to(key)) is not None:
        raise ConfigError(f"override {override!r} is not key=value. {answer}")
    if not equals or not all(key.strip().split(".")):
        raise ConfigError(f"override {override!r} is not key=value. Write for example train.steps=10.")
    try:
        config.merge_with_dotlist([override])
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, IndexError, TypeError) as error:
        problem = _yaml_problem(error) if isinstance(error, yaml.YAMLError) else _first_line(error)
        raise ConfigError(f"override {override!r} cannot be applied: {problem}.") from None


def _string_keys(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {str(key): _string_keys(value) for key, value in tree.items()}
    return [_string_keys(item) for item in tree] if isinstance(tree, list) else tree


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _mark(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""


def _yaml_problem(error: yaml.YAMLError) -> str:
    return str(getattr(error, "problem", None) or _first_line(error)).rstrip(".")


def _node_kind(node: yaml.Node) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else f"only {node.value!r}"


# --------------------------------------------------------------------------- explaining


def explain(
    error: ValidationError,
    model: Model,
    *,
    source: str,
    text: str = "",
    overrides: Sequence[str] = (),
    whole: str = "the config",
    below: Loc = (),
) -> str:
    """Write one line per problem: where it was written, the dotted key, the value, the rule, the nearest valid choice.

    ``whole``: what the model is called. ``below``: the key of the file that holds it.
    """
    items: list[dict[str, Any]] = [dict(item) for item in error.errors()]
    lines = [
        where((*below, *item["loc"]), text, overrides, unknown=item["type"] == "extra_forbidden")
        + _problem(item, model, whole)
        for item in items
    ]
    if len(lines) == 1:
        return f"{source}: {lines[0]}"
    return f"{source}: {len(lines)} problems\n" + "\n".join(f"  - {line}" for line in lines)


def _problem(item: dict[str, Any], model: Model, whole: str) -> str:
    loc: Loc = item["loc"]
    key, kind, value = dotted(loc), item["type"], item["input"]
    if kind == "extra_forbidden":
        return f"{key} is not a key. {_nearest_key(model, loc, whole)}"
    if kind == "missing":
        needed = [dotted((*loc, name)) for name in required_keys(section_at(model, loc))] or [key]
        return f"{' and '.join(needed)} must be set: {describe(model, loc)}"
    if kind == "value_error" and (not loc or section_at(model, loc) is not None):
        return f"{key}: {item['ctx']['error']}" if loc else str(item["ctx"]["error"])
    return f"{key} = {_show(value)}: {_rule(item, model, loc)}"


_RULES = {
    "model_type": "is a section, not a value",
    "model_attributes_type": "is a section, not a value",
    "int": "must be a whole number",
    "float": "must be a number",
    "finite_number": "must be a finite number",
    "bool": "must be true or false",
    "string_type": "must be text; put it in quotes if it looks like something else",
    "string_too_short": "must not be empty",
    "path": "must be a path, as text",
    "tuple_type": "must be a list",
    "too_short": "must not be empty",
    "dict_type": "must be a mapping of keys",
}


def _rule(item: dict[str, Any], model: Model, loc: Loc) -> str:
    kind, value = item["type"], item["input"]
    if kind == "value_error":
        return f"{item['ctx']['error']}."
    if kind == "literal_error":
        choices = choices_at(model, loc)
        near = difflib.get_close_matches(str(value), choices, n=1)
        return f"must be one of {', '.join(choices)}." + (f" Did you mean {near[0]}?" if near else "")
    rule = next((text for prefix, text in _RULES.items() if kind.startswith(prefix)), None)
    rule = rule or item["msg"].replace("Input should be", "must be").replace("greater than or equal to", "at least")
    rule = rule.replace("less than or equal to", "at most")
    if kind.startswith("model_") and (section := section_at(model, loc)):
        rule += f"; set keys of it, such as {dotted((*loc, next(iter(section.model_fields))))}"
    return f"{rule}."


def _nearest_key(model: Model, loc: Loc, whole: str) -> str:
    parent, name = loc[:-1], str(loc[-1])
    elsewhere = [row.key for row in reference_rows(model) if row.key.rsplit(".", 1)[-1] == name]
    if not elsewhere and (answer := answer_to(name)) is not None:
        return answer
    section = section_at(model, parent)
    valid = list(section.model_fields) if section else []
    near = difflib.get_close_matches(name, valid, n=1) or [key for key in valid if key.startswith(name)]
    if near:
        return f"Did you mean {dotted((*parent, near[0]))}?"
    if elsewhere:
        return f"Did you mean {' or '.join(elsewhere[:3])}?"
    return f"Valid keys of {dotted(parent) or whole}: {', '.join(valid)}."


def where(loc: Loc, text: str, overrides: Sequence[str], *, unknown: bool = False) -> str:
    """Return ``line N: `` or ``override '...': ``, wherever a key was written; the empty string for a default."""
    key = dotted(loc)
    for override in reversed(overrides):
        written = override.partition("=")[0].strip()
        inside = key.startswith((f"{written}.", f"{written}[")) or (unknown and written.startswith(f"{key}."))
        if key and (key == written or inside):
            return f"override {override!r}: "
    line = _line_of(text, loc)
    return f"line {line}: " if line else ""


def _line_of(text: str, loc: Loc) -> int | None:
    """Return the 1-based line of the key at ``loc``; None when the file does not hold it (a default, an override)."""
    node, line = yaml.compose(text, Loader=yaml.SafeLoader), None
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == str(part)), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            found = (node.value[part], node.value[part])
        else:
            found = None
        if found is None:
            return None
        line, node = found[0].start_mark.line + 1, found[1]
    return line


def _show(value: object) -> str:
    if value is None:
        return "null"
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
