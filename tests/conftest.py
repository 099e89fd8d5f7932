"""What all tests share: commands on PATH; the kernels' interpreter where there is no GPU; an order of their own."""

import os
import random
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from megatron_tropd.losses.vocab_parallel.backends.triton import kernels

# as in an activated environment: scripts under test call python, torchrun and shellcheck by name
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

# tables of tokenized prompts are made once for all of a run's tests, and not in the user's own cache
if "MEGATRON_TROPD_CACHE" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="megatron_tropd-tests-")
    os.environ["MEGATRON_TROPD_CACHE"] = _cache.name

# must be chosen before megatron-core imports Triton
if kernels.installed() and not torch.cuda.is_available():
    kernels.use_interpreter()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run files, and the tests of each, in a random order")


@pytest.hookimpl(tryfirst=True)  # pytest then brings together what shares a fixture's parameter
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark every test by its folder (``-m unit``), and shuffle when asked.

    Whole files are shuffled, so that a module's fixtures are made once. One seed is one order, for every worker.
    """
    here = Path(__file__).parent
    for item in items:
        item.add_marker(item.path.relative_to(here).parts[0])
    seed = config.getoption("shuffle")
    if seed is None:
        return
    rng = random.Random(seed)
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    order = list(files.values())
    rng.shuffle(order)
    for tests in order:
        rng.shuffle(tests)
    items[:] = [item for tests in order for item in tests]
