"""The Parquet files that a teacher's scores lie in, and ``tropd score``, which writes them."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from megatron_tropd.convert.hf import weights_fingerprint
from megatron_tropd.errors import DataError
from megatron_tropd.teacher import schema
from megatron_tropd.teacher.engines.recorded import fitted
from megatron_tropd.teacher.old_recordings import convert_recording
from megatron_tropd.teacher.recording import check_facts, read_facts, write_facts
from megatron_tropd.teacher.schema import Field, TeacherRequest
from megatron_tropd.teacher.store import SequenceScores, Store, hash64, sequence_key, write_part
from megatron_tropd.types import TeacherOutputs
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
OLD = Path(__file__).parent / "recording_format_2"  # written by the version before Parquet


def scores(number: int, *, rows: int = 7, k: int = 5, vocab_size: int = 300, queries: int = 0) -> SequenceScores:
    rng = np.random.default_rng(number)
    logprob_NK = -np.sort(rng.exponential(4, (rows, k)).astype(np.float32), axis=1)
    tail_N = np.where(np.arange(rows) == 2, -np.inf, -9.0).astype(np.float32)
    return SequenceScores(
        key=sequence_key(np.arange(number, number + rows)),
        position=number + np.arange(rows),
        token_ids=rng.integers(0, vocab_size, rows),
        pack=17,
        queries=queries,
        fields={
            "logprob": torch.from_numpy(logprob_NK[:, 0].copy()),
            "topk_ids": torch.from_numpy(rng.integers(0, vocab_size, (rows, k))),
            "topk_logprob": torch.from_numpy(logprob_NK),
            "logtail": torch.from_numpy(tail_N),
            "hidden": torch.from_numpy(rng.normal(size=(rows, 3))).bfloat16(),
        },
    )


@pytest.mark.parametrize("vocab_size", [200, 65_537, 2**31, 2**31 + 1, 2**40])
def test_scores_come_back_as_they_were_written(tmp_path: Path, vocab_size: int):
    items = [scores(number, rows=3 + number, vocab_size=vocab_size) for number in range(4)]
    path = write_part(tmp_path, items, vocab_size=vocab_size, values="fp32")
    store = Store(tmp_path)
    assert len(store) == 4 and path is not None and list(tmp_path.iterdir()) == [path]
    for number, item in enumerate(items):
        (place,) = store.find(item.key)
        assert (place.first, place.rows, place.pack, place.queries) == (number, 3 + number, 17, 0)
        assert store.columns(place) == {"logprob": 1, "topk_ids": 5, "topk_logprob": 5, "logtail": 1, "hidden": 3}
        np.testing.assert_array_equal(store.positions(place), item.position)
        for name, value in item.fields.items():
            found = store.read(place, name)
            assert found.dtype == value.dtype and torch.equal(found, value), name
    assert store.find(sequence_key(np.arange(99))) == []
    assert write_part(tmp_path, [], vocab_size=vocab_size, values="fp32") is None


def test_pandas_opens_a_part_with_a_row_per_prediction(tmp_path: Path):
    pytest.importorskip("pandas")
    import pandas

    item = scores(3, rows=11)
    path = write_part(tmp_path, [item, scores(4)], vocab_size=300, values="fp16")
    frame = pandas.read_parquet(path)
    assert list(frame.columns) == ["sequence", "position", "token_id", *item.fields]
    mine = frame[frame.sequence == item.key.hex()]
    assert mine.position.tolist() == list(range(3, 14)) and item.token_ids is not None
    assert mine.token_id.tolist() == item.token_ids.tolist()
    np.testing.assert_array_equal(np.stack(mine.topk_ids), item.fields["topk_ids"])
    np.testing.assert_allclose(mine.logprob.astype("float32"), item.fields["logprob"], rtol=2**-11)
    np.testing.assert_array_equal(np.stack(mine.hidden), item.fields["hidden"].float())
    ten = frame.groupby("sequence", observed=True).logprob.sum()
    assert len(ten) == 2


def test_half_precision_costs_half_a_unit_in_the_eleventh_digit(tmp_path: Path):
    item = scores(1, rows=400, k=64)
    item.fields["logprob"][:2] = torch.tensor([-70_000.0, -1e-6])
    write_part(tmp_path, [item], vocab_size=300, values="fp16")
    store = Store(tmp_path)
    (place,) = store.find(item.key)
    for name in ("logprob", "topk_logprob"):
        found, exact = store.read(place, name).numpy(), item.fields[name].numpy()
        assert found.dtype == np.float32 and np.isfinite(found).all()
        usual = exact > -60_000
        # 11 significant binary digits; below 2^-14 steps of 2^-24
        np.testing.assert_allclose(found[usual], exact[usual], rtol=2**-11, atol=2**-25)
    tail = store.read(place, "logtail").numpy()
    assert np.isneginf(tail[2]) and (np.delete(tail, 2) == -9.0).all()
    assert torch.equal(store.read(place, "hidden"), item.fields["hidden"]), "hidden states are left as they are"


def test_one_field_of_one_sequence_is_read_without_the_others(tmp_path: Path):
    items = [scores(number, rows=600, k=16) for number in range(6)]  # two sequences to a row group
    path = write_part(tmp_path, items, vocab_size=300, values="fp32")
    assert path is not None
    store = Store(tmp_path)
    (place,) = store.find(items[3].key)
    metadata = pq.read_metadata(path)
    assert metadata.num_row_groups == 3 and (place.group, place.row) == (1, 600)
    group = metadata.row_group(1)
    [chunk] = [group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == "logprob"]
    begin, size = chunk.data_page_offset, chunk.total_compressed_size
    whole = path.read_bytes()
    first = 4  # everything but this chunk and the footer is destroyed
    last = max(metadata.row_group(2).column(i).data_page_offset for i in range(group.num_columns))
    content = bytearray(os.urandom(last) + whole[last:])
    content[:first], content[begin : begin + size] = whole[:first], whole[begin : begin + size]
    path.write_bytes(bytes(content))
    assert torch.equal(store.read(place, "logprob"), items[3].fields["logprob"])
    for name, item in (("topk_logprob", items[3]), ("logprob", items[0])):
        with pytest.raises(DataError, match="is torn or not a recording: "):
            store.read(store.find(item.key)[0], name)


def test_a_part_torn_anywhere_is_one_error(tmp_path: Path):
    path = write_part(tmp_path, [scores(number) for number in range(3)], vocab_size=300, values="fp16")
    assert path is not None
    whole = path.read_bytes()
    group = pq.read_metadata(path).row_group(0)
    columns = [group.column(i) for i in range(group.num_columns)]
    [chunk] = [column for column in columns if column.path_in_schema == "topk_ids.list.element"]
    end = chunk.data_page_offset + chunk.total_compressed_size
    flipped = []
    for at in range(end - 60, end):  # of the page's content: every bit of it is under the checksum
        flipped.append(bytearray(whole))
        flipped[-1][at] ^= 1
    for content in [b"", b"nonsense", *map(bytes, flipped), *(whole[:end] for end in range(1, len(whole), 97))]:
        path.write_bytes(content)
        with pytest.raises(DataError, match="is torn or not a recording: "):
            store = Store(tmp_path)
            for number in range(3):
                store.read(store.find(scores(number).key)[0], "topk_ids")


def test_what_is_no_content_of_a_page_is_under_a_checksum_too(tmp_path: Path):
    """A page's header, whose bits say how many values there are and how they are written."""
    path = write_part(tmp_path, [scores(0)], vocab_size=300, values="fp16")
    assert path is not None
    whole, group = path.read_bytes(), pq.read_metadata(path).row_group(0)
    [chunk] = [group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == "logprob"]
    for at in range(chunk.data_page_offset, chunk.data_page_offset + 24):
        content = bytearray(whole)
        content[at] ^= 4
        path.write_bytes(content)
        store = Store(tmp_path)
        with pytest.raises(DataError, match="a checksum does not match"):
            store.read(store.find(scores(0).key)[0], "logprob")


