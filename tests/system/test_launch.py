"""The launch scripts: clean by shellcheck, refused with their usage when called wrongly, and run."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from megatron_tropd_torchrun import launches_us
from tests.support.run_inputs import ROOT, make_task, steady_metrics

SCRIPTS = sorted([*(ROOT / "examples").glob("*/*.sh"), *(ROOT / "examples").glob("slurm/*.sbatch")])
LAUNCH = ROOT / "examples" / "launch"


def shell(*argv: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, argv)],
        env={"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": str(ROOT), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def test_the_scripts_are_clean():
    assert {"torchrun_single_node.sh", "torchrun_multi_node.sh", "rank.sh", "train.sbatch"} <= {
        path.name for path in SCRIPTS
    }
    found = shell("shellcheck", "--severity=style", *SCRIPTS)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("name", ["torchrun_single_node.sh", "torchrun_multi_node.sh"])
def test_a_script_called_without_its_arguments_explains_itself(name: str):
    called = shell("bash", LAUNCH / name)
    assert called.returncode == 64
    assert f"examples/launch/{name} CONFIG.yaml [key=value ...]" in called.stderr
    assert "MAX_RESTARTS" in called.stderr and "set -" not in called.stderr


def test_the_single_node_script_checks_the_machine_and_trains(tmp_path: Path):
    task = make_task(tmp_path)
    short = ("train.steps=2", "evaluate.prompts=null", "report.samples=0", "report.html=false")
    called = shell(*("bash", LAUNCH / "torchrun_single_node.sh", task.config, *short), RANKS="1")
    assert called.returncode == 0, called.stdout + called.stderr
    assert "1 rank(s); all-reduce" in called.stdout
    assert [row["step"] for row in steady_metrics(task.directory / "run")] == [1, 2]


def test_an_error_of_the_configuration_under_torchrun_itself_is_one_line(tmp_path: Path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    group = "torchrun.handlers"
    if not entry_points(group=group).select(name="megatron_tropd"):  # installed before it had one
        folder = tmp_path / "plugin-1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1\n")
        lines = [f"{name} = {place}" for name, place in project["entry-points"][group].items()]
        (folder / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines]))
    called = shell(
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"),
        *("-m", "megatron_tropd", "train", tmp_path / "none.yaml"),
        PYTHONPATH=f"{ROOT}{os.pathsep}{tmp_path}",
    )
    assert called.returncode == 2
    said = [line for line in called.stderr.splitlines() if " so far" not in line]
    assert len(said) == 1 and said[0].startswith("ConfigError: ") and "none.yaml" in said[0], called.stderr


@pytest.mark.parametrize(
    ("line", "ours"),
    [
        ("python -m torch.distributed.run --standalone -m megatron_tropd train a.yaml", True),
        ("/v/bin/python /v/bin/torchrun --nproc-per-node=2 --module megatron_tropd check a.yaml", True),
        ("/v/bin/python /v/bin/torchrun --no-python /v/bin/tropd train a.yaml", True),
        ("/v/bin/python /v/bin/torchrun train.py -m other", False),
        ("/v/bin/python /v/bin/torchrun -m other --data megatron_tropd", False),
        ("python -u -m megatron_tropd train a.yaml", False),
        ("python -c pass", False),
    ],
)
def test_torchrun_is_quiet_for_this_program_alone(line: str, ours: bool):
    assert launches_us(line.split()) == ours


# --------------------------------------------------------------------------- with vLLM servers

VLLM = ROOT / "examples" / "vllm"
# in place of python: writes down its calls, serves until it is told to end, trains as long as it is told to
SEEN = os.environ.get("CUDA_VISIBLE_DEVICES", "all")  # GPUs that the tests themselves see
_PYTHON = """#!/usr/bin/env bash
echo "$* | key=${TROPD_API_KEY:-} gpus=${CUDA_VISIBLE_DEVICES-all}" >> "$CALLS"
case "$*" in
  *" serve "*)
    trap 'echo "server ended" >> "$CALLS"; exit 0' TERM
    while :; do sleep 0.05; done ;;
  *" train "*)
    trap 'echo "trainer heard USR1" >> "$CALLS"; exit 75' USR1
    until [ "$(grep -c ' serve ' "$CALLS")" -ge "${WANTED:-0}" ]; do sleep 0.05; done
    for _ in $(seq "${TURNS:-0}"); do sleep 0.05; done
    exit "${STATUS:-0}" ;;
