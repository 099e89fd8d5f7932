"""Rollouts that run ahead of training: which weights wrote what, old log-probs, and a restart that changes nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_tropd.errors import CheckpointError
from megatron_tropd.report.stopwatch import Stopwatch
from megatron_tropd.rollout.engines.recorded import read_rollouts, write_rollouts
from megatron_tropd.storage.checksums import FileRecord
from megatron_tropd.train import rollout_queue as batches
from megatron_tropd.train.hooks import Hooks
from megatron_tropd.types import Rollout, single_turn
from tests.support.run_inputs import Task, assert_metrics_agree, commands, make_task, steady_metrics

QUIET = ("evaluate.prompts=null", "report.samples=0", "checkpoint.keep=9")
TP2 = ("student.parallel.tensor=2", "teacher.parallel.tensor=2")
STEPS = 6


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tmp_path_factory.mktemp("task"))


def train(task: Task, run_dir: Path, *overrides: str, ranks: int = 0) -> str:
    command = ("train", task.config, f"run_dir={run_dir}", f"rollout.record={run_dir}/rollouts", *QUIET, *overrides)
    return commands().run(*command, ranks=ranks).expect_success().output


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def tokens_of(run_dir: Path, step: int) -> list[list[int]]:
    return [rollout.token_ids.tolist() for rollout in read_rollouts(run_dir / "rollouts", step)]


# two minibatches: a batch must be old before the first of a step's two updates; a support of the student's own
LEARNING = ("method.ppo_clip=0.2", "train.minibatches=2", "method.support=union", "optimizer.lr=2.0e-2")


@pytest.fixture(scope="module")
def unbroken(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two batches ahead, and checkpoints after steps 2, 4 and 6."""
    run_dir = tmp_path_factory.mktemp("unbroken")
    output = train(task, run_dir, *LEARNING, *TP2, "rollout.ahead=2", ranks=2)
    assert "rollout.ahead=2 with rollout.engine=megatron" in output
    return run_dir


def test_a_batch_is_written_by_the_weights_of_so_many_steps_before_it(task: Task, unbroken: Path, tmp_path: Path):
    versions = [{r.weight_version for r in read_rollouts(unbroken / "rollouts", step)} for step in range(STEPS)]
    assert versions == [{0}, {0}, {0}, {1}, {2}, {3}]
    rows = steady_metrics(unbroken)
    assert [row["staleness_mean"] for row in rows] == [0, 1, 2, 2, 2, 2]
    assert [row["staleness_max"] for row in rows] == [0, 1, 2, 2, 2, 2]

    # a run that does not learn is at step 0 for ever: its rollouts are what the first weights write
    frozen = (
        "optimizer.name=sgd",
        "optimizer.eps=1e-8",
        "optimizer.lr=1.0e-30",
        "train.steps=4",
        "method.ppo_clip=0.2",
    )
    train(task, tmp_path / "frozen", *frozen)
    for step in range(3):
        assert tokens_of(unbroken, step) == tokens_of(tmp_path / "frozen", step)
    assert tokens_of(unbroken, 3) != tokens_of(tmp_path / "frozen", 3)

    # and what it learns does not depend on how far ahead it samples: the old log-probs are the present ones
    train(task, tmp_path / "frozen ahead", *frozen, "rollout.ahead=1")
    found = steady_metrics(tmp_path / "frozen ahead")
    ages = [(row.pop("staleness_mean"), row.pop("staleness_max")) for row in found]
    assert ages == [(0, 0), (1, 1), (1, 1), (1, 1)]
    assert_metrics_agree(found, steady_metrics(tmp_path / "frozen"))


def test_old_log_probs_are_of_the_weights_that_wrote_the_tokens(unbroken: Path):
    # the sampler has said what it thought of its tokens when it wrote them
    rows = rows_of(unbroken)
    assert max(row["logprob_gap_max"] for row in rows) < 1e-4
    # nothing overlaps in the trainer's own processes; in the last two steps nothing is left to write
    assert all(row["time_rollout_hidden"] == 0.0 and "time_rollout" in row for row in rows)