def test_a_part_of_a_version_without_checksums_is_read(tmp_path: Path):
    path = write_part(tmp_path, [scores(0)], vocab_size=300, values="fp32")
    assert path is not None
    path.write_bytes(path.read_bytes().replace(b"TROPDSUM", bytes(8)))
    store = Store(tmp_path)
    assert torch.equal(store.read(store.find(scores(0).key)[0], "logprob"), scores(0).fields["logprob"])


def test_a_parquet_file_of_somebody_else_is_no_recording(tmp_path: Path):
    import pyarrow as pa

    pq.write_table(pa.table({"logprob": [1.0]}), tmp_path / "own.parquet")
    with pytest.raises(DataError, match=r"own.parquet is torn or not a recording"):
        Store(tmp_path)


def test_what_is_written_twice_is_there_once_and_a_sequence_keeps_every_occasion(tmp_path: Path):
    for _ in range(2):
        write_part(tmp_path, [scores(1), scores(2)], vocab_size=300, values="fp16")
    assert len(list(tmp_path.iterdir())) == 1
    write_part(tmp_path, [scores(1, queries=5)], vocab_size=300, values="fp16")
    assert sorted(place.queries for place in Store(tmp_path).find(scores(1).key)) == [0, 5]


def test_predictions_need_not_follow_one_another(tmp_path: Path):
    """The student writes, a tool answers, the student writes on: positions 2, 3, 7, 8 and 9."""
    item = replace(scores(1, rows=5), position=np.array([2, 3, 7, 8, 9]))
    write_part(tmp_path, [item], vocab_size=300, values="fp32")
    store = Store(tmp_path)
    (place,) = store.find(item.key)
    assert store.positions(place).tolist() == [2, 3, 7, 8, 9]
    cases = {(3, 7, 8): True, (2, 9): True, (3, 4): False, (4,): False, (1, 2): False, (9, 10): False}
    for wanted, covered in cases.items():
        assert store.covers(place, np.array(wanted)) is covered, wanted


