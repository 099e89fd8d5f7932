"""SLURM itself on one machine that poses as two nodes, where its packages are installed.

    with slurm(tmp_path) as cluster:
        cluster.run("sinfo")

Its own munge key, ports, logs and state: nothing of a cluster this machine may belong to is touched.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel")
_CONFIG = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={home}/munge.sock
StateSaveLocation={home}/state
SlurmdSpoolDir={home}/spool-%n
SlurmctldPidFile={home}/slurmctld.pid
SlurmdPidFile={home}/slurmd-%n.pid
SlurmctldPort={port}
SlurmctldLogFile={home}/slurmctld.log
SlurmdLogFile={home}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
MessageTimeout=60
KillWait=5
SchedulerParameters=sched_interval=2,batch_sched_delay=0
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=2 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES State=UP MaxTime=INFINITE GraceTime=120
PartitionName=urgent Nodes=ALL State=UP MaxTime=INFINITE PriorityTier=10
"""


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where it keeps its files, and its commands."""

    home: Path

    def run(self, *argv: object) -> str:
        """What a SLURM command prints."""
        environment = {**os.environ, "SLURM_CONF": str(self.home / "slurm.conf")}
        done = subprocess.run(
            [*map(str, argv)], env=environment, capture_output=True, text=True, check=False, timeout=90
        )
        assert done.returncode == 0, f"{argv}: {done.stdout}{done.stderr}"
        return done.stdout

    def log(self) -> str:
        """What the daemons say of jobs."""
        files = (self.home / name for name in ("slurmctld.log", "slurmd-n1.log", "slurmd-n2.log"))
        lines = [line for file in files for line in file.read_text().splitlines()]
        return "\n".join(sorted(line for line in lines if "ob" in line))


def why_not() -> str:
    """Why SLURM cannot be started here; empty when it can."""
    missing = [name for name in _PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"SLURM is not installed ({', '.join(missing)}; Debian's slurmctld, slurmd, slurm-client, munge)"
    return "" if os.geteuid() == 0 else "SLURM's daemons start jobs as other users, which takes root"


@contextlib.contextmanager
def slurm(home: Path) -> Iterator[Cluster]:
    """A cluster of two nodes with two cores each; its jobs and daemons end with the block.

    Jobs of its partition ``urgent`` preempt those of the usual one, ``all``.
    """
    home.chmod(0o700)  # munge trusts no directory that others can write to
    cluster = Cluster(home)
    run = cluster.run
    host, port = socket.gethostname().split(".")[0], _free_ports(3)
    (home / "slurm.conf").write_text(_CONFIG.format(host=host, home=home, port=port, first=port + 1, last=port + 2))
    (home / "munge.key").write_bytes(secrets.token_bytes(1024))
    (home / "munge.key").chmod(0o600)
    for name in ("state", "spool-n1", "spool-n2"):
        (home / name).mkdir()
    files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munge.pid", "log-file": "munge.log"}
    try:
        run("munged", "--force", f"--seed-file={home}/munge.seed", *(f"--{k}={home / v}" for k, v in files.items()))
        run("slurmctld", "-c")
        for node in ("n1", "n2"):
            run("slurmd", "-N", node)
        assert _until(lambda: run("sinfo", "--noheader", "--states=idle", "--format=%D").strip() == "2"), cluster.log()
        try:
            yield cluster
        finally:
            # the daemons alone would leave the steps of a job running
            run("scancel", "--user=root")
            _until(lambda: not run("squeue", "--noheader"))
    finally:
        _end(home / name for name in ("slurmd-n1.pid", "slurmd-n2.pid", "slurmctld.pid", "munge.pid"))


def _until(reached: Callable[[], bool], timeout_s: float = 60) -> bool:
    """Whether it was reached in time."""
    deadline = time.monotonic() + timeout_s
    while not reached():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _end(pid_files: Iterable[Path]) -> None:
    """Ends daemons one after the other: each removes its pid file last."""
    for pid_file in pid_files:
        with contextlib.suppress(OSError, ValueError):
            pid = int(pid_file.read_text())
            os.kill(pid, signal.SIGTERM)
            if not _until(lambda pid=pid: not Path(f"/proc/{pid}").exists(), timeout_s=30):
                os.kill(pid, signal.SIGKILL)


def _free_ports(count: int) -> int:
    """The first of so many consecutive free ports."""
    for port in range(16_810, 18_000, count):
        with contextlib.ExitStack() as stack:
            try:
                for offset in range(count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port + offset))
            except OSError:
                continue
            return port
    raise AssertionError("no free ports")
