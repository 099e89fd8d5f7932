"""What all tests share: commands on PATH; GPUs hidden, and the kernels interpreted instead; an order of their own."""

import os
import random
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from megatron_tropd.losses.vocab_parallel.backends.triton import kernels
from tests.support.long import LONG

# as in an activated environment: scripts under test call python, torchrun and shellcheck by name
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

# tables of tokenized prompts are made once for all of a run's tests, and not in the user's own cache
if "MEGATRON_TROPD_CACHE" not in os.environ:
    _cache = tempfile.TemporaryDirectory(prefix="megatron_tropd-tests-")
    os.environ["MEGATRON_TROPD_CACHE"] = _cache.name

# ranks of the tests are many to a machine and talk by gloo: only those marked gpu know what to do with one. Hidden
# before anything has looked for them, from the processes that tests start, too
ON_GPU = os.environ.get("MEGATRON_TROPD_TEST_GPU") == "1"
if not ON_GPU:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# must be chosen before megatron-core imports Triton
if kernels.installed() and not torch.cuda.is_available():
    kernels.use_interpreter()


# who ignores a signal hands that on to what it starts, unlike a handler: under nohup, or behind a shell's "&",
# commands under test would not hear what is sent to them
for number in (signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, lambda *_: None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shuffle", type=int, metavar="SEED", help="run files, and the tests of each, in a random order")


def of_this_device(items: list[pytest.Item], *, on_gpu: bool) -> list[pytest.Item]:
    """The tests to run: on a GPU those marked for one."""
    return [item for item in items if not on_gpu or item.get_closest_marker("gpu") is not None]


@pytest.hookimpl(tryfirst=True)  # pytest then brings together what shares a fixture's parameter
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark every test by its folder (``-m unit``), leave out those for CPUs on a GPU, and shuffle when asked.

    Whole files are shuffled, so that a module's fixtures are made once. One seed is one order, for every worker.
    """
    here = Path(__file__).parent
    for item in items:
        item.add_marker(item.path.relative_to(here).parts[0])
    mine = of_this_device(items, on_gpu=ON_GPU)
    if not LONG:
        mine = [item for item in mine if item.get_closest_marker("long") is None]
    if len(mine) < len(items):
        kept = set(mine)
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = mine
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
