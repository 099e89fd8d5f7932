"""torchrun's plugin: when it launches ``megatron_tropd``, it ends like ``tropd launch``, without a traceback.

torchrun loads it by the entry point ``torchrun.handlers`` in every launch of this environment, whatever that is of. So
it stands outside of the package, which does things when it is imported, and does nothing in launches of other programs.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

_LAUNCHERS = ("torch.distributed.run", "torch.distributed.launch")


def handler() -> Any:
    """Return what torchrun registers as a rendezvous, which is none; have errors of our launches end quietly."""
    if launches_us(sys.orig_argv):
        from megatron_tropd.parallel.torchrun import be_quiet

        be_quiet()
        sys.excepthook = _end
    return _no_rendezvous


def launches_us(words: Sequence[str]) -> bool:
    """Say whether a command line is torchrun's own and starts this program on its ranks."""
    pairs = list(pairwise(words))
    place = next((n for n, (_, word) in enumerate(pairs) if word in _LAUNCHERS or Path(word).name == "torchrun"), None)
    if place is None:
        return False
    module = any(before in ("-m", "--module") and word == "megatron_tropd" for before, word in pairs[place + 1 :])
    return module or ("--no-python" in words[place:] and any(Path(word).name == "tropd" for word in words[place:]))


def _end(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    from megatron_tropd.parallel.torchrun import status_of

    status = status_of(error)
    if status is None:
        sys.__excepthook__(kind, error, trace)
    else:
        raise SystemExit(status)  # which Python takes for its own, also from here


def _no_rendezvous(parameters: Any) -> NoReturn:
    raise ValueError("megatron_tropd is no rendezvous: give --rdzv-backend=c10d.")
