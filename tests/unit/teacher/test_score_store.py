"""The files that recorded grades lie in, and ``tropd score``, which writes them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_tropd.convert.hf import weights_fingerprint
from megatron_tropd.errors import DataError
from megatron_tropd.teacher.store import Grades, Store, hash64, id_type, sequence_key, write_part
from tests.support.run_inputs import (
    TEACHER,
    Task,
    assert_metrics_agree,
    commands,
    make_task,
    save_model,
    steady_metrics,
)

QUIET = ("report.samples=0", "report.html=false", "evaluate.prompts=null", "checkpoint.every=0", "train.steps=3")


def grades(number: int, *, rows: int = 7, k: int = 5, vocab_size: int = 300, asked: int = 0) -> Grades:
    rng = np.random.default_rng(number)
    logprob = -np.sort(rng.exponential(4, (rows, k)).astype(np.float32), axis=1)
    return Grades(
        key=sequence_key(np.arange(number, number + rows)),
        first=number,
        pack=17,
        asked=asked,
        fields={
            "logprob": logprob[:, 0].copy(),
            "topk_ids": rng.integers(0, vocab_size, (rows, k)),
            "topk_logprob": logprob,
            "logtail": np.where(np.arange(rows) == 2, -np.inf, -9.0).astype(np.float32),
            "hidden.bf16": rng.integers(-(2**15), 2**15, (rows, 3)).astype(np.int16),
        },
    )


@pytest.mark.parametrize("vocab_size", [200, 256, 257, 65_536, 65_537, 2**32, 2**40])
def test_grades_come_back_as_they_were_written_with_ids_no_larger_than_they_need(tmp_path: Path, vocab_size: int):
    items = [grades(number, rows=3 + number, vocab_size=vocab_size) for number in range(4)]
    path = write_part(tmp_path, items, vocab_size=vocab_size, values="fp32")
    store = Store(tmp_path)
    assert len(store) == 4 and path is not None and list(tmp_path.iterdir()) == [path]
    for item in items:
        (place,) = store.find(item.key)
        assert (place.first, place.rows, place.pack, place.asked) == (item.first, 3 + item.first, 17, 0)
        for name, array in item.fields.items():
            found, bits = store.read(place, name.removesuffix(".bf16"))
            assert bits == name.endswith(".bf16") and store.width(place, name.removesuffix(".bf16")) == (
                array.shape[1] if array.ndim == 2 else 1
            )
            np.testing.assert_array_equal(found, array)
            assert found.dtype == (id_type(vocab_size) if name.endswith("_ids") else array.dtype)
    expected = {200: 1, 256: 1, 257: 2, 65_536: 2, 65_537: 4, 2**32: 4, 2**40: 8}[vocab_size]
    assert id_type(vocab_size).itemsize == expected
    assert store.find(sequence_key(np.arange(99))) == [] and sequence_key(np.arange(99)) not in store
    assert store.width(place, "entropy") is None
    assert write_part(tmp_path, [], vocab_size=vocab_size, values="fp32") is None


def test_half_precision_costs_half_a_unit_in_the_eleventh_digit(tmp_path: Path):
    item = grades(1, rows=400, k=64)
    item.fields["logprob"][:2] = (-70_000.0, -1e-6)  # type: ignore[index]
    write_part(tmp_path, [item], vocab_size=300, values="fp16")
    store = Store(tmp_path)
    (place,) = store.find(item.key)
    for name in ("logprob", "topk_logprob"):
        found, exact = store.read(place, name)[0].astype(np.float32), item.fields[name]
        assert np.isfinite(found).all()
        usual = exact > -60_000
        # 11 significant binary digits; below 2^-14 steps of 2^-24
        np.testing.assert_allclose(found[usual], exact[usual], rtol=2**-11, atol=2**-25)
    tail = store.read(place, "logtail")[0]
    assert np.isneginf(tail[2]) and (np.delete(tail, 2) == -9.0).all()
    assert store.read(place, "hidden")[0].dtype == np.int16, "hidden states are left as they are"


def test_one_field_of_one_sequence_is_read_without_the_others(tmp_path: Path):
    items = [grades(number, rows=50, k=64) for number in range(20)]
    path = write_part(tmp_path, items, vocab_size=300, values="fp32")
    assert path is not None
    store = Store(tmp_path)
    (place,) = store.find(items[7].key)
    before = store.read(place, "logprob")[0]
    # every blob but this one's is destroyed
    entry = store._parts[0].index[place.row]
    begin = store._parts[0].start + int(entry["logprob:at"])
    kept = path.read_bytes()[begin : begin + int(entry["logprob:size"])]
    with path.open("r+b") as file:
        file.seek(store._parts[0].start)
        file.write(os.urandom(path.stat().st_size - store._parts[0].start))
        file.seek(begin)
        file.write(kept)
    np.testing.assert_array_equal(store.read(place, "logprob")[0], before)
    for name, row in (("topk_logprob", 7), ("logprob", 8)):
        with pytest.raises(DataError, match="is torn or not a recording: a checksum does not match"):
            store.read(store.find(items[row].key)[0], name)


def test_a_part_torn_anywhere_is_one_error(tmp_path: Path):
    path = write_part(tmp_path, [grades(number) for number in range(3)], vocab_size=300, values="fp16")
    assert path is not None
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[whole.index(b"}") + 300] ^= 1
    for content in [b"", b"nonsense", bytes(flipped), whole + b"x", *(whole[:end] for end in range(1, len(whole), 41))]:
        path.write_bytes(content)
        with pytest.raises(DataError, match="is torn or not a recording: "):
            store = Store(tmp_path)
            for number in range(3):
                store.read(store.find(grades(number).key)[0], "topk_ids")


def test_what_is_written_twice_is_there_once_and_a_sequence_keeps_every_occasion(tmp_path: Path):
    for _ in range(2):
        write_part(tmp_path, [grades(1), grades(2)], vocab_size=300, values="fp16")
    assert len(list(tmp_path.iterdir())) == 1
    write_part(tmp_path, [grades(1, asked=5)], vocab_size=300, values="fp16")
    assert sorted(place.asked for place in Store(tmp_path).find(grades(1).key)) == [0, 5]


def test_hashes_tell_sequences_apart():
    assert sequence_key(np.array([1, 2])) != sequence_key(np.array([2, 1])) != sequence_key(np.array([1]))
    assert len(sequence_key(np.array([], np.int64))) == 16
    assert hash64(np.zeros((2, 3))) != hash64(np.zeros((3, 2)))


# --------------------------------------------------------------------------- tropd score


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def rollouts(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a live teacher, and its rollouts."""
    home = tmp_path_factory.mktemp("live")
    settings = (*QUIET, f"run_dir={home}", f"rollout.record={home}/rollouts")
    commands().run("train", task.config, *settings).expect_success()
    return home


