"""What every run of the suite repeats of a table, and what ``make test-long`` repeats besides.

A table of layouts, families or objectives is proved whole when it is written, and by ``make test-long``. In between, a
few rows suffice that meet every mechanism once: the others combine what those have apart.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

T = TypeVar("T")

LONG = os.environ.get("MEGATRON_TROPD_TEST_LONG") == "1"


def few(rows: Iterable[T], *names: str, name: Callable[[T], Any] = lambda row: getattr(row, "name", row)) -> list[T]:
    """The rows of these names, in their order; all rows in a long run.

    Args:
        rows: the whole table.
        names: of the rows that every run repeats.
        name: what a row is called.

    Raises:
        ValueError: no row has one of the names: what was renamed would no longer be run.
    """
    every = list(rows)
    missing = sorted(set(names) - {name(row) for row in every})
    if missing:
        raise ValueError(f"no row is called {', '.join(missing)}")
    return every if LONG else [row for row in every if name(row) in names]
