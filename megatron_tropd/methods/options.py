"""Options of a method: declared once on a frozen dataclass, checked against their rule, explained when wrong.

@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    k: int = option(64, integer(at_least=1), "size of the support")
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, TypeVar, get_type_hints

from megatron_tropd.errors import ConfigError
from megatron_tropd.losses.support import TAILS, Tail
from megatron_tropd.types import SupportKind

_Options = TypeVar("_Options")


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What values an option takes. ``read`` returns the value to use, or None when the value breaks the rule."""

    text: str  # completes "must be ..."
    read: Callable[[object], object]
    optional: bool = False  # null is a value of its own
    choices: tuple[str, ...] = ()  # for "did you mean"


# --------------------------------------------------------------------------- rules


def choice(*names: str) -> Rule:
    """One of the names."""
    text = f"one of {', '.join(names)}"
    return Rule(text=text, read=lambda value: value if value in names else None, choices=names)


def choices(*names: str) -> Rule:
    """One of the names, or a list of them; read as a tuple."""

    def read(value: object) -> object:
        items = (value,) if isinstance(value, str) else value
        if not isinstance(items, Sequence) or len(items) == 0 or any(item not in names for item in items):
            return None
        return tuple(items)

    return Rule(text=f"one of {', '.join(names)}, or a list of them", read=read, choices=names)


def integer(*, at_least: int, at_most: float = math.inf) -> Rule:
    """A whole number within bounds."""

    def read(value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, int):
            return None
        return value if at_least <= value <= at_most else None

    limit = f" and <= {at_most:g}" if math.isfinite(at_most) else ""
    return Rule(text=f"a whole number >= {at_least}{limit}", read=read)


def number(
    *,
    above: float = -math.inf,
    at_least: float = -math.inf,
    below: float = math.inf,
    at_most: float = math.inf,
    optional: bool = False,
) -> Rule:
    """A finite number within bounds; with ``optional`` null as well."""

    def read(value: object) -> object:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return None
        return float(value) if above < value < below and at_least <= value <= at_most else None

    bounds = {">": above, ">=": at_least, "<": below, "<=": at_most}
    limits = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds.items() if math.isfinite(bound))
    text = f"a number {limits}".rstrip() + (", or null" if optional else "")
    return Rule(text=text, read=read, optional=optional)


# --------------------------------------------------------------------------- options that several methods have

SupportSize = Annotated[int, integer(at_least=1), "tokens of the support"]
Support = Annotated[
    SupportKind,
    choice("teacher", "student", "union", "teacher_and_sampled"),
    "whose top k tokens a top-k term looks at",
]
TailKind = Annotated[Tail, choice(*TAILS), "what a top-k term does with the mass outside its support"]
PpoClip = Annotated[
    float | None,
    number(above=0.0, below=1.0, optional=True),
    "PPO clip range of the policy gradient, for rollouts used more than once",
]

# --------------------------------------------------------------------------- reading


def option_names(options: type) -> tuple[str, ...]:
    """Names of all options of an options dataclass."""
    return tuple(f.name for f in fields(options))


def parse(options: type[_Options], values: Mapping[str, object], *, method: str) -> _Options:
    """An instance of ``options`` from plain values.

    Raises:
        ConfigError: a value breaks its rule.
    """
    hints = get_type_hints(options, include_extras=True)
    read = {}
    for name in option_names(options):
        if name in values:
            rule, meaning = hints[name].__metadata__
            read[name] = _read(name, values[name], rule, meaning, method)
    return options(**read)


def _read(name: str, value: object, rule: Rule, meaning: str, method: str) -> object:
    if value is None and rule.optional:
        return None
    result = rule.read(value)
    if result is None:
        hint = suggestion(value, rule.choices) if isinstance(value, str) else ""
        raise ConfigError(f"method '{method}': option {name}={value!r} must be {rule.text} ({meaning}).{hint}")
    return result


def refuse_unknown(given: Iterable[str], valid: Sequence[str], *, method: str) -> None:
    """Raises ConfigError naming the first option that the method does not have, the nearest one, and all valid ones."""
    for name in given:
        if name not in valid:
            raise ConfigError(
                f"method '{method}' has no option '{name}'.{suggestion(name, valid)} "
                f"Its options are: {', '.join(sorted(valid))}."
            )


def suggestion(name: str, valid: Sequence[str]) -> str:
    """`` Did you mean 'x'?`` with the nearest valid name, or the empty string."""
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f" Did you mean '{near[0]}'?" if near else ""
