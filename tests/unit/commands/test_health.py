"""``tropd health`` passes healthy ranks, and names the rank, host and fault of what is not."""

from __future__ import annotations

import os
import re
import socket
import time
from pathlib import Path

import pytest

from megatron_tropd.commands import health
from megatron_tropd.commands.health import Fitness
from tests.support.run_inputs import commands


def test_healthy_ranks_pass_and_leave_nothing_behind(tmp_path: Path):
    outcome = commands().run("health", "--shared", tmp_path / "runs", ranks=2).expect_success()
    said = " ".join(outcome.output.split())
    assert re.search(r"2 rank\(s\); all-reduce [\d,]+ us, [\d,.]+ GB/s per rank", said)
    assert f"{socket.gethostname()} 0, 1 cpu" in said
    assert outcome.outputs[1] == ""
    assert not list((tmp_path / "runs").iterdir())
    commands().run("health", "--shared", tmp_path / "runs").expect_success()


def test_a_directory_that_cannot_be_shared_is_one_message_and_exit_status_2(tmp_path: Path):
    (tmp_path / "file").touch()
    outcome = commands().run("health", "--shared", tmp_path / "file" / "runs", ranks=2)
    assert outcome.status == 2
    assert f"HealthError: 1 problem(s):\n  rank 0 on {socket.gethostname()}: cannot write to" in outcome.output
    assert "Traceback" not in outcome.output + outcome.outputs[1]
    assert "HealthError" not in outcome.outputs[1]


def faulty(fault: str, message: str, shared: str) -> None:
    """On the ranks: rank 1 has the fault, and all ranks are told of it in the same words."""
    import torch

    rank, here, wait_s = int(os.environ["RANK"]), Path(shared), 20.0
    if fault == "absent":
        os.environ["WORLD_SIZE"], wait_s = "3", 6.0
        _begin_together(here / "begun", rank)
        if rank == 0:  # the last to be ready: the other must hear its verdict, not that nobody has answered
            health._product = slow  # type: ignore[assignment]
    if rank == 1 and fault == "device":
        health._product = broken  # type: ignore[assignment]
    if rank == 1 and fault == "versions":
        health._version = lambda package: "0.1"  # type: ignore[assignment]
    if rank == 1 and fault == "sums":
        full = torch.full
        torch.full = lambda *args, **options: full(*args, **options) + 1  # type: ignore[assignment]
    if rank == 1 and fault == "elsewhere":
        here, health._SHARED_WAIT_S = here / "mine", 0.5
    problems = health.check_health(shared=here, timeout_s=wait_s)
    assert any(message in problem for problem in problems), (fault, problems)
    left = [path for path in Path(shared).glob("**/*") if "begun" not in path.parts]
    assert left in ([], [Path(shared) / "mine"])


def _begin_together(folder: Path, rank: int) -> None:
    """Wait until both ranks are up, so that the first one's patience is not spent on the start of the second."""
    folder.mkdir(exist_ok=True)
    (folder / str(rank)).touch()
    while len(list(folder.iterdir())) < 2:
        time.sleep(0.01)


def slow(device: object) -> float:
    time.sleep(2)
    return 1.0


def broken(device: object) -> float:
    raise RuntimeError("CUDA error: uncorrectable ECC error encountered\nand more lines")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("absent", "rank(s) 2 of 3 have not come within 6 s; those that have are on HOST."),
        ("device", "rank 1 on HOST: CUDA error: uncorrectable ECC error encountered"),
        ("versions", "torch is not the same everywhere: 0.1 on HOST; 2."),
        ("sums", "rank 0 on HOST: a collective failed: 1 of 1 elements of an all-reduce are wrong"),
        ("elsewhere", "rank 1 on HOST: SHARED/mine is not the directory that rank 0 sees under this name"),
    ],
)
def test_every_rank_is_told_what_is_wrong_and_where(fault: str, message: str, tmp_path: Path):
    message = message.replace("HOST", socket.gethostname()).replace("SHARED", str(tmp_path))
    commands().call(faulty, fault, message, tmp_path, ranks=2)


def test_a_first_rank_that_cannot_be_reached_is_told_with_its_address():
    elsewhere = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    outcome = commands().run("health", "--timeout", "1", **elsewhere)
    assert outcome.status == 2
    assert f"HealthError on rank 1: {socket.gethostname()} cannot reach the first rank at 127.0.0.1:9" in outcome.output
    assert "Traceback" not in outcome.output


def fact(rank: int, *, gpu: str, host: str = "a1") -> Fitness:
    return Fitness(rank=rank, host=host, device="H200", memory_bytes=1, tflops=1.0, versions={}, problems=[], gpu=gpu)


@pytest.mark.parametrize(
    ("gpus", "wanted", "said"),
    [
        (("A", "B"), 2, []),
        (("A", "B"), None, []),
        (("A", "B"), 8, ["a1: its ranks use 2 GPU(s), and --gpus is 8"]),
        (("", ""), 2, ["a1: its ranks use 0 GPU(s), and --gpus is 2"]),
        (("", ""), None, []),
        (("A", "A"), None, ["ranks 0, 1 on a1 share one GPU: each needs its own"]),
    ],
)
def test_gpus_of_a_machine_are_counted_and_shared_ones_named(
    gpus: tuple[str, str], wanted: int | None, said: list[str]
):
    assert health._gpu_problems([fact(rank, gpu=gpu) for rank, gpu in enumerate(gpus)], wanted) == said


def test_a_package_that_breaks_the_trainers_import_is_one_sentence(monkeypatch: pytest.MonkeyPatch):
    def broken(name: str) -> None:
        raise RuntimeError("Found empty `transformer-engine` meta package installed.\nand more lines")

    monkeypatch.setattr(health.importlib, "import_module", broken)
    assert health._import_trainer() == [
        "the trainer cannot be imported: RuntimeError: Found empty `transformer-engine` meta package installed."
    ]


def test_a_gpu_that_torch_does_not_see_is_a_problem(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(health, "unused_gpus", lambda: "this machine has a GPU, but torch sees none.")
    monkeypatch.setattr(health, "_import_trainer", lambda: [])
    assert health._examine(0).problems == ["the CPU would be used: this machine has a GPU, but torch sees none."]
