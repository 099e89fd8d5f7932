"""Lines and cells for the terminal, as they are: no markup, no emoji codes, and no control characters."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from megatron_tropd.errors import printable


def literal(content: object) -> Text:
    """Return what stands for itself in a line or a table of rich: ``[lr=0.1]`` is no style, ``:x:`` no picture."""
    return Text(printable(str(content)))


def say(content: object, *, console: Console | None = None) -> None:
    """Print one line, which may be long, on standard output or the given console."""
    (console or Console()).print(literal(content), soft_wrap=True)
