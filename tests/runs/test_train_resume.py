"""A run may be killed at any moment: started again, it ends as if nothing had happened (design.md, invariant 6)."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.run_inputs import (
    Task,
    assert_metrics_agree,
    assert_weights_agree,
    commands,
    make_task,
    steady_metrics,
    torchrun,
    weights_of,
)

TP2 = ("student.parallel.tensor=2", "teacher.parallel.tensor=2")
STEPS, EVERY = 7, 2


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tmp_path_factory.mktemp("task"))


def arguments(task: Task, run_dir: Path, *overrides: str) -> tuple[str, ...]:
    """``train`` with little beside training itself; a greedy evaluation with every checkpoint."""
    quiet = ("report.samples=0", "report.html=false", "evaluate.teacher=false", "evaluate.max_problems=2")
    evaluate = ("evaluate.suites=[{name: greedy}]", "evaluate.every=2")
    # one answer at a time: steps long enough to be killed in
    train = (f"train.steps={STEPS}", f"checkpoint.every={EVERY}", "checkpoint.keep=9", "rollout.batch_size=1")
    where = (f"run_dir={run_dir}", f"export.hf={run_dir}/export")
    return ("train", str(task.config), *where, *quiet, *evaluate, *train, *overrides)


@pytest.fixture(scope="module")
def unbroken(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that nothing has happened to, with its checkpoints after steps 2, 4, 6 and 7."""
    run_dir = tmp_path_factory.mktemp("unbroken")
    commands().run(*arguments(task, run_dir, *TP2), ranks=2).expect_success()
    assert [row["step"] for row in steady_metrics(run_dir)] == list(range(1, STEPS + 1))
    return run_dir


def checkpoint_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step-{step:08d}"


def as_it_was(unbroken: Path, run_dir: Path, *, steps: int, checkpoints: tuple[int, ...]) -> Path:
    """A run directory as a kill after ``steps`` metrics lines leaves it."""
    for step in checkpoints:
        shutil.copytree(checkpoint_of(unbroken, step), checkpoint_of(run_dir, step))
    (run_dir / "checkpoints" / "latest").write_text(checkpoint_of(run_dir, max(checkpoints)).name)
    lines = (unbroken / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(lines[:steps]))
    evaluations = json.loads((unbroken / "evaluation.json").read_text())
    known = [evaluation for evaluation in evaluations if evaluation["step"] <= min(checkpoints)]
    (run_dir / "evaluation.json").write_text(json.dumps(known))
    return run_dir


def assert_same_outcome(run_dir: Path, unbroken: Path) -> None:
    """Bit for bit: metrics without the clock, accuracies, and the exported weights."""
    import torch

    assert steady_metrics(run_dir) == steady_metrics(unbroken)
    assert json.loads((run_dir / "evaluation.json").read_text()) == json.loads(
        (unbroken / "evaluation.json").read_text()
    )
    found, expected = weights_of(run_dir / "export"), weights_of(unbroken / "export")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# --------------------------------------------------------------------------- killed


