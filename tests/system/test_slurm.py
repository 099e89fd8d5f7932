"""``examples/slurm/train.sbatch``: what it asks SLURM for, and a job that SLURM wants back goes on where it was."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.run_inputs import ROOT, Task, commands, make_task, steady_metrics
from tests.support.slurm_cluster import Cluster, slurm, why_not

SCRIPT = ROOT / "examples" / "slurm" / "train.sbatch"

# --------------------------------------------------------------------------- with stand-ins that write down their calls

# every call is a line; "srun" of the trainer waits for the signal that the script must hand on, then ends as told.
# What sbatch was told of CPUs does not count for a step (man srun, --exact and --cpus-per-task): it would have one
_SRUN = """#!/usr/bin/env bash
case "$*" in *--cpus-per-task=*) ;; *) echo "a step without its CPUs: srun $*" >&2; exit 9 ;; esac
echo "srun $*" >> "$CALLS"
printenv | grep -E '^(CUDA_DEVICE|PYTORCH_.*ALLOC_CONF|TRITON_CACHE|.*_IFNAME)' | sort > "$CALLS.env"
case "$*" in
  *" train "*)
    [ -n "${ASKED:-}" ] || exit "$STATUS"
    trap 'echo "trainer heard USR1" >> "$CALLS"; exit "$STATUS"' USR1
    kill -USR1 "$PPID"
    for _ in $(seq 200); do sleep 0.05; done ;;
esac
"""
_SCONTROL = """#!/usr/bin/env bash
if [ "$1" = show ]; then printf '%s\\n' $NODES; else echo "scontrol $*" >> "$CALLS"; fi
"""


def submit_to_stand_ins(folder: Path, *argv: str, nodes: str, **environment: str) -> tuple[int, list[str], str]:
    """(exit status, calls, output) of the batch script when ``srun`` and ``scontrol`` only write down their calls."""
    for name, text in (("srun", _SRUN), ("scontrol", _SCONTROL)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    calls = folder / "calls"
    job = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "?", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_NTASKS_PER_NODE": "8"}
    job["SLURM_CPUS_PER_TASK"] = "12"
    variables = {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(calls), "NODES": nodes, "ACTIVATE": "none"}
    # as SLURM does: the script is copied elsewhere
    copied = shutil.copy(SCRIPT, folder / "slurm_script")
    done = subprocess.run(
        ["bash", copied, *argv],
        env={**job, **variables, "SHARED": str(folder), "STATUS": "0", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    said = done.stdout + done.stderr
    return done.returncode, calls.read_text().splitlines() if calls.exists() else [], said


def step(name: str, folder: Path, nodes: str, per_node: int, command: str) -> str:
    """The line of one step of job 41, whose tasks share the node's 96 CPUs."""
    count = nodes.count(",") + 1
    return (
        f"srun --exact --nodes={count} --ntasks={count * per_node} --ntasks-per-node={per_node} --nodelist={nodes} "
        f"--cpus-per-task={96 // per_node} --output={folder}/logs/41/{name}-%N.log --open-mode=append {command}"
    )


def test_the_batch_script_checks_the_nodes_and_then_trains_on_all_of_them(tmp_path: Path):
    status, calls, said = submit_to_stand_ins(tmp_path, "c.yaml", "seed=3", nodes="a1 a2")
    assert status == 0, said
    rank = "examples/slurm/rank.sh python -m megatron_tropd"
    assert calls == [
        step("health", tmp_path, "a1,a2", 8, f"--wait=60 {rank} health --shared {tmp_path}"),
        step("train", tmp_path, "a1,a2", 8, f"--wait=120 {rank} train c.yaml seed=3"),
    ]


def test_steps_have_what_megatron_nccl_and_triton_want_and_what_is_set_already_stays(tmp_path: Path):
    (tmp_path / "first").mkdir()
    submit_to_stand_ins(tmp_path / "first", "c.yaml", nodes="a1", TMPDIR="/local")
    assert (tmp_path / "first" / "calls.env").read_text().splitlines() == [
        "CUDA_DEVICE_MAX_CONNECTIONS=1",
        "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True",
        f"TRITON_CACHE_DIR=/local/tropd-triton-{os.getuid()}",
    ]
    submit_to_stand_ins(
        tmp_path,
        "c.yaml",
        nodes="a1",
        CUDA_DEVICE_MAX_CONNECTIONS="8",
        PYTORCH_ALLOC_CONF="max_split_size_mb:512",
        TRITON_CACHE_DIR="/elsewhere",
        INTERFACE="ib0",
        GLOO_SOCKET_IFNAME="eth1",
    )
    assert (tmp_path / "calls.env").read_text().splitlines() == [
        "CUDA_DEVICE_MAX_CONNECTIONS=8",
        "GLOO_SOCKET_IFNAME=eth1",
        "NCCL_SOCKET_IFNAME=ib0",
        "PYTORCH_ALLOC_CONF=max_split_size_mb:512",
        "TRITON_CACHE_DIR=/elsewhere",
    ]


