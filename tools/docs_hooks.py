"""What ``mkdocs build`` does to a page: links to files beside ``docs/``, which a site does not have, become paths."""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]+)\]\(\.\./([^)\s]+)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Write ``[words](../path)`` as the words and the path."""
    return _OUTSIDE.sub(_as_path, markdown)


def _as_path(link: re.Match[str]) -> str:
    words, path = link[1], f"`{link[2]}`"
    return path if words.strip("`") == link[2] else f"{words} ({path})"
