"""Write the values of data files as the text they stand for: a number as it is, whatever holds it."""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

import numpy as np


def cell_text(value: Any) -> str:
    """Return the text of a value: of a number its decimal digits, ``0.00001`` and not ``1e-05``."""
    if isinstance(value, float) and math.isfinite(value):
        return format(Decimal(repr(value)), "f")
    if isinstance(value, Decimal) and value.is_finite():
        return format(value, "f")
    return str(value)


def plainly(value: Any) -> Any:
    """Return numbers as their text, anything else as it is: what a template shows of a value."""
    return cell_text(value) if isinstance(value, float | Decimal) else value


def is_missing(value: Any) -> bool:
    """Say whether a value is none: null, or the NaN that tables of numbers write for it."""
    return value is None or (isinstance(value, float | Decimal) and math.isnan(value))


def shortest_double(value: Any) -> float:
    """Return the double with the digits of a narrower float: 0.1 for the float32 next to 0.1."""
    return float(str(np.float32(value)))