def test_the_only_prediction_of_a_sequence_is_written_from_a_column_of_many(tmp_path: Path):
    wire_NX = torch.arange(15.0).view(3, 5).neg()  # as fields come off the wire: columns of one tensor
    one = replace(scores(0), position=np.array([4]), token_ids=np.array([9]), fields={"logprob": wire_NX[1:2, 2]})
    write_part(tmp_path, [one], vocab_size=300, values="fp32")
    store = Store(tmp_path)
    [place] = store.find(one.key)
    assert (store.positions(place).tolist(), store.read(place, "logprob").tolist()) == ([4], [-7.0])


def test_hashes_tell_sequences_apart():
    assert sequence_key(np.array([1, 2])) != sequence_key(np.array([2, 1])) != sequence_key(np.array([1]))
    assert len(sequence_key(np.array([], np.int64))) == 16
    assert hash64(np.zeros((2, 3))) != hash64(np.zeros((3, 2)))


@dataclass(frozen=True, slots=True, kw_only=True)
class WithToy(TeacherOutputs):
    toy_NK: Tensor | None = None


def test_a_new_field_is_recorded_and_read_without_further_edits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    toy = Field(name="toy", width="top_k", kind="nats", means="toys", wanted=lambda request: request.top_k)
    monkeypatch.setattr(schema, "SCORE_FIELDS", (*schema.SCORE_FIELDS, toy))
    monkeypatch.setattr(schema, "Outputs", WithToy)
    item = scores(1)
    given = torch.arange(35.0).view(7, 5)
    write_part(tmp_path, [replace(item, fields={**item.fields, "toy": given})], vocab_size=300, values="fp32")
    store = Store(tmp_path)
    (place,) = store.find(item.key)
    assert store.columns(place)["toy"] == 5 and torch.equal(store.read(place, "toy"), given)
    found = {name: store.read(place, name) for name in store.columns(place)}
    outputs = fitted(found, torch.zeros(7, dtype=torch.int64), TeacherRequest(top_k=3, entropy=False))
    assert isinstance(outputs, WithToy) and outputs.toy_NK is not None and torch.equal(outputs.toy_NK, given[:, :3])


# --------------------------------------------------------------------------- facts, and recordings of older versions


