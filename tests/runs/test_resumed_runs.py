"""Which checkpoint a run goes on from, what it refuses, and when a run that is asked to stop saves: rule by rule.

Whole runs that are killed and asked to stop are in ``test_train_resume``.
"""

from __future__ import annotations

import json
import os
import signal
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest

from megatron_tropd.config.sections import CheckpointConfig
from megatron_tropd.engine import checkpoint
from megatron_tropd.errors import CheckpointError, ConfigError, DataError
from megatron_tropd.report.records import Evaluation, read_evaluations, record_evaluations
from megatron_tropd.train import preemption, resume, session

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
        get_world_size=lambda: 1,
        all_gather_object=lambda objects, own: objects.__setitem__(0, own),
        barrier=lambda: None,
    )
    monkeypatch.setattr(resume, "dist", fake)
    monkeypatch.setattr(checkpoint, "dist", fake)
    monkeypatch.setattr(preemption, "dist", fake)
    monkeypatch.setattr(session, "dist", fake)
    return fake


def left(run_dir: Path, step: int, identity: dict[str, Any] | None = None) -> Path:
    """A checkpoint as far as its state goes."""
    directory = run_dir / "checkpoints" / f"step-{step:08d}"
    directory.mkdir(parents=True)
    state = {"files": {}, "step": step, "run": IDENTITY if identity is None else identity}
    (directory / "complete.json").write_text(json.dumps(state))
    return directory


def start(
    run_dir: Path,
    identity: dict[str, Any] = IDENTITY,
    *,
    steps: int = 9,
    asked: str = "auto",
    accepted: tuple[str, ...] = (),
) -> Path | None:
    section = CheckpointConfig(resume=asked, accept_changes=accepted)
    checkpoint = resume.find_start(section, identity, run_dir=run_dir, steps=steps).checkpoint
    resume.clear_way(run_dir, checkpoint)
    return checkpoint


@pytest.mark.parametrize("refusing", ["check_teacher_recording", "_claim_recording"])
def test_a_recording_that_is_refused_is_refused_before_anything_is_moved(tmp_path, monkeypatch, refusing: str):
    def refuse(*_: Any, **__: Any) -> None:
        raise DataError("holds another run's rollouts")

    left(tmp_path, 2)
    for name in ("read_inputs", "tell_ends", "check_writable", "_agreed_identity"):
        monkeypatch.setattr(session, name, lambda *_, **__: MagicMock())
    for name in ("check_teacher_recording", "_claim_recording"):
        monkeypatch.setattr(session, name, refuse if name == refusing else lambda *_, **__: None)
    section = CheckpointConfig(resume="never")
    config = SimpleNamespace(checkpoint=section, run_dir=tmp_path, train=SimpleNamespace(steps=9))
    with pytest.raises(DataError, match="another run's rollouts"):
        session._train(config, MagicMock(), MagicMock(), MagicMock(), MagicMock())  # type: ignore[arg-type]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints"]


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
    there = IDENTITY | {"train.steps": 5}
    newest = left(tmp_path, 5, there)
    with pytest.warns(UserWarning, match=r"train.steps was 5, is 6") as found:
        assert start(tmp_path, there | {"train.steps": 6, "optimizer.lr": 2e-4}) == newest
    assert "optimizer.lr was 0.0001, is 0.0002; train" in str(found[0].message) and "seed" not in str(found[0].message)


def test_another_number_of_prompts_per_step_is_a_warning(tmp_path):
    newest = left(tmp_path, 4)
    with pytest.warns(UserWarning, match=r"train.prompts_per_step was 5, is 6"):
        assert start(tmp_path, IDENTITY | {"train.prompts_per_step": 6}) == newest


def results(run_dir: Path) -> list[Path]:
    """Everything that a run leaves, besides checkpoints."""
    names = ("metrics.jsonl", "evaluation.json", "samples.jsonl", "report.html", "config.yaml", "wandb_id")
    files = [*(run_dir / name for name in names), run_dir / "tensorboard" / "events"]
    for path in files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    return files


