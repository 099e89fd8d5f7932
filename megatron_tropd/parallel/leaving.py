"""Leave a process at once, but not without tidying up: hooks that run before ``os._exit`` and at ordinary exits."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable
from typing import NoReturn

_hooks: list[Callable[[], None]] = []


def on_leave(hook: Callable[[], None]) -> None:
    """Run ``hook`` once when this process leaves, whichever way it does that by itself."""
    if not _hooks:
        atexit.register(_run_hooks)
    _hooks.append(hook)


def forget(hook: Callable[[], None]) -> None:
    """Drop a hook, if it is still to be run."""
    if hook in _hooks:
        _hooks.remove(hook)


def leave(status: int) -> NoReturn:
    """End this process without waiting for threads or other ranks."""
    _run_hooks()
    os._exit(status)


def _run_hooks() -> None:
    while _hooks:
        _hooks.pop()()