def test_a_run_on_grades_of_recorded_rollouts_is_the_live_run_step_by_step(task: Task, rollouts: Path, tmp_path: Path):
    replay = ("rollout.engine=recorded", f"rollout.recorded_from={rollouts}/rollouts", *QUIET)
    errors = {}
    for values in ("fp32", "fp16"):
        target = tmp_path / f"grades-{values}"
        # scored in packs of another size and under another layout than it is trained on
        scoring = (f"teacher.record={target}", f"teacher.record_values={values}", "train.pack_tokens=97")
        outcome = commands().run("score", task.config, *replay, *scoring, ranks=2).expect_success()
        assert " sequences graded (" in outcome.output and "tokens/s" in outcome.output
        run_dir = tmp_path / f"run-{values}"
        commands().run(
            "train", task.config, *replay, f"teacher.recorded_from={target}", f"run_dir={run_dir}"
        ).expect_success()
        found, expected = steady_metrics(run_dir), steady_metrics(rollouts)
        if values == "fp32":
            assert_metrics_agree(found, expected)
        errors[values] = max(abs(a["loss"] - b["loss"]) for a, b in zip(found, expected, strict=True))
    assert errors["fp32"] < 1e-5 < 1e-2 > errors["fp16"] > 0
    again = commands().run("score", task.config, *replay, f"teacher.record={tmp_path}/grades-fp32").expect_success()
    assert "0 sequences graded (27 were so before), 0 tokens" in again.output


def test_the_responses_in_the_data_are_graded(task: Task, tmp_path: Path):
    outcome = commands().run("score", task.config, f"teacher.record={tmp_path}/grades").expect_success()
    assert "11 sequences graded (0 were so before)" in outcome.output
    facts = json.loads((tmp_path / "grades" / "recording.json").read_text())
    assert facts["teacher weights"] == weights_fingerprint(task.teacher) and len(Store(tmp_path / "grades")) == 11


def test_grades_of_another_teacher_or_tokenizer_are_refused(task: Task, tmp_path: Path):
    commands().run("score", task.config, f"teacher.record={tmp_path}/grades").expect_success()
    other = save_model(tmp_path / "other", TEACHER, tied=False, seed=3)
    changed = tmp_path / "recording.json"
    for name, change in (("weights", (f"teacher.model={other}",)), ("tokenizer", ())):
        if name == "tokenizer":
            facts = json.loads((tmp_path / "grades" / "recording.json").read_text())
            changed.write_text(json.dumps({**facts, "tokenizer": "another"}))
            shutil.copy(changed, tmp_path / "grades" / "recording.json")
        run = commands().run(
            "train", task.config, *QUIET, *change, f"teacher.recorded_from={tmp_path}/grades", f"run_dir={tmp_path}/run"
        )
        assert run.status == 2 and f"was recorded with {'teacher weights' if change else 'tokenizer'} '" in run.output


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ((), "teacher.record=null: give the directory to write grades to."),
        (("teacher.record=GRADES", "method.support=union"), "method.support=union asks the teacher about ids that"),
    ],
)
def test_what_cannot_be_scored_is_one_error(task: Task, tmp_path: Path, changes: tuple[str, ...], message: str):
    settings = [change.replace("GRADES", f"{tmp_path}/grades") for change in changes]
    outcome = commands().run("score", task.config, *settings)
    assert outcome.status == 2 and message in outcome.output.replace("\n", " ")


def test_the_fingerprint_of_weights_is_of_the_weights(task: Task, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(task.teacher, copy)
    assert weights_fingerprint(copy) == weights_fingerprint(task.teacher) != weights_fingerprint(task.student)
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(bytes(content))
    assert weights_fingerprint(copy) != weights_fingerprint(task.teacher)
    (copy / "model.safetensors").unlink()
    assert weights_fingerprint(copy) is None
