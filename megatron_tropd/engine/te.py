"""Is Transformer Engine to be had here? No other module imports it."""

from __future__ import annotations

import importlib
import importlib.util

from megatron_tropd.parallel.te_package import NAME, te_fault

_BUILT = "its layers are not built into this version yet"


def te_unavailable() -> str:
    """Say in a sentence why Transformer Engine cannot be imported; empty when it can.

    Absent, an empty meta package, without an extension for torch, of a version that megatron-core does not know, or
    with an extension that was built for another torch.
    """
    if fault := te_fault():
        return fault
    try:
        importlib.import_module(f"{NAME}.pytorch")
    except Exception as error:  # an undefined symbol is an ImportError or an OSError; what it checks itself is others
        said = str(error).strip().splitlines() or [type(error).__name__]
        return f"Transformer Engine cannot be imported; its extension may be of another torch: {said[0]}"
    return ""


def te_refusal() -> str:
    """Say in a sentence why a setting that needs its layers is refused."""
    return te_unavailable() or f"Transformer Engine is here, but {_BUILT}."


def accelerators() -> dict[str, str]:
    """List the optional accelerators, with what each lacks. Megatron takes the first Adam that can be imported."""
    fault = te_unavailable()
    apex = importlib.util.find_spec("apex") is not None
    adam = "Transformer Engine's" if not fault else "apex's" if apex else "torch's, fused on a GPU"
    return {
        "Transformer Engine": fault or "here",
        "apex": "here" if apex else "apex is not installed.",
        "Adam": adam,
    }
