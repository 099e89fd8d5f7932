"""Is Transformer Engine installed whole? Its files tell; a half of it would end Megatron-Core's import.

Its wheel of pure Python holds all modules; the CUDA library and torch's extension are packages of their own. Megatron
uses it wherever it can be imported, and survives an ``ImportError`` alone; what half an installation raises is others.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.version import Version

NAME = "transformer_engine"
# what megatron-core 0.16.1 asks for
OLDEST, TOO_NEW = "2.9", "2.12"
INSTALL = f'pip install --no-build-isolation "transformer-engine[pytorch,core_cu13]>={OLDEST},<{TOO_NEW}"'
_LIBRARIES = ("transformer-engine-cu12", "transformer-engine-cu13")


def te_fault() -> str:
    """Say in a sentence why Transformer Engine cannot be used; empty when by its files it can.

    Whether its extension was built for this torch only importing it tells: see ``engine.te.available``.
    """
    if sys.modules.get(NAME, NAME) is None or importlib.util.find_spec(NAME) is None:
        return broken() or "Transformer Engine is not installed."
    return broken() or _unknown_version()


def broken() -> str:
    """Say in a sentence what is missing from half an installation; empty for a whole one, or none."""
    meta = _version("transformer-engine")
    if meta is None:
        return ""
    libraries = {name: found for name in _LIBRARIES if (found := _version(name)) is not None}
    extension = _version("transformer-engine-torch")
    if not libraries and extension is None and _built_from_source():
        return ""
    if not libraries:
        return f"Transformer Engine {meta} is an empty meta package here: its CUDA library is missing."
    if extension is None:
        return f"Transformer Engine {meta} has no extension for torch here: transformer-engine-torch is missing."
    odd = {name: found for name, found in {**libraries, "transformer-engine-torch": extension}.items() if found != meta}
    if odd:
        parts = ", ".join(f"{name} {found}" for name, found in odd.items())
        return f"Transformer Engine {meta} has parts of other versions: {parts}."
    return ""


def hide_broken() -> None:
    """Let half an installation be none to Megatron-Core, and say so."""
    if NAME in sys.modules or not (fault := broken()):
        return
    sys.modules[NAME] = None  # type: ignore[assignment] # its import is an ImportError from now on
    if os.environ.get("RANK", "0") == "0":  # of ranks that all find it so, one says it
        warnings.warn(f"{fault} It is not used. Complete it ({INSTALL}), or remove it.", stacklevel=2)


def _built_from_source() -> bool:
    """Say whether the libraries lie beside the modules, as a build from source leaves them."""
    spec = importlib.util.find_spec(NAME) if sys.modules.get(NAME, NAME) is not None else None
    if spec is None or spec.submodule_search_locations is None:
        return False
    folders = [Path(place) for place in spec.submodule_search_locations]
    return any(any(where.glob("libtransformer_engine*")) for folder in folders for where in (folder, folder.parent))


def _unknown_version() -> str:
    found = _version("transformer-engine")
    if found is None:
        return "Transformer Engine can be imported, but is no installed package: its version is unknown."
    if Version(OLDEST) <= Version(found) < Version(TOO_NEW):
        return ""
    return f"Transformer Engine {found} is outside the versions {OLDEST} to <{TOO_NEW} that megatron-core 0.16.1 uses."


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
