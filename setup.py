"""Builds the optional extension ``megatron_tropd._C``. Everything else is declared in pyproject.toml.

Without a C++ compiler the build prints a warning and goes on: the package then runs its plain Python twins.
Set ``MEGATRON_TROPD_REQUIRE_COMPILED=1`` to make a missing extension an error, at build time as well as at import.
"""

from __future__ import annotations

import os

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup

REQUIRED = os.environ.get("MEGATRON_TROPD_REQUIRE_COMPILED", "0") not in ("", "0")

extension = Pybind11Extension(
    "megatron_tropd._C",
    sources=["csrc/bindings.cpp", "csrc/forest.cpp", "csrc/packing.cpp", "csrc/stream.cpp"],
    depends=["csrc/forest.hpp", "csrc/integer_set.hpp", "csrc/packing.hpp", "csrc/stream.hpp"],
    cxx_std=17,
    extra_compile_args=["-O3"],
    optional=not REQUIRED,
)

setup(ext_modules=[extension])
