"""What all tests share: this environment's commands on PATH; the kernels' interpreter where there is no GPU."""

import os
import sys
from pathlib import Path

import pytest
import torch

from megatron_tropd.losses.vocab_parallel.backends import kernels

# as in an activated environment: scripts under test call python, torchrun and shellcheck by name
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

# must be chosen before megatron-core imports Triton
if kernels.installed() and not torch.cuda.is_available():
    kernels.use_interpreter()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test by the folder it lies in: ``-m unit``, ``-m "not vllm"``."""
    here = Path(__file__).parent
    for item in items:
        item.add_marker(item.path.relative_to(here).parts[0])
