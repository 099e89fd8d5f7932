"""The launch scripts: clean by shellcheck, refused with their usage when called wrongly, and run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from run_inputs import ROOT, make_task, steady_metrics

SCRIPTS = sorted([*(ROOT / "examples").glob("*/*.sh"), *(ROOT / "examples").glob("slurm/*.sbatch")])
LAUNCH = ROOT / "examples" / "launch"


def shell(*argv: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*map(str, argv)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
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


@pytest.mark.timeout(300)
def test_the_single_node_script_checks_the_machine_and_trains(tmp_path: Path):
    task = make_task(tmp_path)
    short = ("train.steps=2", "evaluate.prompts=null", "report.samples=0", "report.html=false")
    called = shell(*("bash", LAUNCH / "torchrun_single_node.sh", task.config, *short), RANKS="1")
    assert called.returncode == 0, called.stdout + called.stderr
    assert "1 rank(s); all-reduce" in called.stdout
    assert [row["step"] for row in steady_metrics(task.directory / "run")] == [1, 2]