def lines(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@contextlib.contextmanager
def launched(arguments: tuple[str, ...], output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """torchrun on two ranks, ended with all that it started when the block is left."""
    process = torchrun(*arguments, ranks=2, output=output)
    try:
        yield process
    finally:
        kill_tree(process.pid)
        process.wait(timeout=30)


def kill_tree(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        launcher = psutil.Process(pid)
        # ranks first: the launcher would end them more gently
        for process in [*launcher.children(recursive=True), launcher]:
            with contextlib.suppress(psutil.NoSuchProcess):
                os.kill(process.pid, signal.SIGKILL)


def wait_until(
    reached: Callable[[], bool], process: subprocess.Popen[bytes], output: Path, timeout_s: float = 150
) -> None:
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert process.poll() is None and time.monotonic() < deadline, output.read_text()
        time.sleep(0.001)


def test_a_run_killed_in_a_step_in_a_checkpoint_and_after_one_ends_like_an_unbroken_one(
    task: Task, unbroken: Path, tmp_path: Path
):
    run_dir = tmp_path / "run"
    command = arguments(task, run_dir, *TP2)

    # in the second step, before there is any checkpoint
    job = commands().start(*command, ranks=2)
    job.until(lambda: lines(run_dir) == 1)
    assert job.kill().statuses == (-9, -9)
    assert not (run_dir / "checkpoints").exists()

    # as soon as the checkpoint after the second step is there: what belongs to that step is not repeated
    job = commands().start(*command, ranks=2)
    job.until(lambda: (run_dir / "checkpoints" / "latest").exists())
    assert "going on" not in job.kill().output
    assert lines(run_dir) == 2

    # in the fourth step: the checkpoint after the second exists, the third has left its line in the metrics
    job = commands().start(*command, ranks=2)
    job.until(lambda: lines(run_dir) == 3)
    # nothing that would outlive the two ranks
    assert [psutil.Process(pid).children(recursive=True) for pid in job.pids] == [[], []]
    assert "(2 steps done)" in job.kill().output
    assert checkpoint_of(run_dir, 2).exists() and not checkpoint_of(run_dir, 4).exists()

    # while the checkpoint after the fourth step is being written
    partial = checkpoint_of(run_dir, 4).with_suffix(".partial")
    job = commands().start(*command, ranks=2)
    job.until(lambda: partial.exists() and any(partial.iterdir()))
    assert "(2 steps done)" in job.kill().output
    assert partial.exists() and not checkpoint_of(run_dir, 4).exists()
    assert lines(run_dir) == 4

    outcome = commands().run(*command, ranks=2).expect_success()
    assert "(2 steps done)" in outcome.output
    assert_same_outcome(run_dir, unbroken)
    assert not list((run_dir / "checkpoints").glob("*.partial"))

    # started once more, a finished run has nothing left to train
    before = (run_dir / "metrics.jsonl").read_bytes()
    again = commands().run(*command, ranks=2).expect_success()
    assert f"({STEPS} steps done)" in again.output
    assert (run_dir / "metrics.jsonl").read_bytes() == before
    assert_same_outcome(run_dir, unbroken)


# --------------------------------------------------------------------------- asked to stop


def hear(heard: list[int]) -> None:
    """On the ranks: what all of them answer when rank r has heard ``heard[r]``, and how one of them ends otherwise."""
    import torch.distributed as dist

    from megatron_tropd.parallel.groups import initialize_distributed
    from megatron_tropd.train.preemption import StopRequest

    initialize_distributed()
    before = signal.getsignal(signal.SIGUSR1)
    with StopRequest() as stop:
        if not any(heard):
            os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(ZeroDivisionError), stop.deferred():
            assert stop.agreed() is None
            if number := heard[dist.get_rank()]:
                os.kill(os.getpid(), number)
            assert stop.agreed() == max(heard)
            raise ZeroDivisionError  # as Preempted does, it leaves the block
    assert signal.getsignal(signal.SIGUSR1) == before


def test_ranks_agree_to_stop_whichever_of_them_was_asked():
    commands().call(hear, [0, int(signal.SIGUSR1)], ranks=2)


def test_outside_of_training_a_run_asked_to_stop_leaves_at_once():
    outcome = commands().start(json.dumps([[0]]), function=f"{__name__}:hear").wait()
    assert outcome.status == 75 and outcome.output.splitlines()[-1].startswith(
        "stopped by SIGUSR1 outside of training. "
    )


def test_a_run_asked_to_stop_saves_and_ends_like_an_unbroken_one(task: Task, unbroken: Path, tmp_path: Path):
    run_dir, output = tmp_path / "run", tmp_path / "output.txt"
    # its own checkpoints would come after the fifth step and at the end
    command = arguments(task, run_dir, *TP2, "checkpoint.every=5")

    # torchrun hands on what it is sent
    with launched(command, output) as process:
        wait_until(lambda: lines(run_dir) == 2, process, output)
        process.terminate()
        assert process.wait(timeout=60) != 0
    said = output.read_text()
    assert "Unable to shutdown" not in said  # torchrun's words for a process that it had to kill
    steps = steps_when_stopped(said, signal.SIGTERM, run_dir)

    # asked on one rank alone, all of them stop
    job = commands().start(*command, ranks=2)
    job.until(lambda: lines(run_dir) == steps + 1)
    os.kill(job.pids[1], signal.SIGHUP)
    outcome = job.wait()
    assert outcome.statuses == (75, 75), outcome
    assert f"({steps} steps done)" in outcome.output
    steps = steps_when_stopped(outcome.output, signal.SIGHUP, run_dir)

    outcome = commands().run(*command, ranks=2).expect_success()
    assert f"({steps} steps done)" in outcome.output
    assert_same_outcome(run_dir, unbroken)


def steps_when_stopped(said: str, number: signal.Signals, run_dir: Path) -> int:
    """How many steps a run says it has done, which its newest checkpoint and its metrics must agree with."""
    stopped = re.search(rf"^stopped by {number.name} after (\d) of 7 steps; the checkpoint is in ", said, re.MULTILINE)
    assert stopped, said
    steps = int(stopped[1])
    assert (run_dir / "checkpoints" / "latest").read_text() == checkpoint_of(run_dir, steps).name
    assert lines(run_dir) == steps
    return steps


# --------------------------------------------------------------------------- torn, foreign, abandoned


def test_torn_checkpoints_are_passed_over_with_a_warning_that_names_them(task: Task, unbroken: Path, tmp_path: Path):
    run_dir = as_it_was(unbroken, tmp_path, steps=6, checkpoints=(2, 4, 6))
    shard = next(checkpoint_of(run_dir, 6).glob("*.distcp"))
    size = shard.stat().st_size
    os.truncate(shard, size - 1)
    (checkpoint_of(run_dir, 4) / "complete.json").unlink()

    outcome = commands().run(*arguments(task, run_dir, *TP2), ranks=2).expect_success()

    warnings = [line for line in outcome.output.splitlines() if line.startswith("WARNING")]
    # an untrained model's responses are all cut off, which is warned of once, too
    cut_off = [line for line in warnings if "were cut off by their budget" in line]
    warnings = [line for line in warnings if line not in cut_off]
    assert len(warnings) == 2 and len(cut_off) <= 1 and "WARNING" not in outcome.outputs[1], warnings
    assert (
        f"{checkpoint_of(run_dir, 6)} is torn: {shard.name} has {size - 1:,} bytes, {size:,} were written"
        in warnings[0]
    )
    assert f"{checkpoint_of(run_dir, 4)} is not a whole checkpoint (complete.json is missing or broken)" in warnings[1]
    assert "(2 steps done)" in outcome.output
    assert_same_outcome(run_dir, unbroken)


def refuse(config: str, overrides: list[str], cases: list[tuple[str, str]]) -> None:
    """On the ranks: every override on top of ``overrides`` is refused with its message, before a model is built."""
    from megatron_tropd.config.loading import load_config
    from megatron_tropd.errors import CheckpointError
    from megatron_tropd.train import session

    def build_nothing(*_: Any) -> None:
        raise AssertionError("a model would be built")

    session.build_run = build_nothing  # type: ignore[assignment]
    for override, message in cases:
        with pytest.raises(CheckpointError) as caught:
            session.run_training(load_config(config, [*overrides, *override.split()]))
        assert message in str(caught.value), (override, str(caught.value))


def test_a_checkpoint_of_another_run_is_refused_by_name_and_value(task: Task, unbroken: Path):
    from tests.support.run_inputs import STUDENT, save_model

    wider = save_model(task.directory / "wider", STUDENT | {"intermediate_size": 58}, tied=True, seed=3)
    twin = save_model(task.directory / "twin", STUDENT, tied=True, seed=3)
    newest = checkpoint_of(unbroken, STEPS)
    cases = [
        ("seed=8", f"{newest} is of another run: seed was 7, is 8. Use another run_dir, or"),
        ("method.name=tropd_soft", "method.name was 'tropd', is 'tropd_soft'"),
        ("method.k=9", "method.k was 7, is 9"),
        ("dtype=bf16", "dtype was 'fp32', is 'bf16'"),
        (f"student.model={wider}", "ffn_size of student.model was 50, is 58"),
        (f"teacher.model={task.student}", "hidden_size of teacher.model was 44, is 36"),
        (f"student.model={twin}", f"{newest} is of another run: student.weights are others of the same kind"),
        ("optimizer.name=sgd optimizer.eps=1e-8", "optimizer.name was 'adam', is 'sgd'"),
        ("train.steps=6", f"{newest} has 7 steps behind it, train.steps=6 asks for fewer"),
        (f"checkpoint.resume={unbroken}/export", f"{unbroken}/export is not a whole checkpoint"),
        # a directory of checkpoints stands for the newest of them
        (f"checkpoint.resume={unbroken}/checkpoints seed=8", f"{newest} is of another run: seed was 7, is 8"),
        # and so does the run
        (f"checkpoint.resume={unbroken} seed=8", f"{newest} is of another run: seed was 7, is 8"),
    ]
    commands().call(refuse, task.config, arguments(task, unbroken)[2:], cases)


def test_starting_over_leaves_nothing_of_the_earlier_run(task: Task, unbroken: Path, tmp_path: Path):
    run_dir = as_it_was(unbroken, tmp_path, steps=7, checkpoints=(2, 4, 6, 7))
    shorter = ("train.steps=3", "checkpoint.every=1", "checkpoint.keep=2", "evaluate.every=0", "evaluate.before=false")
    command = arguments(task, run_dir, *shorter, "evaluate.after=false", "checkpoint.resume=never")
    commands().run(*command).expect_success()
    assert [row["step"] for row in steady_metrics(run_dir)] == [1, 2, 3]
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        "latest",
        "step-00000002",
        "step-00000003",
    ]
    assert not (run_dir / "evaluation.json").exists()
    # nothing of it is lost
    kept = run_dir / "earlier-run"
    assert [row["step"] for row in steady_metrics(kept)] == list(range(1, STEPS + 1))
    assert len(list((kept / "checkpoints").glob("step-*"))) == 4 and (kept / "evaluation.json").exists()


def start_over(config: str, overrides: list[str]) -> None:
    """On the ranks: what `resume=never` leaves before the first step, should the run be killed there."""
    from megatron_tropd.config.loading import load_config
    from megatron_tropd.parallel.groups import initialize_distributed
    from megatron_tropd.train.resume import clear_way, find_start

    initialize_distributed()
    settings = load_config(config, [*overrides, "checkpoint.resume=never"])
    found = find_start(settings.checkpoint, {}, run_dir=settings.run_dir, steps=settings.train.steps)
    assert found.checkpoint is None
    clear_way(settings.run_dir, found.checkpoint)
    assert not (settings.run_dir / "checkpoints").exists()
    assert not (settings.run_dir / "evaluation.json").exists()


def test_starting_over_forgets_the_earlier_run_before_the_first_step(task: Task, unbroken: Path, tmp_path: Path):
    run_dir = as_it_was(unbroken, tmp_path, steps=7, checkpoints=(2, 7))
    commands().call(start_over, task.config, arguments(task, run_dir)[2:])


# --------------------------------------------------------------------------- under another layout


@pytest.mark.parametrize(
    ("ranks", "layout"),
    [
        (0, ()),
        (2, ("student.parallel.pipeline=2", "teacher.parallel.pipeline=2")),
        (2, ("train.pack_tokens=90", "teacher.parallel.tensor=2")),
    ],
    ids=["alone", "pipeline", "data-parallel"],
)
def test_a_tensor_parallel_checkpoint_goes_on_under_another_layout(
    task: Task, unbroken: Path, tmp_path: Path, ranks: int, layout: tuple[str, ...]
):
    resume = f"checkpoint.resume={checkpoint_of(unbroken, 4)}"
    commands().run(*arguments(task, tmp_path, *layout, resume), ranks=ranks).expect_success()
    # in a new directory, the metrics are those of the steps that were left
    assert_metrics_agree(steady_metrics(tmp_path), steady_metrics(unbroken)[4:])
    assert_weights_agree(tmp_path / "export", unbroken / "export")


def test_states_that_the_distributed_optimizer_has_cut_go_on_under_other_layouts(
    task: Task, unbroken: Path, tmp_path: Path
):
    few = ("optimizer.distributed=true", "train.pack_tokens=90")
    commands().run(*arguments(task, tmp_path / "two", *few), ranks=2).expect_success()
    assert_metrics_agree(steady_metrics(tmp_path / "two"), steady_metrics(unbroken))
    resume = f"checkpoint.resume={checkpoint_of(tmp_path / 'two', 4)}"
    for name, ranks, layout in (
        ("pipeline", 2, ("student.parallel.pipeline=2", "teacher.parallel.pipeline=2")),
        ("tensor and replicas", 4, TP2),
    ):
        commands().run(*arguments(task, tmp_path / name, *few, *layout, resume), ranks=ranks).expect_success()
        assert_metrics_agree(steady_metrics(tmp_path / name), steady_metrics(unbroken)[4:])
        assert_weights_agree(tmp_path / name / "export", unbroken / "export")
