"""A teacher on ranks of its own: the same numbers as on the student's, batches ahead, and both sides' ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_tropd.config.loading import load_config
from megatron_tropd.config.sections import Layout
from megatron_tropd.data.packing import pack
from megatron_tropd.errors import ConfigError, EngineError
from megatron_tropd.parallel.groups import GroupBuilder
from megatron_tropd.parallel.partition import CrossWorldLink, Launch, Transfer, join_launch
from megatron_tropd.teacher.engines import remote as apart
from megatron_tropd.teacher.engines.remote import RankSplit, RemoteTeacher, decode_request, encode_request
from megatron_tropd.teacher.protocol import TeacherRequest
from megatron_tropd.teacher.sharded import HiddenKind
from megatron_tropd.teacher.transfer import ReplicaMap, carry
from megatron_tropd.types import Pack, Region, Rollout, single_turn
from tests.support.distributed import run_on_ranks
from tests.support.run_inputs import (
    TEACHER,
    Job,
    Task,
    assert_metrics_agree,
    commands,
    make_task,
    steady_metrics,
    torchrun,
)

QUIET = ("evaluate.prompts=null", "report.samples=0", "report.html=false")
TROPD = "  name: tropd\n  k: 7\n  beta: 0.3\n"
# asks the teacher about ids of the student's; two updates from signals of one time
ASKING = ("method.ppo_clip=0.2", "train.minibatches=2", "method.support=union", "optimizer.lr=2.0e-2")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    # a teacher with ids of its own, which are none of the student's
    return make_task(tmp_path_factory.mktemp("task"), teacher={**TEACHER, "vocab_size": 230})


def train(task: Task, run_dir: Path, *overrides: str, ranks: int = 0) -> list[dict[str, Any]]:
    command = ("train", task.config, f"run_dir={run_dir}", *QUIET, "checkpoint.every=0", *overrides)
    commands().run(*command, ranks=ranks).expect_success()
    return steady_metrics(run_dir)


# --------------------------------------------------------------------------- the same numbers


def with_method(task: Task, name: str) -> Task:
    """The task in a folder of its own, with a method as it comes."""
    if name == "tropd":
        return task
    folder = task.directory / name
    folder.mkdir(exist_ok=True)
    text = task.config.read_text()
    assert TROPD in text
    (folder / task.config.name).write_text(text.replace(TROPD, f"  name: {name}\n"))
    return replace(task, directory=folder)


@pytest.mark.parametrize(
    ("method", "settings", "student", "teacher", "own"),
    [
        ("tropd", (*ASKING, "method.temperature=0.7"), ("tensor=2",), ("pipeline=2",), 2),
        # hidden states; three ranks grade for one, by turns
        ("rkl", ("dtype=bf16",), (), (), 3),
        # a base model, which stays on the student's ranks; rows of a pack lie on several ranks of both
        ("exopd", (), ("context=2",), ("tensor=2",), 2),
        pytest.param("local_support", (), ("pipeline=2",), ("context=2",), 2, marks=pytest.mark.long),
    ],
    ids=["asked ids", "hidden states", "base model", "context"],
)
def test_a_teacher_on_its_own_ranks_changes_nothing(
    task: Task,
    tmp_path: Path,
    method: str,
    settings: tuple[str, ...],
    student: tuple[str, ...],
    teacher: tuple[str, ...],
    own: int,
):
    task = with_method(task, method)
    layout = [f"student.parallel.{axis}" for axis in student]
    shared = train(task, tmp_path / "shared", *settings, *layout, "train.steps=3", ranks=2 if student else 0)
    layout += [f"teacher.parallel.{axis}" for axis in teacher] + [f"teacher.ranks={own}"]
    ranks = (2 if student else 1) + own
    apart = train(task, tmp_path / "apart", *settings, *layout, "train.steps=3", ranks=ranks)
    assert len(apart) == 3
    assert_metrics_agree(apart, shared)
    if not any(teacher):  # nothing is summed in another order
        assert apart == shared


def test_the_teacher_is_evaluated_and_recorded_by_the_students_ranks(task: Task, tmp_path: Path):
    for name, ranks in (("shared", 0), ("apart", 2)):
        overrides = ("teacher.ranks=1",) if ranks else ()
        command = ("train", task.config, f"run_dir={tmp_path / name}", "train.steps=2", "evaluate.max_problems=4")
        recording = (f"teacher.record={tmp_path / name}/grades", "teacher.record_values=fp32")
        commands().run(*command, *recording, *overrides, ranks=ranks).expect_success()
    shared, apart = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("shared", "apart"))
    assert shared == apart and "teacher" in json.dumps(apart)
    replayed = train(task, tmp_path / "replayed", "train.steps=2", f"teacher.recorded_from={tmp_path}/apart/grades")
    assert replayed == steady_metrics(tmp_path / "shared") == steady_metrics(tmp_path / "apart")


# --------------------------------------------------------------------------- ahead, and going on


def lines_of(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.fixture(scope="module")
def unbroken(task: Task, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """A run two batches ahead, with a teacher on the student's rank."""
    return train(task, tmp_path_factory.mktemp("unbroken"), *ASKING, "rollout.ahead=2", "train.steps=12")