def resumed(unbroken: Path, run_dir: Path, step: int) -> Path:
    """A run directory as a kill after ``step`` steps and a checkpoint leaves it."""
    name = f"step-{step:08d}"
    shutil.copytree(unbroken / "checkpoints" / name, run_dir / "checkpoints" / name)
    (run_dir / "checkpoints" / "latest").write_text(name)
    shutil.copy(unbroken / "metrics.jsonl", run_dir / "metrics.jsonl")
    return run_dir


def test_a_run_goes_on_with_the_batches_that_older_weights_had_sampled(task: Task, unbroken: Path, tmp_path: Path):
    ahead = unbroken / "checkpoints" / "step-00000004" / "ahead"
    assert sorted(path.name for path in ahead.iterdir()) == [
        *(f"scores-0000000{step}-00000.npz" for step in (4, 5)),
        *(f"step-0000000{step}.npz" for step in (4, 5)),
    ]
    # two stages: the first has no scores; two replicas: their packs are others, and each has some of the sequences
    stages = ("student.parallel.pipeline=2", "teacher.parallel.pipeline=2")
    for name, layout, files in (("stages", stages, 1), ("replicas", (), 2)):
        run_dir = resumed(unbroken, tmp_path / name, 2)
        output = train(task, run_dir, *LEARNING, *layout, "rollout.ahead=2", ranks=2)
        assert "(2 steps done)" in output and "other settings" not in output
        assert_metrics_agree(steady_metrics(run_dir), steady_metrics(unbroken))
        assert len(list((run_dir / "checkpoints/step-00000004/ahead").glob("scores-00000004-*.npz"))) == files


def test_a_run_killed_while_it_has_batches_ahead_ends_like_an_unbroken_one(task: Task, unbroken: Path, tmp_path: Path):
    settings = (*QUIET, *LEARNING, *TP2, "rollout.ahead=2", f"rollout.record={tmp_path}/rollouts")
    command = ("train", task.config, f"run_dir={tmp_path}", *settings)

    def lines() -> int:
        path = tmp_path / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    job = commands().start(*command, ranks=2)
    job.until(lambda: lines() == 1)
    assert job.kill().statuses == (-9, -9)
    job = commands().start(*command, ranks=2)
    job.until(lambda: lines() == 3)
    job.kill()
    assert "(2 steps done)" in commands().run(*command, ranks=2).expect_success().output
    assert steady_metrics(tmp_path) == steady_metrics(unbroken)


def test_scores_of_other_rollouts_are_refused_by_name(task: Task, unbroken: Path, tmp_path: Path):
    run_dir = resumed(unbroken, tmp_path, 4)
    scores = run_dir / "checkpoints" / "step-00000004" / "ahead" / "scores-00000005-00000.npz"
    with np.load(scores) as stored:
        arrays = {name: stored[name] for name in stored.files}
    size = scores.stat().st_size
    np.savez(scores, **{**arrays, "key": arrays["key"] + 1})  # type: ignore[arg-type]
    assert scores.stat().st_size == size
    # as a whole checkpoint says it, or it would be passed over for one that is
    complete = scores.parents[1] / "complete.json"
    state = json.loads(complete.read_text())
    state["files"]["ahead/scores-00000005-00000.npz"] = FileRecord.of(scores).as_json()
    for ours in ("format", "checksum"):  # as versions before 0.2 wrote it: only the files' own would be looked at
        state.pop(ours, None)
    complete.write_text(json.dumps(state))
    command = ("train", task.config, f"run_dir={run_dir}", *QUIET, *LEARNING, "rollout.ahead=2")
    outcome = commands().run(*command)
    assert outcome.status == 2 and "lacks scores of batch 5" in outcome.output


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("method.name=tropd",), "k1_pg has no importance ratio"),
        (("method.trusted=k2", "method.ppo_clip=0.2"), "k2 has no importance ratio"),
        (("method.outlier_gradient=pg_scalar", "method.ppo_clip=0.2"), "fkl_pg_scalar has no importance ratio"),
    ],
    ids=["policy gradient", "direct estimator", "scalar"],
)
def test_a_method_that_takes_rollouts_for_new_is_refused_old_ones(task: Task, settings: tuple[str, ...], message: str):
    from megatron_tropd.config.loading import load_config
    from megatron_tropd.errors import ConfigError
    from megatron_tropd.setup.validate import check_ahead, check_method

    config = load_config(task.config, [*settings, "rollout.ahead=1", "rollout.engine=vllm_server", _URLS])
    with pytest.raises(ConfigError, match=message):
        check_ahead(config, check_method(config))


