"""Which checkpoint a run goes on from, what it refuses, and when a run that is asked to stop saves: rule by rule.

Whole runs that are killed and asked to stop are in ``test_train_resume``.
"""

from __future__ import annotations

import json
import os
import signal
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_tropd.config.sections import CheckpointConfig
from megatron_tropd.train import preemption
from megatron_tropd.train import resume
from megatron_tropd.errors import CheckpointError

IDENTITY: dict[str, Any] = {
    "seed": 7,
    "student.model": {"layers": 3, "width": 36},
    "train.prompts_per_step": 5,
    "optimizer.lr": 1e-4,
    "optimizer.name": "adam",
    "method.k": 7,
    "data.sources": (("a", 1.0),),
}


@pytest.fixture(autouse=True)
def rank(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """One rank, whose number may be changed; what a broadcast or reduction brings is what it was given."""
    fake = SimpleNamespace(
        number=0,
        get_rank=lambda: fake.number,
        broadcast_object_list=lambda objects, src: None,
        broadcast=lambda tensor, src: None,
    )
    monkeypatch.setattr(resume, "dist", fake)
    monkeypatch.setattr(preemption, "dist", fake)
    return fake


def left(run_dir: Path, step: int, identity: dict[str, Any] | None = None) -> Path:
    """A checkpoint as far as its state goes."""
    directory = run_dir / "checkpoints" / f"step-{step:08d}"
    directory.mkdir(parents=True)
    state = {"files": {}, "step": step, "run": IDENTITY if identity is None else identity}
    (directory / "complete.json").write_text(json.dumps(state))
    return directory


def start(
    run_dir: Path, identity: dict[str, Any] = IDENTITY, *, steps: int = 9, asked: str = "auto"
) -> Path | None:
    return resume.find_start(CheckpointConfig(resume=asked), identity, run_dir=run_dir, steps=steps)


# --------------------------------------------------------------------------- which checkpoint


def test_the_newest_checkpoint_is_gone_on_from_without_a_word(tmp_path):
    assert start(tmp_path) is None
    left(tmp_path, 2)
    newest = left(tmp_path, 9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert start(tmp_path) == newest  # tuples of the identity come back as lists; 9 of 9 steps are a finished run
    assert start(tmp_path / "other", asked=str(tmp_path / "checkpoints")) == newest
    assert start(tmp_path, asked=str(tmp_path / "checkpoints" / "step-00000002")).name == "step-00000002"


def test_a_checkpoint_asked_for_must_be_there(tmp_path):
    (tmp_path / "step-00000001").mkdir()  # a torn one
    with (
        pytest.warns(UserWarning, match="skipping a torn"),
        pytest.raises(CheckpointError, match="no whole checkpoint"),
    ):
        start(tmp_path, asked=str(tmp_path))
    with pytest.raises(CheckpointError, match="is not a whole checkpoint"):
        start(tmp_path, asked=str(tmp_path / "gone"))


def test_more_steps_than_asked_for_are_refused(tmp_path):
    left(tmp_path, 9)
    with pytest.raises(CheckpointError, match=r"has 9 steps behind it, train.steps=8 asks for fewer"):
        start(tmp_path, steps=8)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 8}, "seed was 7, is 8"),
        ({"method.k": None}, "method.k was 7, is None"),
        ({"method.new": 1}, "method.new was None, is 1"),  # known to one side only
        ({"optimizer.name": "sgd"}, "optimizer.name was 'adam', is 'sgd'"),
        ({"student.model": {"layers": 3, "width": 40}}, "of another run: width of student.model was 36, is 40. "),
    ],
)
def test_another_run_is_refused_by_what_differs(tmp_path, change, said):
    left(tmp_path, 4)
    with pytest.raises(CheckpointError) as caught:
        start(tmp_path, IDENTITY | change)
    assert said in str(caught.value)


def test_a_setting_that_was_dropped_is_a_difference_too(tmp_path):
    left(tmp_path, 4, IDENTITY | {"method.old": 1})
    with pytest.raises(CheckpointError, match=r"method.old was 1, is None"):
        start(tmp_path)


