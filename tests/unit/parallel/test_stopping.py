"""A signal that asks a command to stop is one word and a status; the same signal delivered twice is one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_tropd.parallel import torchrun
from megatron_tropd.parallel.stopping import Repeats, handlers
from megatron_tropd.train import preemption
from megatron_tropd.train.preemption import StopRequest

ROOT = Path(__file__).resolve().parents[3]
COMMAND = """
import time
from megatron_tropd import cli
from megatron_tropd.parallel.leaving import on_leave
on_leave(lambda: print("tidied", flush=True))

def work():
    try:
        print("working", flush=True)
        time.sleep(300)
    finally:
        print("unwound", flush=True)

cli.app = work
cli.main()
"""


def started(*arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None and process.stdout.readline() == "working\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_stopped_unwinds_tidies_up_and_says_what_is_left(number: signal.Signals):
    process = started("generate")
    process.send_signal(number)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out) == (128 + number, "unwound\ntidied\n")
    kept = "What was written is in OUT.partial: start the same command again to continue from there."
    assert err == f"stopped by {number.name}. {kept}\n"


def test_what_nohup_has_been_asked_to_ignore_is_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with handlers([signal.SIGHUP], lambda *_: pytest.fail("handled")):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_that_comes_twice_at_once_is_one_and_a_later_one_is_another():
    now = [0.0]
    repeats = Repeats(lambda: now[0])
    assert not repeats.is_again()
    now[0] = 0.4  # from the launcher what has come from the terminal
    assert not repeats.is_again()
    now[0] = 60.0
    assert repeats.is_again()


@pytest.mark.parametrize(
    ("second", "leaves"), [(signal.SIGINT, [130]), (signal.SIGHUP, [75]), (signal.SIGTERM, []), (signal.SIGUSR1, [])]
)
def test_a_second_signal_by_hand_leaves_a_run_at_once_and_a_schedulers_does_not(
    second: signal.Signals, leaves: list[int], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    left: list[int] = []
    monkeypatch.setattr(preemption, "leave", left.append)
    now = [0.0]
    stop = StopRequest(clock=lambda: now[0])
    stop._deferring = True
    stop._answered = 1  # its handler has run
    stop._handle(signal.SIGINT, None)
    stop._hear_while_waiting(signal.SIGINT)
    assert left == [] and stop.heard == signal.SIGINT
    assert "SIGINT: a checkpoint is written before the run stops; Ctrl-C now stops it at once" in capfd.readouterr().err
    now[0], stop._answered = 60.0, 99
    stop._hear_while_waiting(second)
    assert left == leaves
    assert ("at once. Start the same command again" in capfd.readouterr().err) == bool(leaves)


# --------------------------------------------------------------------------- torchrun, quietly


def failing(code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int, str, Any]:
    """Status, what is said, and the arguments, where torchrun finds that rank 3 has ended so."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

    seen: list[str] = []

    def run(arguments: Sequence[str]) -> None:
        seen.extend(arguments)
        failure = ProcessFailure(local_rank=1, pid=99, exitcode=code, error_file="<N/A>")
        raise ChildFailedError("megatron_tropd", {3: failure})

    monkeypatch.setattr("torch.distributed.run.main", run)
    status = torchrun.main(["--nproc-per-node=2", "-m", "megatron_tropd", "train"])
    out, err = capsys.readouterr()
    return status, out + err, seen


@pytest.mark.parametrize(
    ("code", "status", "said"),
    [
        (2, 2, ""),
        (75, 75, ""),
        (1, 1, "rank 3 (process 99) ended with status 1\n"),
        (-9, 137, "rank 3 (process 99) was ended by SIGKILL\n"),
    ],
)
def test_a_launch_ends_with_the_status_of_its_rank_and_at_most_a_line(code, status, said, capsys, monkeypatch):
    found, line, arguments = failing(code, capsys, monkeypatch)
    assert (found, line) == (status, said)
    assert arguments[-4:] == ["--nproc-per-node=2", "-m", "megatron_tropd", "train"]
    assert "--shutdown-timeout=600" in arguments[:-4]


def test_ranks_of_this_machine_get_the_signals_that_their_starter_gets_and_it_their_status(tmp_path, monkeypatch):
    (tmp_path / "standin.py").write_text(
        "import signal, sys\nsignal.signal(signal.SIGUSR1, lambda *_: sys.exit(int(sys.argv[1])))\n"
        "import os\nos.kill(os.getppid(), signal.SIGUSR1)\nsignal.pause()\n"
    )
    monkeypatch.setattr(torchrun, "MODULE", "standin")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    assert torchrun.run_ranks(["75"], [], environment=environment, cwd=tmp_path) == 75


def test_ranks_that_are_still_there_at_a_second_signal_are_ended_and_nobody_elses():
    command = [
        sys.executable,
        "-c",
        "import signal; signal.signal(2, signal.SIG_IGN); print(1, flush=True); signal.pause()",
    ]
    rank = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert rank.stdout is not None and rank.stdout.readline() == b"1\n"
        assert rank.pid in torchrun._children(os.getpid()) and os.getpid() not in torchrun._children(os.getpid())
        torchrun._end([rank.pid])
        assert rank.wait(timeout=60) == -signal.SIGKILL
    finally:
        rank.kill()
        rank.communicate()


def test_a_launch_names_the_command_that_it_runs_and_what_is_torchruns(monkeypatch: pytest.MonkeyPatch):
    from typer.testing import CliRunner

    from megatron_tropd import cli

    seen: list[Any] = []
    monkeypatch.setattr(cli, "torchrun", SimpleNamespace(main=lambda words: seen.append(words) or 7))
    words = ["launch", "--nproc-per-node", "8", "--standalone", "evaluate", "MODEL", "--suite", "x.yaml", "-m"]
    assert CliRunner().invoke(cli.app, words).exit_code == 7
    assert seen == [[*words[1:4], "-m", "megatron_tropd", *words[4:]]]
    result = CliRunner().invoke(cli.app, ["launch", "--standalone", "trian"])
    assert "names no command to run: give one of" in str(result.exception)
