"""A process that does not know its place among others is refused; one that waits for them hears signals."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from megatron_tropd.errors import ConfigError
from megatron_tropd.parallel.arrays import largest_or_infinite
from megatron_tropd.parallel.launch import check_launcher, check_variables

WHOLE = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"WORLD_SIZE": ""}, r"WORLD_SIZE='' is not a number"),
        ({"RANK": "first"}, r"RANK='first' is not a number"),
        ({"MASTER_PORT": "x"}, r"MASTER_PORT='x' is not a number"),
        ({"MASTER_PORT": "70000"}, r"MASTER_PORT=70000 is no port"),
        ({"RANK": "2"}, r"RANK=2 is none of the 2 ranks"),
        ({"RANK": "-1"}, r"RANK=-1 is none of the 2 ranks"),
        ({"MASTER_ADDR": ""}, r"RANK=1 is set, but not MASTER_ADDR\."),
        ({"MASTER_ADDR": None, "WORLD_SIZE": None}, r"RANK=1 is set, but not WORLD_SIZE and MASTER_ADDR\."),
        ({"RANK": None}, r"WORLD_SIZE=2 is set, but RANK is not"),
    ],
)
def test_variables_of_a_launch_that_are_half_set_or_no_numbers_are_named(change, said):
    environment = {name: value for name, value in (WHOLE | change).items() if value is not None}
    with pytest.raises(ConfigError, match=said):
        check_variables(environment)


def test_a_whole_set_of_variables_and_none_at_all_are_fine():
    for environment in (WHOLE, {}, {"WORLD_SIZE": "1"}, {"SLURM_NTASKS": "2", **WHOLE}, {"SLURM_NTASKS": "1"}):
        check_variables(environment)
        check_launcher(environment)


@pytest.mark.parametrize(
    "name", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "JSM_NAMESPACE_SIZE"]
)
def test_one_of_several_tasks_without_torchrun_is_refused(name):
    with pytest.raises(ConfigError, match=rf"{name}=2, but RANK is not set.*torchrun"):
        check_launcher({name: "2"})


JOINING = """
import os, sys, threading, time
from megatron_tropd.train.preemption import StopRequest
from megatron_tropd.parallel.groups import initialize_distributed
os.environ.update(RANK="0", WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=sys.argv[2])
if sys.argv[1] == "stop":
    with StopRequest():
        print("joining", flush=True)
        initialize_distributed()
else:
    print("joining", flush=True)
    initialize_distributed()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "number", "statuses"),
    [
        ("stop", signal.SIGTERM, {75}),
        pytest.param("stop", signal.SIGINT, {-signal.SIGINT, 130}, marks=pytest.mark.long),
        ("any other command", signal.SIGINT, {-signal.SIGINT}),
    ],
)
def test_a_rank_that_waits_for_others_to_come_leaves_at_once_when_it_is_told_to(kind, number, statuses):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-c", JOINING, kind, port]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "joining\n"
            time.sleep(2.0)  # it waits by then, in the library; earlier it leaves as well
            os.kill(process.pid, number)
            assert process.wait(timeout=120) in statuses  # of the 1,800 seconds that it would wait
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("values", "largest"),
    [([], 0.0), ([1.0, -3.0], 1.0), ([math.nan, 1.0], math.inf), ([1.0, math.nan], math.inf), ([math.inf], math.inf)],
)
def test_the_largest_of_values_with_nan_among_them_passes_no_bound(values, largest):
    assert largest_or_infinite(torch.tensor(values)) == largest
