"""Builds the optional extension ``megatron_tropd._C``, and puts the demo into a wheel. All else is in pyproject.toml.

Without a C++ compiler the build prints a warning and goes on: the package then runs its plain Python twins.
Set ``MEGATRON_TROPD_REQUIRE_COMPILED=1`` to make a missing extension an error, at build time as well as at import.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_py import build_py

REQUIRED = os.environ.get("MEGATRON_TROPD_REQUIRE_COMPILED", "0") not in ("", "0")

extension = Pybind11Extension(
    "megatron_tropd._C",
    sources=["csrc/bindings.cpp", "csrc/forest.cpp", "csrc/packing.cpp", "csrc/stream.cpp"],
    depends=["csrc/forest.hpp", "csrc/integer_set.hpp", "csrc/packing.hpp", "csrc/stream.hpp"],
    cxx_std=17,
    extra_compile_args=["-O3"],
    optional=not REQUIRED,
)


class BuildWithDemo(build_py):
    """Modules, and beside them what ``tropd demo`` runs where there is no clone of the repository."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder in ("demo", "methods"):
            source, target = Path("examples", folder), Path(self.build_lib, "megatron_tropd", "examples", folder)
            shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))


setup(ext_modules=[extension], cmdclass={"build_py": BuildWithDemo})