def test_other_settings_of_the_same_run_are_a_warning(tmp_path):
    newest = left(tmp_path, 4)
    with pytest.warns(UserWarning, match=r"train.prompts_per_step was 5, is 6") as found:
        assert start(tmp_path, IDENTITY | {"train.prompts_per_step": 6, "optimizer.lr": 2e-4}) == newest
    assert "optimizer.lr was 0.0001, is 0.0002; train" in str(found[0].message) and "seed" not in str(found[0].message)


def test_starting_over_removes_what_would_be_mixed_in_and_only_once(tmp_path, rank):
    left(tmp_path, 4)
    mixed = [tmp_path / name for name in ("evaluation.json", "samples.jsonl")]
    for path in mixed:
        path.write_text("")
    rank.number = 1
    assert start(tmp_path, asked="never") is None and all(path.exists() for path in mixed)
    rank.number = 0
    assert start(tmp_path, asked="never") is None
    assert not any(path.exists() for path in mixed) and not list((tmp_path / "checkpoints").iterdir())


def test_a_restored_run_has_the_batches_and_the_steps_of_its_checkpoint(monkeypatch):
    restored: list[Any] = []
    run: Any = SimpleNamespace(student="s", trainer=SimpleNamespace(optimization="o"))
    run.world = SimpleNamespace(is_first=False)
    batches: Any = SimpleNamespace(restore=lambda *given: restored.append(given))
    monkeypatch.setattr(resume, "load_checkpoint", lambda *given: restored.append(given) or {"step": 4})
    assert resume.restore(run, batches, None) == 0 and not restored
    assert resume.restore(run, batches, Path("c")) == 4
    assert restored == [(Path("c"), "s", "o"), (Path("c"), 4)]


# --------------------------------------------------------------------------- asked to stop


@pytest.mark.parametrize(
    ("steps", "first_step", "on_disk", "saves"),
    [(3, 0, (), [3]), (3, 0, (2,), [3]), (3, 0, (3,), []), (3, 3, (), []), (0, 0, (), [])],
    ids=["none yet", "an older one", "just saved", "gone on from it", "nothing learnt"],
)
def test_a_run_asked_to_stop_saves_unless_these_steps_are_saved(
    tmp_path, monkeypatch, steps, first_step, on_disk, saves
):
    for step in on_disk:
        left(tmp_path, step)
    saved: list[int] = []
    monkeypatch.setattr(preemption, "save", lambda run, batches, step: saved.append(step))
    run: Any = SimpleNamespace(
        run_dir=tmp_path,
        checkpoint=CheckpointConfig(resume="never"),
        train=SimpleNamespace(steps=9),
        world=SimpleNamespace(is_first=True),
    )
    asked: Any = SimpleNamespace(agreed=lambda: signal.SIGTERM)
    with pytest.raises(preemption.Preempted, match=rf"stopped by SIGTERM after {steps} of 9 .*checkpoint.resume=auto"):
        preemption.leave_if_asked(run, SimpleNamespace(), asked, steps, first_step=first_step)
    assert saved == saves
    asked.agreed = lambda: None
    preemption.leave_if_asked(run, SimpleNamespace(), asked, steps, first_step=first_step)
    assert saved == saves


def test_a_signal_is_remembered_while_deferred_and_ends_the_process_otherwise(monkeypatch):
    left_with: list[int] = []
    monkeypatch.setattr(os, "_exit", left_with.append)
    before = [signal.getsignal(number) for number in preemption.SIGNALS]
    with preemption.StopRequest() as stop:
        with stop.deferred():
            signal.raise_signal(signal.SIGUSR1)
            signal.raise_signal(signal.SIGTERM)
            assert left_with == [] and stop._heard == signal.SIGUSR1  # the first is what is told
        assert left_with == [75]  # nobody agreed on it before the block ended
        signal.raise_signal(signal.SIGTERM)
        assert left_with == [75, 75]
    assert [signal.getsignal(number) for number in preemption.SIGNALS] == before
