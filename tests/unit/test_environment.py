"""The environment cannot take a guard away that the package puts up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import megatron_tropd


def test_no_variable_lets_torch_build_what_a_pickle_names():
    code = "import os, megatron_tropd\nassert 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD' not in os.environ"
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(megatron_tropd.__file__).parents[1]),
        "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is unset: with it a checkpoint's files could run code" in done.stderr