def test_where_the_job_has_gpus_health_counts_them_and_nothing_runs_without(tmp_path: Path):
    status, calls, said = submit_to_stand_ins(tmp_path, "c.yaml", nodes="a1", SLURM_GPUS_ON_NODE="8")
    assert status == 0, said
    assert calls[0].endswith(f"health --gpus 8 --shared {tmp_path}")
    assert calls[1].endswith("train c.yaml device=cuda")


def test_servers_get_the_last_nodes_and_the_trainer_their_addresses(tmp_path: Path):
    status, calls, said = submit_to_stand_ins(tmp_path, "c.yaml", nodes="a1 a2 a3 a4", SERVERS="2")
    assert status == 0, said
    keys = (
        "rollout.engine=vllm_server rollout.vllm_server.urls=[http://a3:8100,http://a4:8100] "
        "rollout.vllm_server.publish=broadcast rollout.vllm_server.publish_address=a1"
    )
    serve = f"python -m megatron_tropd serve student c.yaml {keys} --host 0.0.0.0 --port 8100"
    train = f"--wait=120 examples/slurm/rank.sh python -m megatron_tropd train c.yaml {keys}"
    # the two start side by side
    assert set(calls[1:]) == {
        step("server", tmp_path, "a3,a4", 1, serve),
        step("train", tmp_path, "a1,a2", 8, train),
    }
    status, calls, said = submit_to_stand_ins(tmp_path, "c.yaml", nodes="a1", SERVERS="1")
    assert status == 64 and "SERVERS=1 leaves no node to train on" in said


@pytest.mark.parametrize(
    ("status", "environment", "requeued"),
    [
        ("75", {"ASKED": "1"}, True),
        ("75", {}, True),  # SLURM told the ranks itself
        ("75", {"SLURM_RESTART_COUNT": "50"}, False),
        ("0", {"ASKED": "1"}, False),
        ("2", {}, False),
    ],
    ids=["asked", "preempted", "too often", "done in time", "failed"],
)
def test_a_job_is_requeued_when_the_trainer_stopped_because_it_was_asked_to(
    tmp_path: Path, status: str, environment: dict[str, str], requeued: bool
):
    ended, calls, said = submit_to_stand_ins(tmp_path, "c.yaml", nodes="a1 a2", STATUS=status, **environment)
    assert ended == int(status), said
    assert ("trainer heard USR1" in calls) == ("ASKED" in environment)
    assert ("scontrol requeue 41" in calls) == requeued


# --------------------------------------------------------------------------- with SLURM itself

needs_slurm = pytest.mark.skipif(bool(why_not()), reason=why_not())
LAYOUT = ("student.parallel.tensor=2", "teacher.parallel.pipeline=2", "checkpoint.every=0")
QUIET = ("report.samples=0", "report.html=false", "evaluate.prompts=null", "rollout.batch_size=1")
PATIENCE_S = 400  # of which an idle machine needs 20, a busy one far more
# whatever a job without a requeue ends as
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


