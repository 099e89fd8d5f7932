"""Keep torch's compiler out of processes that compile nothing: importing it takes a second of every start."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

# what Megatron-Core imports where it is installed, and is not asked to use: its metrics go nowhere
_UNUSED = ("torch.utils.tensorboard", "wandb")


def import_megatron() -> None:
    """Import Megatron-Core, whose fused functions are then compiled when they are first called.

    Its decorator is ``torch.compile``, which imports the compiler for a function that is only defined.
    """
    kept, hidden = torch.compile, [name for name in _UNUSED if name not in sys.modules]
    torch.compile = compiled_at_first_call  # type: ignore[assignment]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type] # importing them is an ImportError
    try:
        import megatron.core  # noqa: F401 # its modules bind the decorator that they find
    finally:
        torch.compile = kept
        for name in hidden:
            del sys.modules[name]


def compiled_at_first_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return what calls ``torch.compile(function)``, made at the first call."""
    compiled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        if not compiled:
            compiled.append(torch.compile(function))
        return compiled[0](*args, **options)

    return call


@contextlib.contextmanager
def building_optimizers() -> Iterator[None]:
    """Let optimizers of torch be made within without the compiler, which is imported to be told to leave them alone.

    What keeps it away from a function is looked up on the function, under a private name, and made where it is not
    found: here the function itself stands for it meanwhile. Nothing is compiled while an optimizer is made.
    """
    function: Any = torch.optim.Optimizer.add_param_group
    plain = function.__wrapped__
    if hasattr(plain, "__dynamo_disable"):
        yield
        return
    plain.__dynamo_disable = plain
    try:
        yield
    finally:
        del plain.__dynamo_disable