@pytest.mark.parametrize("asked", ["never", "auto"])
def test_a_fresh_run_moves_what_an_earlier_one_left_aside_and_removes_none_of_it(asked, tmp_path, rank, capsys):
    left_there = results(tmp_path)
    if asked == "never":
        left(tmp_path, 4)
    (tmp_path / "notes.txt").write_text("the user's")
    rank.number = 1
    assert start(tmp_path, asked=asked) is None if asked == "never" else True
    assert all(path.exists() for path in left_there)
    rank.number = 0
    assert start(tmp_path, asked=asked) is None
    assert not any(path.exists() for path in left_there) and (tmp_path / "notes.txt").exists()
    kept = tmp_path / "earlier-run"
    assert all((kept / path.relative_to(tmp_path)).read_text() == path.name for path in left_there)
    assert (kept / "checkpoints" / "step-00000004" / "complete.json").exists() == (asked == "never")
    said = capsys.readouterr().out
    assert "held results of an earlier run" in said and "evaluation.json" in said and str(kept) in said

    # a third run in the same place moves the second's beside them
    (tmp_path / "metrics.jsonl").write_text("second")
    start(tmp_path, asked=asked)
    assert (tmp_path / "earlier-run-1" / "metrics.jsonl").read_text() == "second"


def test_a_run_that_goes_on_keeps_its_results_where_they_are(tmp_path, capsys):
    left_there = results(tmp_path)
    left(tmp_path, 4)
    start(tmp_path)
    assert all(path.exists() for path in left_there) and capsys.readouterr().out == ""


def test_going_back_moves_later_checkpoints_aside(tmp_path):
    for step in (2, 4, 6):
        left(tmp_path, step)
    (tmp_path / "metrics.jsonl").write_text("of 6 steps")
    found = start(tmp_path, asked=str(tmp_path / "checkpoints" / "step-00000002"))
    assert found.name == "step-00000002"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    moved = tmp_path / "earlier-run" / "checkpoints"
    assert sorted(path.name for path in moved.iterdir()) == ["step-00000004", "step-00000006"]
    # a copy of what will be cut back to the second step
    assert (moved.parent / "metrics.jsonl").read_text() == (tmp_path / "metrics.jsonl").read_text() == "of 6 steps"


def test_a_run_directory_stands_for_the_newest_checkpoint_in_it(tmp_path):
    left(tmp_path / "a", 2)
    newest = left(tmp_path / "a", 9)
    assert start(tmp_path / "b", asked=str(tmp_path / "a")) == newest


# --------------------------------------------------------------------------- other models, data, tokenizer


KNOWN = IDENTITY | {
    "student.weights": "a" * 64,
    "teacher.weights": "b" * 64,
    "tokenizer.vocabulary": "c" * 64,
    "tokenizer.chat_template": "d" * 64,
    "tokenizer.end_tokens": [1, 7],
    "data.prompts": "9 prompts, 0123",
}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("student.weights", "e" * 64),
        ("teacher.weights", "e" * 64),
        ("tokenizer.vocabulary", "e" * 64),
        ("tokenizer.chat_template", "e" * 64),
        ("tokenizer.end_tokens", [1]),
        ("data.prompts", "9 prompts, 4567"),
        ("method.k", 8),
    ],
)
def test_what_has_the_same_sizes_and_another_content_is_refused_by_name_unless_insisted_on(tmp_path, key, value):
    newest = left(tmp_path, 4, KNOWN)
    with pytest.raises(CheckpointError) as refused:
        start(tmp_path, KNOWN | {key: value})
    assert f"is of another run: {key} " in str(refused.value)
    assert f"checkpoint.accept_changes=[{key}] to resume all the same" in str(refused.value)
    assert "elete" not in str(refused.value) and "remove" not in str(refused.value)
    with pytest.warns(UserWarning, match=key):
        assert start(tmp_path, KNOWN | {key: value}, accepted=(key,)) == newest


def test_nothing_is_insisted_on_that_is_not_there_or_does_not_fit(tmp_path):
    left(tmp_path, 4, KNOWN)
    with pytest.raises(ConfigError, match=r"holds 'teacher', which is nothing .* remembers data.prompts"):
        start(tmp_path, KNOWN, accepted=("teacher",))
    with pytest.raises(ConfigError, match="fit no other"):
        start(tmp_path, KNOWN, accepted=("optimizer.name",))
    with pytest.raises(CheckpointError) as refused:
        start(tmp_path, KNOWN | {"optimizer.name": "sgd"})
    assert "accept_changes" not in str(refused.value)