AHEAD = (*QUIET, *ASKING, "rollout.ahead=2", "teacher.ranks=1", "train.steps=12")


def until_steps(job: Job, run_dir: Path, steps: int) -> None:
    job.until(lambda: lines_of(run_dir) >= steps)


def test_a_run_ahead_that_is_killed_goes_on_as_if_nothing_had_happened(
    task: Task, unbroken: list[dict[str, Any]], tmp_path: Path
):
    command = ("train", task.config, f"run_dir={tmp_path}", *AHEAD)
    job = commands().start(*command, ranks=2)
    until_steps(job, tmp_path, 3)
    assert job.kill().statuses == (-9, -9)
    done = commands().run(*command, ranks=2).expect_success()
    assert "(2 steps done)" in done.output and "nothing overlaps" not in "".join(done.outputs)
    assert steady_metrics(tmp_path) == unbroken


def test_either_part_may_be_asked_to_stop_and_takes_the_other_along(
    task: Task, unbroken: list[dict[str, Any]], tmp_path: Path
):
    command = ("train", task.config, f"run_dir={tmp_path}", "checkpoint.every=0", *AHEAD)
    # what the teacher has begun on is graded for nobody, which is nothing that it could complain about
    for asked in (0, 1):
        job = commands().start(*command, ranks=2)
        until_steps(job, tmp_path, lines_of(tmp_path) + 1)
        job.signal(job.pids[asked], signal.SIGUSR1)
        outcome = job.wait(60)
        assert outcome.statuses == (75, 75) and "stopped by SIGUSR1 after" in outcome.output
        assert "Error" not in "".join(outcome.outputs)
    commands().run(*command, ranks=2).expect_success()
    assert steady_metrics(tmp_path) == unbroken


@pytest.mark.long  # runs under torchrun are other tests', and teachers with ranks of their own all others of this file
def test_it_runs_under_torchrun(task: Task, tmp_path: Path):
    output = tmp_path / "output"
    run = tmp_path / "run"
    process = torchrun(
        *("train", task.config, f"run_dir={run}", *QUIET, "train.steps=2", "teacher.ranks=1"), ranks=2, output=output
    )
    assert process.wait(timeout=120) == 0, output.read_text()
    assert steady_metrics(run) == train(task, tmp_path / "shared", "train.steps=2")


# --------------------------------------------------------------------------- one side fails


def test_neither_side_outlives_the_other(task: Task, tmp_path: Path):
    command = ("train", task.config, *QUIET, "teacher.ranks=1", "train.steps=2", f"run_dir={tmp_path}/run")
    started = time.monotonic()
    # the student's ranks find fault with the data, while the teacher's are loading
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": 3}\n')
    outcome = commands().run(*command, f"data.prompts={bad}", ranks=2, timeout_s=200)
    assert outcome.statuses[0] == 2 and outcome.statuses[1] != 0
    # the teacher's weights are torn, which only its ranks can see
    torn = shutil.copytree(task.teacher, tmp_path / "torn")
    weights = torn / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    outcome = commands().run(*command, f"teacher.model={torn}", "evaluate.teacher=false", ranks=2, timeout_s=200)
    assert outcome.statuses[1] == 2 and "model.safetensors" in outcome.outputs[1]
    assert time.monotonic() - started < 100


HALVES = RankSplit(student=Layout(), student_ranks=1, teacher=Layout(), teacher_ranks=1)


def lone_teacher(launch: Launch) -> RemoteTeacher:
    """To a student of one rank, for whom one other grades."""
    assert launch.bridge is not None
    facts: dict[str, Any] = {"vocab_size": 5, "temperature": 1.0, "hidden": HiddenKind(3, torch.float32)}
    return RemoteTeacher(HALVES, GroupBuilder().build(Layout()), launch.bridge, launch.device, **facts)


