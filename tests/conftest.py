"""Shared set-up: one thread per process, and this folder importable by the children of run_on_ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

TESTS = str(Path(__file__).resolve().parent)
if TESTS not in sys.path:
    sys.path.insert(0, TESTS)

torch.set_num_threads(1)