def test_a_checkpoint_of_an_earlier_version_goes_on_and_says_what_cannot_be_told(tmp_path):
    newest = left(tmp_path, 4, IDENTITY | {"data.prompts": KNOWN["data.prompts"]})
    with pytest.warns(UserWarning, match=r"earlier version, which does not say student.weights, teacher.weights"):
        assert start(tmp_path, KNOWN) == newest


def test_a_checkpoint_that_spells_a_size_the_british_way_is_the_same_run(tmp_path):
    newest = left(tmp_path, 4, IDENTITY | {"student.model": {"normalise_experts": True, "num_layers": 3}})
    now = IDENTITY | {"student.model": {"num_layers": 3, "normalize_experts": True}}
    assert start(tmp_path, now) == newest
    with pytest.raises(CheckpointError, match=r"normalize_experts of student.model was True, is False"):
        start(tmp_path, now | {"student.model": {"num_layers": 3, "normalize_experts": False}})


def test_weights_that_are_not_on_this_machine_are_not_compared(tmp_path):
    newest = left(tmp_path, 4, KNOWN)
    assert start(tmp_path, KNOWN | {"teacher.weights": None}) == newest


# --------------------------------------------------------------------------- torn


def whole(run_dir: Path, step: int) -> Path:
    """A checkpoint with a file in it."""
    directory = left(run_dir, step)
    (directory / "common.pt").write_bytes(b"content")
    record = {"size": 7, "sha256": "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"}  # sha256sum
    state = json.loads((directory / "complete.json").read_text()) | {"files": {"common.pt": record}}
    (directory / "complete.json").write_text(json.dumps(state))
    return directory


def test_a_byte_that_changed_is_a_torn_checkpoint_passed_over_by_name(tmp_path):
    older, newest = whole(tmp_path, 2), whole(tmp_path, 4)
    assert start(tmp_path) == newest
    (newest / "common.pt").write_bytes(b"contenT")
    with pytest.raises(CheckpointError, match=r"step-00000004 is torn: common.pt has other content"):
        start(tmp_path, asked=str(newest))
    with pytest.warns(UserWarning, match=r"step-00000004 is torn: common.pt has other content than was written"):
        assert start(tmp_path) == older