def _left_alone() -> None:
    """Rank 1 waits longer than a message may take, and is gone once it has heard one."""
    launch = join_launch(teacher_ranks=1, timeout_s=2.0)
    assert launch.bridge is not None
    if launch.is_teachers:
        launch.bridge.wait_for(torch.zeros(1), 0)
        os._exit(0)
    time.sleep(4.0)
    launch.bridge.exchange([Transfer(torch.ones(1), 1, sent=True)])()
    teacher = lone_teacher(launch)
    with pytest.raises(EngineError, match="rank 1 of the launch is lost"):
        for _ in range(100):  # the first ones may still be on their way to nobody
            teacher.start(random_packs(1), TeacherRequest())
            time.sleep(0.05)
    teacher.close()


def test_a_teacher_waits_for_orders_as_long_as_it_takes_and_is_missed_when_it_is_gone():
    commands().call(_left_alone, ranks=2)


class _Counting:
    """In place of a teacher's model: says when it begins, and takes its time."""

    graded = 0

    def __init__(self, model: Any, *_: Any, **__: Any) -> None:
        self._send_request = model

    def score(self, *_: Any) -> None:
        _Counting.graded += 1
        self._send_request()
        time.sleep(0.5)


def _withdrawn() -> None:
    """Three orders, of which the first is being graded when the student leaves."""
    launch = join_launch(teacher_ranks=1, timeout_s=30)
    bridge = launch.bridge
    assert bridge is not None
    if launch.is_teachers:
        apart.MegatronTeacher = _Counting  # type: ignore[assignment,misc]
        model: Any = partial(bridge.ask_to_stop, 1)
        assert apart.serve_score_requests(model, HALVES, bridge, on_request=lambda: None)
        assert _Counting.graded == 1
        os._exit(0)
    teacher = lone_teacher(launch)
    pending = [teacher.start(random_packs(1), TeacherRequest()) for _ in range(3)]
    while not bridge.asked_to_stop():
        time.sleep(0.01)
    bridge.withdraw()
    teacher.close()
    assert len(pending) == 3  # till here: what nobody can wait for is not sent


def test_what_a_stopping_student_has_ordered_is_not_graded_any_more():
    commands().call(_withdrawn, ranks=2)


def test_commands_that_do_not_divide_the_ranks_say_so_or_use_all(task: Task, tmp_path: Path):
    settings = (f"run_dir={tmp_path}", "teacher.ranks=1", "evaluate.max_problems=1")
    commands().run("evaluate", task.config, *settings).expect_success()
    outcome = commands().run("score", task.config, *settings, f"teacher.record={tmp_path}/grades")
    assert outcome.status == 2 and "teacher.ranks=1: here all ranks score. Set it to 0." in outcome.output


# --------------------------------------------------------------------------- what the configuration says


@pytest.mark.parametrize(
    ("overrides", "world", "message"),
    [
        (("teacher.ranks=2",), 2, r"leaves no rank to the student: 2 are launched\. Launch 3"),
        (("teacher.ranks=1",), 1, r"1 is launched\. Launch 2"),
        (("teacher.ranks=3", "teacher.parallel.tensor=2"), None, "ranks = 3 cannot be divided .* Set ranks to 4"),
        (("teacher.ranks=1", "teacher.parallel.expert=2"), 2, "ranks = 1 cannot be divided .* Set ranks to 2"),
        (("teacher.ranks=1", "student.parallel.tensor=2"), 4, r"student\.parallel: world size 3 .* and 3 the student"),
        (("teacher.ranks=1", "teacher.engine=vllm"), 2, "engine = 'vllm'"),
        (("teacher.ranks=1", "teacher.recorded_from=."), 2, "would have nothing to do"),
        (("teacher.ranks=-1",), 2, "teacher.ranks"),
    ],
)
def test_a_division_that_cannot_be_is_refused_with_the_rule(
    task: Task, overrides: tuple[str, ...], world: int | None, message: str
):
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        load_config(task.config, overrides, world_size=world)


# --------------------------------------------------------------------------- orders and messages


def random_packs(replicas: int, *, share_prefixes: bool = False) -> list[list[Pack]]:
    generator = np.random.default_rng(3)
    rollouts = []
    for number, length in enumerate((9, 17, 5, 12, 7, 21, 6)):
        rollouts.append(
            Rollout(
                sequence_id=number,
                prompt_index=number,
                token_ids=generator.integers(0, 50, length),
                region_L=single_turn(prompt=3, prefix=number % 2, continuation=length - 3 - number % 2),
                sampling_logprob=np.zeros(length - 3, np.float32),
                model_logprob=np.zeros(length - 3, np.float32),
                finished=True,
            )
        )
    rollouts[3] = replace(rollouts[3], token_ids=np.append(rollouts[0].token_ids, [50, 51, 52]))
    return pack(rollouts, max_tokens=24, multiple_of=8, num_replicas=replicas, share_prefixes=share_prefixes)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("replicas", [1, 2])
