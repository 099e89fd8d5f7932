"""A run over two nodes, its student data-parallel and its teacher pipelined across them, loses one in mid-step."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.support.run_inputs import ROOT, commands, make_task, steady_metrics
from tests.support.two_nodes import NAMESPACES_REQUIRED, Node, two_nodes, why_not

SCRIPT = ROOT / "examples" / "launch" / "torchrun_multi_node.sh"
STEPS = 7
TIMEOUT_S = 8.0
# one rank a node: what matters goes across, gradients of the student and activations of the teacher
LAYOUT = ("teacher.parallel.pipeline=2",)


def arguments(config: Path, run_dir: Path) -> tuple[str, ...]:
    quiet = ("report.samples=0", "report.html=false", "evaluate.prompts=null", "rollout.batch_size=1")
    often = (f"train.steps={STEPS}", "checkpoint.every=2", "checkpoint.keep=9", f"collective_timeout_s={TIMEOUT_S}")
    return (str(config), f"run_dir={run_dir}", *quiet, *often, *LAYOUT)


def launch(node: Node, head: Node, output: Path, logs: Path, command: tuple[str, ...]) -> psutil.Process:
    environment = {
        **{
            "HEAD": head.address,
            "ADDRESS": node.address,
            "NODES": "2",
            "RANKS": "1",
            "HEALTH": "no",
            "PATIENCE": "120",
        },
        **{"LOGS": str(logs), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
    }
    return psutil.Process(node.start("bash", SCRIPT, *command, output=output, **environment).pid)


def until(reached: Callable[[], bool], said: Callable[[], str], timeout_s: float = 120) -> float:
    """Seconds until ``reached()``."""
    started = time.monotonic()
    while not reached():
        assert time.monotonic() < started + timeout_s, said()
        time.sleep(0.01)
    return time.monotonic() - started


def alive(process: psutil.Process) -> bool:
    try:
        # a launcher that waits for the other node has not yet waited for its ranks
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.skipif(bool(why_not()) and not NAMESPACES_REQUIRED, reason=why_not())
def test_a_node_cut_off_in_a_step_is_noticed_in_seconds_and_the_run_ends_as_if_it_had_not_been(tmp_path: Path):
    task = make_task(tmp_path / "task")
    run_dir, outputs = tmp_path / "run", [tmp_path / "a.txt", tmp_path / "b.txt"]
    command = arguments(task.config, run_dir)

    def lines() -> int:
        path = run_dir / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def said() -> str:
        return "\n".join(output.read_text() for output in outputs if output.exists())

    with two_nodes() as nodes:
        agents = [
            launch(node, nodes[0], output, tmp_path / "logs", command)
            for node, output in zip(nodes, outputs, strict=True)
        ]
        until(lambda: lines() == 3, said)
        ranks = [rank for agent in agents for rank in agent.children(recursive=True)]
        assert len(ranks) == 2
        nodes[1].pull()
        # two limits in a row: a rank may still get through one collective after the cable is out
        assert until(lambda: not any(alive(rank) for rank in ranks), said) < 2 * TIMEOUT_S + 5
        assert lines() < STEPS
        nodes[1].plug()
        for agent in agents:
            assert agent.wait(timeout=200) == 0, said()

    assert re.search(r"resuming from \S+/step-0000000[24] \([24] steps done\)", said())
    whole = tmp_path / "whole"
    commands().run("train", *arguments(task.config, whole), ranks=2).expect_success()
    assert steady_metrics(run_dir) == steady_metrics(whole)
    assert len(steady_metrics(whole)) == STEPS
