"""On-policy distillation of large language models on Megatron-Core.

``Config``, ``train``, ``evaluate``, ``Callbacks``, ``build_method`` and ``linear_logprobs`` come from here; each brings
in what it needs when it is first used. ``train`` and ``evaluate`` are the rooms of these names, which can be called.
"""

__version__ = "0.1.0"

import importlib as _importlib
import os as _os
import sys as _sys
import warnings as _warnings
from types import ModuleType as _ModuleType

# torch would build every object that a pickle names, whatever its caller says
if _os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None) is not None:
    _warnings.warn(
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is unset: with it a checkpoint's files could run code here.", stacklevel=2
    )

# the module that a name comes from, which is imported when the name is first used
_HOMES = {
    "Callbacks": "megatron_tropd.train.callbacks",
    "Config": "megatron_tropd.config.python",
    "TrainingResult": "megatron_tropd.commands.api",
    "build_method": "megatron_tropd.methods",
    "evaluate": "megatron_tropd.commands.api",
    "linear_logprobs": "megatron_tropd.losses.vocab_parallel",
    "train": "megatron_tropd.commands.api",
}
_ROOMS = ("evaluate", "train")  # are rooms, too
__all__ = [*_HOMES, "__version__"]


class _CalledRoom(_ModuleType):
    """A room that shares its name with a function: a call of the one calls the other."""

    def __call__(self, *arguments: object, **options: object) -> object:
        name = self.__name__.rpartition(".")[2]
        return getattr(_importlib.import_module(_HOMES[name]), name)(*arguments, **options)


class _Package(_ModuleType):
    """The package, in which the import system leaves every room when it is first imported."""

    def __setattr__(self, name: str, value: object) -> None:
        if name in _ROOMS and type(value) is _ModuleType:
            value.__class__ = _CalledRoom
        super().__setattr__(name, value)


_sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name in _ROOMS:
        return _importlib.import_module(f"{__name__}.{name}")
    return getattr(_importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
