"""``examples/slurm/train.sbatch``: what it asks SLURM for, and a job that SLURM wants back goes on where it was."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from run_inputs import ROOT, Task, commands, make_task, steady_metrics
from slurm_cluster import slurm, why_not

SCRIPT = ROOT / "examples" / "slurm" / "train.sbatch"

# --------------------------------------------------------------------------- with stand-ins that write down their calls

# every call is a line; "srun" of the trainer waits for the signal that the script must hand on, then ends as told
_SRUN = """#!/usr/bin/env bash
echo "srun $*" >> "$CALLS"
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
    """The line of one step of job 41."""
    count = nodes.count(",") + 1
    return (
        f"srun --exact --nodes={count} --ntasks={count * per_node} --ntasks-per-node={per_node} --nodelist={nodes} "
        f"--output={folder}/logs/41/{name}-%N.log --open-mode=append {command}"
    )


def test_the_batch_script_checks_the_nodes_and_then_trains_on_all_of_them(tmp_path: Path):
    status, calls, said = submit_to_stand_ins(tmp_path, "c.yaml", "seed=3", nodes="a1 a2")
    assert status == 0, said
    rank = "examples/slurm/rank.sh python -m megatron_tropd"
    assert calls == [
        step("health", tmp_path, "a1,a2", 8, f"--wait=60 {rank} health --shared {tmp_path}"),
        step("train", tmp_path, "a1,a2", 8, f"--wait=120 {rank} train c.yaml seed=3"),
    ]


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


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tmp_path_factory.mktemp("task"))


def until(reached: Callable[[], bool], said: Callable[[], str], timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < deadline and not re.search(r"Exited with exit code (?!75)", said()), said()
        time.sleep(0.1)


@pytest.mark.skipif(bool(why_not()), reason=why_not())
@pytest.mark.timeout(600)
def test_under_slurm_a_job_asked_to_stop_is_requeued_and_ends_like_an_unbroken_run(task: Task, tmp_path: Path):
    run_dir, shared = tmp_path / "run", tmp_path / "shared"
    layout = ("student.parallel.tensor=2", "teacher.parallel.pipeline=2", "train.steps=5", "checkpoint.every=0")
    quiet = ("report.samples=0", "report.html=false", "evaluate.prompts=null", "rollout.batch_size=1")
    where = {"SHARED": str(shared), "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
    (tmp_path / "activate").write_text(
        f"export PATH={os.environ['PATH']}\n" + "".join(f"export {k}={v}\n" for k, v in where.items())
    )
    home = tmp_path / "slurm"
    home.mkdir()

    def said() -> str:
        return "\n".join(path.read_text() for path in (tmp_path / "job.out", *shared.rglob("*.log")) if path.exists())

    def lines() -> int:
        path = run_dir / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    with slurm(home) as run:
        resources = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0", f"--chdir={ROOT}")
        environment = f"--export=ACTIVATE={tmp_path}/activate,SHARED={shared}"
        overrides = (f"run_dir={run_dir}", *layout, *quiet)
        submitted = run(
            *("sbatch", *resources, f"--output={tmp_path}/job.out", environment),
            *(SCRIPT, task.config, *overrides),
        )
        job = submitted.split()[-1]
        until(lambda: lines() == 2, said)
        # as SLURM does some time before the limit: to the batch script alone
        run("scancel", "--batch", "--signal=USR1", job)
        until(lambda: "Restarts=1" in run("scontrol", "show", "job", job), said)
        assert re.search(r"stopped by SIGUSR1 after [23] of 5 steps", said())
        # SLURM lets a requeued job wait for two minutes
        run("scontrol", "update", f"JobId={job}", "StartTime=now")
        until(lambda: "trainer ended with status 0" in said(), said)

    assert re.search(r"\([23] steps done\)", said())
    # the two nodes share their host's name, after which SLURM names the logs
    host = socket.gethostname().split(".")[0]
    assert {f"train-{host}.log", f"health-{host}.log"} <= {path.name for path in shared.rglob("*.log")}
    whole = tmp_path / "whole"
    commands().run("train", task.config, f"run_dir={whole}", *layout, *quiet, ranks=2).expect_success()
    assert steady_metrics(run_dir) == steady_metrics(whole)
    assert len(steady_metrics(whole)) == 5