_URLS = "rollout.vllm_server.urls=[http://127.0.0.1:8100]"


def test_versions_of_single_tokens_survive_a_recording(tmp_path: Path):
    def rollout(number: int, versions: list[int]) -> Rollout:
        count = len(versions)
        return Rollout(
            sequence_id=number,
            prompt_index=number,
            token_ids=np.arange(3 + count),
            region_L=single_turn(prompt=2, prefix=1, continuation=count),
            sampling_logprob=np.zeros(count, np.float32),
            model_logprob=np.zeros(count, np.float32),
            finished=False,
            weight_version=versions[0] if versions else 4,
            token_versions=np.array(versions) if len(set(versions)) > 1 else None,
        )

    write_rollouts(tmp_path, 0, [rollout(0, [3, 3]), rollout(1, [3, 4, 4]), rollout(2, [])])
    first, second, third = read_rollouts(tmp_path, 0)
    assert first.token_versions is None and third.token_versions is None
    assert second.token_versions is not None and second.token_versions.tolist() == [3, 4, 4]


def test_a_part_within_a_part_is_counted_once(monkeypatch: pytest.MonkeyPatch):
    now = iter([0.0, 1.0, 3.0, 6.0, 7.0, 9.0, 14.0, 20.0, 30.0])  # reset; train, rollout in it twice; total
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    watch = Stopwatch()
    watch.reset()
    with watch("train"):
        with watch("rollout"):
            pass
        with watch("rollout"):
            pass
    # by hand: from 1 to 14, of which 3 to 6 and 7 to 9 are the rollouts'
    assert watch.parts == {"rollout": 5.0, "train": 8.0}
    assert watch.metrics() == {"time_train": 8.0, "time_rollout": 5.0, "time_step": 20.0, "time_other": 7.0}


class Sampling:
    """A sampler that writes at once or, as servers do, while something else is done."""

    def __init__(self, collected: list[int]) -> None:
        self._collected = collected

    def generate(self, requests: Any, params: Any, *, seed: int, step: int) -> list[Rollout]:
        return []


class Serving(Sampling):
    def start(self, requests: Any, params: Any, *, seed: int, step: int) -> Any:
        def collect() -> list[Rollout]:
            self._collected.append(step)
            return []

        return SimpleNamespace(collect=collect, ended_at=None)


@pytest.mark.parametrize(("sampler", "scored"), [(Sampling, [0, 1, 2]), (Serving, [0])])
def test_what_is_written_is_handed_to_the_teacher_before_it_is_learnt_from_and_nothing_is_waited_for(
    monkeypatch: pytest.MonkeyPatch, sampler: type[Sampling], scored: list[int]
):
    handed: list[int] = []
    collected: list[int] = []
    rollout = SimpleNamespace(ahead=2, record=None, guided_per_prompt=0, samples_per_prompt=1, max_new_tokens=1)
    train = SimpleNamespace(steps=9, prompts_per_step=1)
    run: Any = SimpleNamespace(
        rollout=rollout,
        train=train,
        seed=0,
        prompts=SimpleNamespace(at=list),
        method=SimpleNamespace(guided=False),
        sampler=sampler(collected),
    )
    for name in ("make_requests", "sampling_params", "with_teachers"):
        monkeypatch.setattr(batches, name, lambda *_, **__: [])
    monkeypatch.setattr(batches, "score_rollouts", lambda *_, **__: handed.append(len(handed)))
    watch, ahead, hooks = Stopwatch(), batches.RolloutQueue(run), Hooks()
    ahead.start(0, watch=watch)
    batch = ahead.get(0, watch=watch, hooks=hooks)
    assert batch.prompts == [0]
    assert handed == scored
    assert collected == ([0] if sampler is Serving else [])
    ahead.wait_for_all(step=0, watch=watch, hooks=hooks)  # before the weights change
    assert handed == [0, 1, 2]
    assert [ahead.get(n, watch=watch, hooks=hooks).prompts for n in range(3)] == [[0], [1], [2]]