esac
"""


def with_stand_in(folder: Path, script: str, *argv: str, **environment: str) -> tuple[int, list[str], str]:
    """(exit status, calls of python, output) of a script of ``examples/vllm``."""
    (folder / "python").write_text(_PYTHON)
    (folder / "python").chmod(0o755)
    variables = {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(folder / "calls"), "LOGS": str(folder / "logs")}
    called = shell("bash", VLLM / script, *argv, **{"TROPD_API_KEY": "", **variables, **environment})
    calls = folder / "calls"
    return called.returncode, calls.read_text().splitlines() if calls.exists() else [], called.stdout + called.stderr


@pytest.mark.parametrize("name", ["server.sh", "trainer.sh", "one_node.sh"])
def test_a_script_for_servers_called_without_its_arguments_explains_itself(name: str):
    called = shell("bash", VLLM / name)
    assert called.returncode == 64
    assert f"examples/vllm/{name} CONFIG.yaml [key=value ...]" in called.stderr and "set -" not in called.stderr
    assert "KEY_FILE" in called.stderr


def test_a_server_listens_to_this_machine_alone_unless_told_otherwise(tmp_path: Path):
    (tmp_path / "key").write_text("from a file\n")
    for options, address in (({}, "127.0.0.1 --port 8100"), ({"HOST": "10.0.0.2", "PORT": "9"}, "10.0.0.2 --port 9")):
        folder = tmp_path / address[:4]
        folder.mkdir()
        quick = _PYTHON.replace("while :; do sleep 0.05; done", "exit 0")
        (folder / "python").write_text(quick)
        (folder / "python").chmod(0o755)
        variables = {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(folder / "calls"), "TROPD_API_KEY": ""}
        called = shell(
            "bash", VLLM / "server.sh", "c.yaml", "seed=3", KEY_FILE=str(tmp_path / "key"), **variables, **options
        )
        assert called.returncode == 0, called.stderr
        [call] = (folder / "calls").read_text().splitlines()
        wanted = f"-m megatron_tropd serve student c.yaml seed=3 rollout.engine=megatron --host {address}"
        assert call == f"{wanted} | key=fromafile gpus={SEEN}"


def test_a_trainer_broadcasts_to_servers_elsewhere(tmp_path: Path):
    servers = {"SERVERS": "http://10.0.0.2:8100 http://10.0.0.3:8100", "TROPD_API_KEY": "k", "RANKS": "2"}
    status, calls, output = with_stand_in(tmp_path, "trainer.sh", "c.yaml", **servers, ADDRESS="10.0.0.1", STATUS="3")
    assert status == 3, output
    train = calls[-1]
    assert "--nproc-per-node=2" in train and " -m megatron_tropd train c.yaml " in train
    assert "rollout.vllm_server.urls=[http://10.0.0.2:8100,http://10.0.0.3:8100]" in train
    assert "rollout.vllm_server.publish=broadcast rollout.vllm_server.publish_address=10.0.0.1" in train
    assert train.endswith(f" | key=k gpus={SEEN}")


def test_one_node_serves_trains_and_leaves_nothing_behind(tmp_path: Path):
    settings = {"SERVERS": "4,5 none", "TRAINER": "0,1", "PORT": "8200", "RANKS": "2", "WANTED": "2", "STATUS": "4"}
    status, calls, output = with_stand_in(tmp_path, "one_node.sh", "c.yaml", "seed=3", **settings)
    assert status == 4, output
    serving = sorted(call for call in calls if " serve " in call)
    [train] = [call for call in calls if " train " in call]
    key = train.split("key=")[1].split()[0]
    assert len(key) == 48 and all(f"key={key} " in call for call in serving)
    assert all(key not in call.split(" | ")[0] for call in calls if " | " in call)
    assert [call.split("--host ")[1].split(" |")[0] for call in serving] == [
        "127.0.0.1 --port 8200",
        "127.0.0.1 --port 8201",
    ]
    assert [call.split("gpus=")[1] for call in serving] == ["4,5", ""] and train.endswith("gpus=0,1")
    assert "seed=3 rollout.engine=vllm_server" in train and "rollout.vllm_server.publish=files" in train
    assert "rollout.vllm_server.urls=[http://127.0.0.1:8200,http://127.0.0.1:8201]" in train
    assert calls.count("server ended") == 2


def test_one_node_hands_on_what_it_is_sent(tmp_path: Path):
    (tmp_path / "python").write_text(_PYTHON)
    (tmp_path / "python").chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "TURNS": "400"}
    script = subprocess.Popen(
        ["bash", str(VLLM / "one_node.sh"), "c.yaml"],
        env={**os.environ, **variables, "LOGS": str(tmp_path / "logs"), "RANKS": "1", "WANTED": "1"},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while not ((tmp_path / "calls").exists() and " train " in (tmp_path / "calls").read_text()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(0.3)  # the stand-in sets its trap
        script.send_signal(signal.SIGUSR1)
        assert script.wait(timeout=60) == 75
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(script.pid, signal.SIGKILL)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[-2:] == ["trainer heard USR1", "server ended"]