def test_a_large_file_is_read_beside_other_work_and_what_is_torn_then_is_passed_over_all_the_same(
    tmp_path, monkeypatch
):
    older, newest = whole(tmp_path, 2), whole(tmp_path, 4)
    (newest / "common.pt").write_bytes(b"contenT")
    monkeypatch.setattr(checkpoint, "_LARGE_BYTES", 7)
    find = partial(resume.find_start, CheckpointConfig(), IDENTITY, run_dir=tmp_path, steps=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = find()  # nothing has been compared yet
    assert found.checkpoint == newest
    with pytest.warns(UserWarning, match=r"step-00000004 is torn: common.pt has other content than was written"):
        assert resume.confirmed(found, lambda torn: find(torn=torn)) == older
    find = partial(resume.find_start, CheckpointConfig(resume=str(newest)), IDENTITY, run_dir=tmp_path / "b", steps=9)
    with (
        pytest.warns(UserWarning, match=r"step-00000004 is torn"),
        pytest.raises(CheckpointError, match=r"step-00000004 is torn. Name another"),
    ):
        resume.confirmed(find(), lambda torn: find(torn=torn))


def test_a_record_whose_own_bits_have_changed_is_torn_and_one_of_an_earlier_version_is_not(tmp_path):
    directory = left(tmp_path, 4)
    record = directory / "complete.json"
    state = json.loads(record.read_text())
    assert checkpoint.read_state(directory) == state  # neither checksum nor format: as until version 0.1
    signed = checkpoint._signed(state)
    record.write_text(json.dumps(signed))
    assert checkpoint.read_state(directory) == state
    for change in ({"step": 5}, {"format": 3}, {"checksum": "0" * 64}):
        record.write_text(json.dumps(signed | change))
        with pytest.raises(CheckpointError, match="is not a whole checkpoint"):
            checkpoint.read_state(directory)
    for lost in ("format", "checksum"):  # a letter of its name has changed
        record.write_text(json.dumps({key: value for key, value in signed.items() if key != lost}))
        with pytest.raises(CheckpointError, match="is not a whole checkpoint"):
            checkpoint.read_state(directory)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\x00", b"step-00000009", b"../elsewhere"])
def test_a_latest_file_that_names_nothing_is_said_and_passed_over(content, tmp_path):
    newest = left(tmp_path, 4)
    (tmp_path / "checkpoints" / "latest").write_bytes(content)
    with pytest.warns(UserWarning, match="latest names no checkpoint that is there"):
        assert start(tmp_path) == newest


def test_stray_files_and_folders_beside_checkpoints_are_no_checkpoints(tmp_path):
    newest = left(tmp_path, 4)
    for name in ("step-notes.txt", "step-00000009.bak", "step-00000008"):
        (tmp_path / "checkpoints" / name).write_text("")
    (tmp_path / "checkpoints" / "step-by-step").mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert start(tmp_path) == newest


@pytest.mark.parametrize("text", ["[]", "{}", '{"step": 4}', '{"step": 4, "files": {"a": "b"}}', "\x00", "nul"])
def test_a_record_that_is_none_is_one_error(text, tmp_path):
    directory = left(tmp_path, 4)
    (directory / "complete.json").write_text(text)
    with pytest.raises(CheckpointError, match="is not a whole checkpoint"):
        checkpoint.read_state(directory)


def test_only_checkpoints_are_dropped_and_what_the_user_put_there_stays(tmp_path):
    older, noted, newest = (whole(tmp_path, step) for step in (1, 2, 3))
    (noted / "notes.txt").write_text("the user's")
    root = tmp_path / "checkpoints"
    (root / "step-by-step").mkdir()
    (root / "elsewhere").mkdir()
    (root / "step-00000000").symlink_to(root / "elsewhere")
    with pytest.warns(UserWarning) as said:
        checkpoint._drop_others(root, newest, 1)
    assert not older.exists() and newest.exists()
    assert (noted / "common.pt").exists() and (noted / "notes.txt").exists()
    assert (root / "step-by-step").exists() and (root / "step-00000000").is_symlink()
    assert sorted("notes.txt" in str(one.message) for one in said) == [False, True]


def test_a_checkpoint_whose_removal_is_cut_short_is_none_and_its_rest_goes_at_the_next_start(tmp_path, monkeypatch):
    older, newest = whole(tmp_path, 1), whole(tmp_path, 2)
    root = tmp_path / "checkpoints"

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(checkpoint, "remove_files", killed)
        checkpoint._drop_others(root, newest, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert start(tmp_path) == newest and not older.exists()
    assert [path.name for path in root.iterdir() if path != newest] == ["step-00000001.partial"]
    checkpoint.remove_half_done(root)
    assert list(root.iterdir()) == [newest]


def row(model: str, step: int | None) -> Evaluation:
    return Evaluation(
        model=model, step=step, suite="a", accuracy=0.5, low=0.4, high=0.6, problems=9, samples=1, mean_length=7.0
    )


def test_a_restored_run_has_the_batches_the_steps_and_the_evaluations_of_its_checkpoint(monkeypatch, tmp_path):
    restored: list[Any] = []
    run: Any = SimpleNamespace(student="s", trainer=SimpleNamespace(optimization="o"), moving=None, run_dir=tmp_path)
    run.world = SimpleNamespace(is_first=True)
    rows = [
        row("student before", 0),
        row("teacher", None),
        row("student", 4),
        row("student", 5),
        row("student after", 6),
    ]
    record_evaluations(tmp_path, rows)
    batches: Any = SimpleNamespace(restore=lambda *given: restored.append(given))
    monkeypatch.setattr(resume, "load_checkpoint", lambda *given: restored.append(given) or {"step": 4})
    assert resume.restore(run, batches, None) == 0 and not restored
    assert resume.restore(run, batches, Path("c")) == 4
    assert restored == [(Path("c"), "s", "o", None), (Path("c"), 4, {"step": 4})]
    # what the run has measured after that belongs to steps that it takes anew
    assert [one.step for one in read_evaluations(tmp_path)] == [0, None, 4]


# --------------------------------------------------------------------------- asked to stop


@pytest.mark.parametrize(
    ("steps", "first_step", "on_disk", "saves"),
    [(3, 0, (), [3]), (3, 0, (2,), [3]), (3, 0, (3,), []), (3, 3, (), []), (0, 0, (), [])],
    ids=["none yet", "an older one", "just saved", "gone on from it", "nothing learned"],
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
        preemption.leave_if_requested(run, SimpleNamespace(), asked, steps, first_step=first_step)
    assert saved == saves
    asked.agreed = lambda: None
    preemption.leave_if_requested(run, SimpleNamespace(), asked, steps, first_step=first_step)
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
