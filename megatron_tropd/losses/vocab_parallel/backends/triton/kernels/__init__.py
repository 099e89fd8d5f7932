"""Triton kernels for the tiles of the vocabulary-parallel losses, and the switch that says whether they are used.

Each module holds the kernels of one hot loop and names their plain twins in ``losses``; the matrix products stay with
the vendor's library. Importing this package imports neither Triton nor a kernel: callers ask ``serve`` first and import
the kernel they need where they need it.

``MEGATRON_TROPD_KERNELS``
    auto       (default) for CUDA tensors, where Triton is installed; it comes with the CUDA builds of torch
    off        never: the plain twins run everywhere
    interpret  for all tensors, by Triton's interpreter: slow, for tests on machines without a GPU
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from typing import Literal, get_args

import torch

from megatron_tropd.errors import ConfigError

SWITCH = "MEGATRON_TROPD_KERNELS"
MOST_IDS = 4096  # a row's picked entries are held in registers while the row is overwritten
MOST_K = 1024  # so is its list of candidates when it is cut down
Mode = Literal["auto", "off", "interpret"]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ENTRY = "megatron_tropd.losses.vocab_parallel.backends.triton.kernels._rows"


def serve(device: torch.device, dtype: torch.dtype, *, ids: int = 0, k: int = 0) -> bool:
    """Say whether kernels do the work on tiles of this kind, for so many picked ids and candidates per token.

    Raises:
        ConfigError: the switch holds something else, or requests an interpreter that cannot be had.
    """
    chosen = mode()
    if chosen == "off" or dtype not in _DTYPES or ids > MOST_IDS or k > MOST_K:
        return False
    if chosen == "interpret":
        use_interpreter()
        return True
    return device.type == "cuda" and installed()


def mode() -> Mode:
    """Read the switch."""
    value = os.environ.get(SWITCH, "auto")
    if value not in get_args(Mode):
        raise ConfigError(f"{SWITCH}={value!r} is unknown. Set it to one of {', '.join(get_args(Mode))}, or unset it.")
    return value  # type: ignore[return-value]


def installed() -> bool:
    """Say whether Triton can be imported."""
    return "triton" in sys.modules or importlib.util.find_spec("triton") is not None


def use_interpreter() -> None:
    """Import Triton and the kernels in interpreted form; the first such import in a process decides for all of it.

    Raises:
        ConfigError: Triton is missing, or was imported as a compiler before.
    """
    if _ENTRY not in sys.modules:
        if not installed():
            raise ConfigError(f"{SWITCH}=interpret needs Triton: pip install triton, or choose auto or off.")
        _import_interpreted()
    if not _is_interpreted():
        raise ConfigError(
            f"{SWITCH}=interpret came too late: Triton has been imported as a compiler in this process. "
            "Set it in the environment before the program starts."
        )


def _import_interpreted() -> None:
    # Triton reads the variable whenever it decorates a function, its own library's included. Processes started from
    # here are not to inherit it, so after the import the same is said to this process alone.
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        for name in ("_rows", "statistics", "gradient", "topk", "divergence"):
            importlib.import_module(f"megatron_tropd.losses.vocab_parallel.backends.triton.kernels.{name}")
        vars(importlib.import_module("triton.knobs").runtime)["interpret"] = True
    finally:
        if before is None:
            del os.environ["TRITON_INTERPRET"]
        else:
            os.environ["TRITON_INTERPRET"] = before


def _is_interpreted() -> bool:
    library, rows = sys.modules["triton.language.standard"], sys.modules[_ENTRY]
    return all(type(function).__name__ == "InterpretedFunction" for function in (library.sum, rows.merge))


if os.environ.get(SWITCH) == "interpret" and installed():
    _import_interpreted()  # before another package imports Triton as a compiler