def test_an_order_arrives_as_it_was_given(replicas: int, share: bool):
    packs = random_packs(replicas, share_prefixes=share)
    assert {one.row_T is None for part in packs for one in part} == ({True, False} if share else {True})
    spec = TeacherRequest(top_k=5, queries=2, tail_mass=True, end_ids=(3, 1))
    facts = {"vocab_size": 49, "temperature": 0.7}
    found, asked, told = decode_request(encode_request(packs, spec, facts))
    assert asked == spec and told == facts
    assert [len(part) for part in found] == [len(part) for part in packs] and len(packs[0]) > 1
    for a, b in zip((p for part in found for p in part), (p for part in packs for p in part), strict=True):
        assert a.num_valid == b.num_valid and a.num_rows == b.num_rows and a.teacher == b.teacher == ""
        assert (a.row_T is None) == (b.row_T is None)
        if b.row_T is not None:
            np.testing.assert_array_equal(a.row_T, b.row_T)
        for name in ("token_T", "target_T", "position_T", "region_T", "sequence_T", "cu_seqlens", "sequence_ids"):
            one, other = getattr(a, name), getattr(b, name)
            assert one.dtype == other.dtype and np.array_equal(one, other), name
    assert any((p.region_T == Region.PREFIX).any() for part in found for p in part)


def _answers_wait_for_nobody(size: int) -> dict[str, Any]:
    """Rank 0 is a student of one rank; the others are a teacher of two replicas. Two batches, both asked for before
    the first is waited for, and the teacher done with both by then."""
    rank = dist.get_rank()
    store = dist.PrefixStore("bridge", dist.distributed_c10d._get_default_store())
    bridge = CrossWorldLink(store, rank=rank, size=size, timeout_s=30)
    packs = random_packs(1)
    teacher = ReplicaMap(layout=Layout(), num_replicas=size - 1, round_robin=True, groups=None, first_rank=1)
    student = ReplicaMap(layout=Layout(), num_replicas=1, round_robin=False, groups=None)
    held = {}
    for number, one in enumerate(packs[0]):
        if rank == 1 + number % (size - 1):
            held[0, number] = [torch.arange(one.num_valid, dtype=torch.float32)[:, None] + 100 * number]

    def once(factor: float) -> Any:
        mine = {key: [part * factor for part in wire] for key, wire in held.items()}
        blank = lambda rows: [torch.full((rows, 1), torch.nan)]  # noqa: E731
        return carry(packs, mine, source=teacher, target=student, blank=blank, post=bridge)

    pending = [once(1.0), once(-2.0)]
    if rank:
        for wait in pending:
            assert wait() == {}  # sent, although the student has not waited for anything
        store.set(f"done {rank}", "yes")
        return {}
    store.wait([f"done {other}" for other in range(1, size)])
    first, second = (wait() for wait in pending)
    return {
        "valid": [one.num_valid for one in packs[0]],
        "first": {str(number): wire[0] for (_, number), wire in first.items()},
        "second": {str(number): wire[0] for (_, number), wire in second.items()},
    }


def test_signals_of_two_batches_are_sent_before_the_first_is_waited_for():
    found = run_on_ranks(_answers_wait_for_nobody, 3, world_size=3)[0]
    assert len(found["valid"]) > 2
    for number, valid in enumerate(found["valid"]):
        expected = torch.arange(valid, dtype=torch.float32)[:, None] + 100 * number
        assert torch.equal(found["first"][str(number)], expected)
        assert torch.equal(found["second"][str(number)], -2 * expected)


def _too_late() -> str:
    rank = dist.get_rank()
    store = dist.PrefixStore("bridge", dist.distributed_c10d._get_default_store())
    bridge = CrossWorldLink(store, rank=rank, size=2, timeout_s=0.5)
    if rank:
        store.wait(["told"])
        return ""
    wait = bridge.exchange([Transfer(torch.zeros(3), 1, sent=False)])
    with pytest.raises(EngineError, match="rank 1 of the launch is lost or too slow") as caught:
        wait()
    store.set("told", "yes")
    return str(caught.value)


def test_a_message_that_does_not_come_in_time_is_an_error_that_names_the_rank():
    assert "collective_timeout_s" in run_on_ranks(_too_late, world_size=2)[0]