FACTS: dict[str, Any] = {
    "vocab_size": 97,
    "temperature": 1.0,
    "tokenizer": "abc",
    "dtype": "fp32",
    "chat template": None,
    "end tokens": [1],
    "ends counted as one": [],
    "budget": {"prompt": 8, "response": 9},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "bf16"}, "with dtype 'fp32', not 'bf16'. Do so."),
        ({"chat template": "a hash"}, "with chat template None, not 'a hash'. Do so."),
        ({"end tokens": [1, 2]}, r"with end tokens [1], not [1, 2]. Do so."),
        ({"temperature": 0.5}, "with temperature 1.0, not 0.5. Do so."),
        ({"base model": {"layers": 2}}, "without base model. Do so."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_scores_made_under_other_facts_are_refused(tmp_path: Path, change: dict[str, Any], message: str):
    write_facts(tmp_path, FACTS)
    check_facts(tmp_path, FACTS, fix="Do so")
    with pytest.raises(DataError) as error:
        check_facts(tmp_path, {**FACTS, **change}, fix="Do so")
    assert str(error.value) == f"{tmp_path} was recorded {message}"


def test_another_budget_is_said_and_a_base_model_may_be_added(tmp_path: Path):
    write_facts(tmp_path, FACTS)
    with pytest.warns(UserWarning, match="at most 8 tokens of a prompt and 9 of a response, not at most 8 .* and 5 of"):
        check_facts(tmp_path, {**FACTS, "budget": {"prompt": 8, "response": 5}}, fix="")
    added = check_facts(tmp_path, {**FACTS, "base model": {"layers": 2}}, fix="", adding=True)
    assert added == {"format": 3, **FACTS, "base model": {"layers": 2}}


def test_a_recording_of_the_old_format_is_refused_with_the_command_that_converts_it(tmp_path: Path):
    with pytest.raises(DataError, match=rf"is a recording of format 2, .*: `tropd convert recording {OLD} NEW`"):
        check_facts(OLD, FACTS, fix="")
    new = tmp_path / "new"
    before = {path.name: path.read_bytes() for path in OLD.iterdir()}
    assert convert_recording(OLD, new) == 2
    assert {path.name: path.read_bytes() for path in OLD.iterdir()} == before
    with pytest.warns(
        UserWarning,
        match="does not say with which dtype, chat template, end tokens, ends counted as one it was recorded",
    ):
        check_facts(new, FACTS, fix="")
    with pytest.raises(DataError, match="with tokenizer 'abc', not 'other'"):
        check_facts(new, {**FACTS, "tokenizer": "other"}, fix="")
    assert read_facts(new)["temperature"] == 1.0
    store = Store(new)
    for number, (first, rows) in enumerate(((2, 3), (0, 4))):  # what was written then, by hand
        (place,) = store.find(sequence_key(np.arange(number, number + 7)))
        row_n = torch.arange(rows)
        assert (place.first, place.rows, place.pack, place.queries) == (first, rows, 17, 5)
        expected = {
            "logprob": -(row_n + 1) / 8,
            "topk_ids": torch.arange(rows * 3).view(rows, 3) + number,
            "topk_logprob": -torch.arange(rows * 3).view(rows, 3) / 4,
            "query_ids": torch.arange(rows * 2).view(rows, 2) + 50,
            "query_logprob": -torch.arange(rows * 2).view(rows, 2) / 2,
            "logtail": torch.where(row_n == 1, -torch.inf, -row_n - 3.0),
            "entropy": row_n / 2,
            "hidden": torch.arange(rows * 5.0).view(rows, 5).bfloat16(),
        }
        assert set(store.columns(place)) == set(expected)
        for name, value in expected.items():
            assert torch.equal(store.read(place, name), value), name


def test_an_old_header_has_no_checksum_and_a_bit_of_it_may_not_turn_bytes_round(tmp_path: Path):
    old = Path(shutil.copytree(OLD, tmp_path / "old"))
    [part] = old.glob("*.grades")
    part.write_bytes(part.read_bytes().replace(b'"<f2"', b'">f2"', 1))  # a single bit
    with pytest.raises(DataError, match=r"numbers of kinds that no version wrote: '>f2'"):
        convert_recording(old, tmp_path / "new")


def test_a_conversion_into_something_is_refused(tmp_path: Path):
    (tmp_path / "mine").write_text("keep")
    with pytest.raises(DataError, match=r"is not empty\. Name a directory that does not exist yet"):
        convert_recording(OLD, tmp_path)
    assert (tmp_path / "mine").read_text() == "keep" and len(list(tmp_path.iterdir())) == 1
    write_facts(tmp_path, FACTS)
    with pytest.raises(DataError, match="is not a recording of format 2: there is nothing to convert"):
        convert_recording(tmp_path, tmp_path / "new")


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


@pytest.mark.slow
def test_a_run_on_grades_of_recorded_rollouts_is_the_live_run_step_by_step(task: Task, rollouts: Path, tmp_path: Path):
    replay = ("rollout.engine=recorded", f"rollout.recorded_from={rollouts}/rollouts", *QUIET)
    errors = {}
    for values in ("fp32", "fp16"):
        target = tmp_path / f"grades-{values}"
        # scored in packs of another size and under another layout than it is trained on
        scoring = (f"teacher.record={target}", f"teacher.record_values={values}", "train.pack_tokens=97")
        outcome = commands().run("score", task.config, *replay, *scoring, ranks=2).expect_success()
        assert " sequences scored (" in outcome.output and "tokens/s" in outcome.output
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
    assert "0 sequences scored (27 were so before), 0 tokens" in again.output


def test_the_responses_in_the_data_are_graded(task: Task, tmp_path: Path):
    outcome = commands().run("score", task.config, f"teacher.record={tmp_path}/grades").expect_success()
    assert "11 sequences scored (0 were so before)" in outcome.output
    facts = json.loads((tmp_path / "grades" / "recording.json").read_text())
    assert facts["teacher weights"] == weights_fingerprint(task.teacher) and len(Store(tmp_path / "grades")) == 11
    assert facts["dtype"] == "fp32" and facts["budget"] == {"prompt": 64, "response": 11} and facts["end tokens"]
    # made for less than is needed now: it is completed, once
    for sequences, before in ((11, 0), (0, 11)):
        more = commands().run("score", task.config, f"teacher.record={tmp_path}/grades", "method.k=9").expect_success()
        assert f"{sequences} sequences scored ({before} were so before)" in more.output
    quiet = (*QUIET, f"run_dir={tmp_path}/run", "rollout.samples_per_prompt=0")
    whole = ("method.prefix_schedule=constant", "method.prefix_fraction=1", f"teacher.recorded_from={tmp_path}/grades")
    commands().run("train", task.config, *quiet, *whole, "method.k=9").expect_success()


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
        ((), "teacher.record=null: give the directory to write scores to."),
        (("teacher.record=GRADES", "method.support=union"), "method.support=union requests scores of ids that"),
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
