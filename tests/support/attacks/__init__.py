"""Attacks on the program that can be repeated: each is tried for real and says in a line what became of it.

A module of this package is a kind, and lists its rows as ``ATTACKS``. ``tools/attack.py`` prints them as tables; the
quick ones are tests (``tests/system/test_attacks.py``).
"""

from __future__ import annotations

import importlib
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

KINDS = ("sandbox", "server", "model", "rows", "flips", "kills", "paths")


class Hole(AssertionError):
    """The reason why an attack got through."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attack:
    """One attack. ``attempt`` is given an empty directory, says what became of it, and raises where it got through."""

    name: str
    attempt: Callable[[Path], str]
    quick: bool = True  # also a test of the suite


@dataclass(frozen=True, slots=True)
class Attempt:
    """The end of an attack."""

    name: str
    held: bool
    said: str
    seconds: float


def attacks_of(kind: str, *, quick: bool = False) -> list[Attack]:
    """Return the attacks of a kind; with ``quick`` those that are tests."""
    found: Sequence[Attack] = importlib.import_module(f"tests.support.attacks.{kind}").ATTACKS
    return [attack for attack in found if attack.quick or not quick]


def attempt(attack: Attack) -> Attempt:
    """Try an attack; anything raised is a hole, a traceback where a sentence belongs as well."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tropd-attack-") as directory:
        try:
            held, said = True, attack.attempt(Path(directory))
        except Exception as error:
            held, said = False, f"{type(error).__name__}: {error}"
    return Attempt(attack.name, held, " ".join(said.split()), time.monotonic() - began)


def table(kind: str, attempts: Iterable[Attempt]) -> str:
    """Write the attempts of a kind as a Markdown table."""
    rows = []
    for one in attempts:
        end = "held" if one.held else "**got through**"
        rows.append(f"| {one.name} | {end} | {one.said.replace('|', '/')} | {one.seconds:.1f} |")
    return "\n".join([f"### {kind}", "", "| attack | | what became of it | s |", "|---|---|---|---|", *rows, ""])