class Submitted:
    """A job of the batch script on both nodes, with a rank on each."""

    def __init__(self, cluster: Cluster, folder: Path, *arguments: object, setup: str = "") -> None:
        self._cluster, self.shared, self._output = cluster, folder / "shared", folder / "job.out"
        where = {"PYTHONPATH": ROOT, "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "PATH": os.environ["PATH"]}
        activate = folder / "activate"
        activate.write_text("".join(f"export {name}={value}\n" for name, value in where.items()) + setup)
        resources = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0")
        places = (f"--chdir={ROOT}", f"--output={self._output}", f"--export=ACTIVATE={activate},SHARED={self.shared}")
        self.job = cluster.run("sbatch", "--parsable", *resources, *places, SCRIPT, *arguments).strip()

    def said(self) -> str:
        """What the script and the ranks have written."""
        files = (self._output, *sorted(self.shared.rglob("*.log")))
        return "\n".join(path.read_text() for path in files if path.exists())

    def logs(self) -> set[str]:
        return {path.name for path in self.shared.rglob("*.log")}

    def status(self) -> dict[str, str]:
        """What SLURM says of the job."""
        shown = self._cluster.run("scontrol", "--oneliner", "show", "job", self.job)
        return dict(field.split("=", 1) for field in shown.split() if "=" in field)

    def until(self, reached: Callable[[], bool], timeout_s: float = PATIENCE_S) -> None:
        """Returns as soon as ``reached()``; a job that ends or takes longer first is an error."""
        deadline, look = time.monotonic() + timeout_s, 0.0
        while not reached():
            time.sleep(0.05)
            if time.monotonic() < look:
                continue
            status, look = self.status(), time.monotonic() + 2.0
            over = status["JobState"] in ENDED and not reached()
            assert not over and time.monotonic() < deadline, f"{status}\n{self.said()}\n{self._cluster.log()}"

    def end(self) -> tuple[str, str, str]:
        """State, exit code and restarts at its end."""
        deadline = time.monotonic() + PATIENCE_S
        while (status := self.status())["JobState"] not in ENDED:
            assert time.monotonic() < deadline, f"{status}\n{self.said()}\n{self._cluster.log()}"
            time.sleep(0.5)
        return status["JobState"], status["ExitCode"], status["Restarts"]


def steps_done(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@needs_slurm
@pytest.mark.timeout(1500)
def test_under_slurm_a_job_asked_to_stop_is_requeued_and_ends_like_an_unbroken_run(
    cluster: Cluster, task: Task, tmp_path: Path
):
    run_dir, steps = tmp_path / "run", "train.steps=9"
    submitted = Submitted(cluster, tmp_path, task.config, f"run_dir={run_dir}", steps, *LAYOUT, *QUIET)
    submitted.until(lambda: steps_done(run_dir) >= 2)
    # as SLURM does some time before the limit: to the batch script alone
    cluster.run("scancel", "--batch", "--signal=USR1", submitted.job)
    submitted.until(lambda: submitted.status()["Restarts"] == "1")
    stopped = re.search(r"stopped by SIGUSR1 after ([2-8]) of 9 steps", submitted.said())
    assert stopped, submitted.said()
    # SLURM lets a requeued job wait for two minutes. It may wait for less, but a start within the second in which nodes
    # were told to end the one before is refused there ("Job credential revoked"), and that ends the job
    cluster.run("scontrol", "update", f"JobId={submitted.job}", "StartTime=now+3")
    assert submitted.end() == ("COMPLETED", "0:0", "1"), submitted.said()

    assert "trainer ended with status 0" in submitted.said()
    assert f"({stopped[1]} steps done)" in submitted.said()
    # the two nodes share their host's name, after which SLURM names the logs
    host = socket.gethostname().split(".")[0]
    assert submitted.logs() == {f"train-{host}.log", f"health-{host}.log"}
    whole = tmp_path / "whole"
    commands().run("train", task.config, f"run_dir={whole}", steps, *LAYOUT, *QUIET, ranks=2).expect_success()
    assert steady_metrics(run_dir) == steady_metrics(whole)
    assert len(steady_metrics(whole)) == 9


@needs_slurm
@pytest.mark.timeout(1500)
def test_under_slurm_a_job_that_makes_room_for_another_saves_and_waits(cluster: Cluster, task: Task, tmp_path: Path):
    run_dir = tmp_path / "run"
    submitted = Submitted(cluster, tmp_path, task.config, f"run_dir={run_dir}", "train.steps=999", *LAYOUT, *QUIET)
    submitted.until(lambda: steps_done(run_dir) >= 1)
    urgent = ("--partition=urgent", "--nodes=2", "--exclusive", f"--output={tmp_path}/urgent.out", "--wrap=echo done")
    cluster.run("sbatch", *urgent)
    submitted.until(lambda: submitted.status()["Restarts"] == "1")
    assert submitted.status()["JobState"] == "PENDING"
    assert re.search(r"stopped by SIGTERM after \d+ of 999 steps; the checkpoint is in", submitted.said())
    submitted.until((tmp_path / "urgent.out").exists)
    cluster.run("scancel", submitted.job)


@needs_slurm
@pytest.mark.timeout(1500)
def test_under_slurm_a_job_that_nobody_stops_ends_at_its_first_start(cluster: Cluster, task: Task, tmp_path: Path):
    run_dir = tmp_path / "run"
    submitted = Submitted(cluster, tmp_path, task.config, f"run_dir={run_dir}", "train.steps=2", *LAYOUT, *QUIET)
    assert submitted.end() == ("COMPLETED", "0:0", "0"), submitted.said()
    assert [row["step"] for row in steady_metrics(run_dir)] == [1, 2]


@needs_slurm
@pytest.mark.timeout(1500)
def test_under_slurm_a_trainer_that_fails_ends_its_job_for_good(cluster: Cluster, task: Task, tmp_path: Path):
    submitted = Submitted(cluster, tmp_path, task.config, f"run_dir={tmp_path / 'run'}", "train.stepps=2")
    assert submitted.end() == ("FAILED", "2:0", "0"), submitted.said()
    assert submitted.status()["Requeue"] == "1"  # SLURM would have been allowed to
    assert "trainer ended with status 2" in submitted.said() and "train.stepps" in submitted.said()


@needs_slurm
@pytest.mark.timeout(1500)
def test_under_slurm_a_job_with_an_unfit_node_ends_before_it_trains(cluster: Cluster, task: Task, tmp_path: Path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "sitecustomize.py").write_text(
        "import importlib.metadata as m, os\n"
        "version = m.version\n"
        "m.version = lambda n: '0.1' if n == 'torch' and os.environ.get('SLURM_PROCID') == '1' else version(n)\n"
    )
    setup = f"export PYTHONPATH={other}:$PYTHONPATH\n"
    submitted = Submitted(cluster, tmp_path, task.config, f"run_dir={tmp_path / 'run'}", setup=setup)
    assert submitted.end() == ("FAILED", "2:0", "0"), submitted.said()
    assert "torch is not the same everywhere: 0.1 on" in submitted.said()
    assert submitted.logs() == {f"health-{socket.gethostname().split('.')[0]}.log"}
    assert not (tmp_path / "run").exists()
