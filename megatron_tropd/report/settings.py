"""Settings of a run as text."""

from __future__ import annotations

from typing import Any


def flat(tree: Any, start: str = "") -> dict[str, str]:
    """Write a tree of settings as text by dotted key."""
    if not isinstance(tree, dict) or not tree:
        return {start: "null" if tree is None else str(tree)} if start else {}
    return {
        key: value for name, part in tree.items() for key, value in flat(part, f"{start}.{name}".lstrip(".")).items()
    }