# --------------------------------------------------------------------------- resumed with other prompts per step


def walking(prompts_per_step: int, *, ahead: int = 2, steps: int = 9) -> Any:
    """A run whose prompts are their places, as far as a queue that nothing is sampled from looks at it."""
    return SimpleNamespace(
        rollout=SimpleNamespace(ahead=ahead),
        train=SimpleNamespace(steps=steps, prompts_per_step=prompts_per_step),
        prompts=SimpleNamespace(at=list),
        method=SimpleNamespace(guided=False),
        world=SimpleNamespace(student=None),
        student=SimpleNamespace(device=None),
        sampler=SimpleNamespace(generate=lambda *_, **__: []),
        seed=0,
    )


@pytest.mark.parametrize(
    ("written", "asked"),
    # the batches 4 and 5 had been written ahead, for five prompts each: they keep them
    [((4, 5), {4: range(20, 25), 5: range(25, 30), 6: range(30, 33)}), ((), {4: range(20, 23), 6: range(26, 29)})],
    ids=["ahead", "none"],
)
def test_a_resumed_queue_asks_the_next_prompts_and_what_was_written_ahead_keeps_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, written: tuple[int, ...], asked: dict[int, range]
):
    state = {"run": {"train.prompts_per_step": 5}, **json.loads(json.dumps(batches.RolloutQueue(walking(5)).state()))}
    (tmp_path / "ahead").mkdir()
    for number in written:
        (tmp_path / "ahead" / f"scores-{number:08d}-00000.npz").touch()
    for name in ("read_rollouts", "with_teachers", "packs_of", "make_requests", "sampling_params"):
        monkeypatch.setattr(batches, name, lambda *_, **__: [])
    for name in ("scored_rollouts", "_Stored", "score_rollouts"):
        monkeypatch.setattr(batches, name, lambda *_, **__: None)
    queue = batches.RolloutQueue(walking(3))
    queue.restore(tmp_path, 4, state)
    rollout = queue._run.rollout
    rollout.guided_per_prompt, rollout.samples_per_prompt, rollout.max_new_tokens, rollout.record = 0, 1, 1, None
    watch, hooks = Stopwatch(), Hooks()
    queue.start(4, watch=watch)
    assert {n: queue.get(n, watch=watch, hooks=hooks).prompts for n in asked} == {n: [*r] for n, r in asked.items()}
    # the next checkpoint says it all, to a run that changes it once more
    again = batches.RolloutQueue(walking(4, ahead=0))
    again.restore(tmp_path, 7, json.loads(json.dumps(queue.state())))
    again._run.rollout = rollout
    again.start(7, watch=watch)
    last = asked[6].stop
    assert again.get(7, watch=watch, hooks=hooks).prompts == [*range(last, last + 4)]


def test_an_epoch_over_a_change_of_prompts_per_step_asks_every_prompt_once(task: Task, tmp_path: Path):
    ten = tmp_path / "ten.jsonl"
    ten.write_text("".join(task.prompts.read_text().splitlines(keepends=True)[:10]))
    few = (f"data.prompts={ten}", "rollout.max_new_tokens=2", "checkpoint.every=2")
    train(task, tmp_path, *few, "train.steps=2", "train.prompts_per_step=3")
    said = train(task, tmp_path, *few, "train.steps=4", "train.prompts_per_step=2")
    assert "train.prompts_per_step was 3, is 2" in said
    asked = [{one.prompt_index for one in read_rollouts(tmp_path / "rollouts", step)} for step in range(4)]
    assert [len(rows) for rows in asked] == [3, 3, 2, 2] and set().union(*asked) == set(range(10))


def test_a_checkpoint_that_does_not_say_which_prompts_its_steps_had_is_refused(tmp_path: Path):
    earlier = {"run": {"train.prompts_per_step": 5}}  # of a version that counted steps
    queue = batches.RolloutQueue(walking(5))
    queue.restore(tmp_path, 4, earlier)
    assert queue.state() == {"prompts": ((0, 0, 5),)}
    with pytest.raises(CheckpointError, match="does not say which prompts its steps have had"):
        queue.restore(tmp_path, 4, earlier | {"prompts": [[0, "x", 5]]})
