"""Run a function on several real processes joined by gloo, anywhere: no ports to choose, no launcher, no GPU.

    def check_sum(dtype):                                  # module level, so that the children can import it
        x = torch.ones(3, dtype=dtype)
        dist.all_reduce(x)                                 # the default process group is ready
        assert x.sum() == 3 * dist.get_world_size()
        return x

    results = run_on_ranks(check_sum, torch.float32, world_size=2)     # what each rank returned, in rank order

The ranks meet through a file in a temporary folder. Processes are forked from a small server that has imported what
most of them need (``rank_imports``), so a rank starts in well under a second; it then imports the function's module.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing


class RankFailed(AssertionError):
    """A function failed on some rank; the message holds that rank's traceback."""


def run_on_ranks(function: Callable[..., Any], *args: Any, world_size: int, timeout_s: float = 280) -> list[Any]:
    """Call ``function(*args)`` on ``world_size`` ranks and return what each returned, in rank order.

    Args:
        function: a module-level function; the default (gloo) process group is initialized when it is called, and
            ``dist.group.WORLD`` is the group to hand to code under test.
        args: anything that pickles. Tensors too, but large ones are better made on the ranks from a seed.
        timeout_s: wall-clock limit for all ranks together; what is still running then is killed.

    Returns:
        One entry per rank: None, or numbers, strings, tensors and lists or dicts of these.

    Raises:
        RankFailed: with the number and traceback of the rank that failed first.
        TimeoutError: the limit passed; the message names the ranks that were still running.
    """
    multiprocessing.set_forkserver_preload(["tests.support.rank_imports"])
    with tempfile.TemporaryDirectory(prefix="tropd-ranks-") as folder:
        context = torch.multiprocessing.start_processes(
            _rank_main,
            args=(world_size, folder, timeout_s, dict(os.environ), function, args),
            nprocs=world_size,
            join=False,
            start_method="forkserver",
        )
        try:
            _join(context, timeout_s=timeout_s, name=getattr(function, "__name__", str(function)))
        except (torch.multiprocessing.ProcessRaisedException, torch.multiprocessing.ProcessExitedException):
            failure = Path(folder) / "first-failure"
            if not failure.exists():  # killed by a signal
                raise
            raise RankFailed(failure.read_text()) from None
        return [torch.load(_result_path(folder, rank), weights_only=True) for rank in range(world_size)]


def _join(context: Any, *, timeout_s: float, name: str) -> None:
    """Wait for all ranks. A failing rank ends the others (torch does that); so does the time limit."""
    deadline = time.monotonic() + timeout_s
    while not context.join(timeout=max(deadline - time.monotonic(), 0.01)):
        if time.monotonic() < deadline:
            continue
        running = [rank for rank, process in enumerate(context.processes) if process.is_alive()]
        for process in context.processes:
            if process.is_alive():
                process.kill()
        for process in context.processes:
            process.join()
        raise TimeoutError(f"{name}: ranks {running} of {len(context.processes)} still ran after {timeout_s:g} s.")


def _rank_main(
    rank: int,
    world_size: int,
    folder: str,
    timeout_s: float,
    environment: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.clear()  # the server's environment is as old as the first call; a test may have changed it since
    os.environ.update(environment)
    threads = int(os.environ.setdefault("OMP_NUM_THREADS", "1"))  # more ranks than cores is the rule here
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo resolves the host name, which may not exist
    torch.set_num_threads(threads)  # the server has read its own environment already
    store = dist.FileStore(str(Path(folder) / "store"), world_size)
    limit = timedelta(seconds=timeout_s)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=limit)
    try:
        result = _call(function, args, rank=rank, folder=folder)
        torch.save(result, _result_path(folder, rank))
        dist.barrier()  # no rank leaves while another may still need it
    finally:
        dist.destroy_process_group()


def _call(function: Callable[..., Any], args: tuple[Any, ...], *, rank: int, folder: str) -> Any:
    """The first rank to fail leaves its traceback in a file before its sockets close and fail the others."""
    try:
        return function(*args)
    except BaseException as error:  # what pytest.raises and pytest.fail throw is no Exception
        with contextlib.suppress(FileExistsError), open(Path(folder) / "first-failure", "x") as file:
            file.write(f"rank {rank} failed first:\n{traceback.format_exc()}")
        raise AssertionError(str(error)) from error


def _result_path(folder: str, rank: int) -> Path:
    return Path(folder) / f"result-{rank}.pt"
