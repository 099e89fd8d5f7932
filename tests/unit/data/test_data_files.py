"""JSON lines, Parquet, Arrow, globs and saved datasets give the same prompts; what is wrong is said with its place."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from megatron_tropd.config.sections import ColumnsConfig
from megatron_tropd.data.files import find_files, read_rows
from megatron_tropd.data.prompts import Limits, read_prompts, read_sources
from megatron_tropd.data.rows import Source
from megatron_tropd.data.table import PromptTable, table_of
from megatron_tropd.data.tokenizer import Tokenizer, load_tokenizer
from megatron_tropd.errors import ConfigError, DataError
from megatron_tropd.types import Prompt
from tests.unit.data.test_data_chat_templates import TEMPLATES, save_with_bos

ROWS: list[dict[str, Any]] = [
    {"prompt": "Tom has 3 apples.", "answer": "3", "response": "He has 3.", "level": 1},
    {"prompt": "Zoë 🙂", "answer": "", "response": "ok", "level": 2},
    {"prompt": "How many are left?", "response": "12", "level": 3},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(save_with_bos(tmp_path_factory.mktemp("bpe"), chat_template=TEMPLATES["bos_and_headers"]))


def write_json(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_table(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    table = pyarrow.Table.from_pylist(rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, **options)
    else:
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    return path


def contents(prompts: PromptTable) -> list[tuple[Any, ...]]:
    return [
        (p.index, p.token_ids.tolist(), p.text, p.answer, None if p.response_ids is None else p.response_ids.tolist())
        for p in prompts
    ]


# --------------------------------------------------------------------------- every kind of file


def test_every_kind_of_file_gives_the_same_prompts(tokenizer, tmp_path):
    expected = contents(read_prompts(write_json(tmp_path / "a.jsonl", ROWS), tokenizer).prompts)
    assert [row[0] for row in expected] == [0, 1, 2] and [row[3] for row in expected] == ["3", "", None]
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved", num_shards=2)
    for data in (
        write_table(tmp_path / "a.parquet", ROWS, row_group_size=2),
        write_table(tmp_path / "a.arrow", ROWS),
        tmp_path / "saved",  # Arrow's streaming format
        tmp_path / "a.json*",
    ):
        assert contents(read_prompts(data, tokenizer).prompts) == expected, data


@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ""])
def test_a_table_of_many_rows_is_read_whole_in_order_and_numbered_through(tmp_path, suffix):
    rows = [{"prompt": f"{i}", "answer": f"{-i}"} for i in range(1100)]  # of several batches, the last ones not full
    path = tmp_path / f"a{suffix}"
    table = pyarrow.Table.from_pylist(rows)
    if suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=700)
    elif suffix:
        with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=600)
    else:
        datasets.Dataset.from_list(rows).save_to_disk(path)
        (path,) = find_files(path)
    found = list(read_rows(path, columns={"prompt", "answer"}))
    assert [row.number for row in found] == list(range(1, 1101))
    assert [row.content for row in found] == rows


def test_what_a_row_lacks_is_absent_however_deep_as_in_json(tmp_path):
    calls = [{"role": "user", "content": "a", "call": {"name": "f", "id": 1}}, {"role": "user", "content": "b"}]
    rows = [{"prompt": calls, "about": {"x": {"y": 1}}}, {"prompt": calls[1:], "about": {"x": {"z": 2}}}]
    table, lines = write_table(tmp_path / "a.parquet", rows), write_json(tmp_path / "a.jsonl", rows)
    assert [list(read_rows(path, columns=None)) for path in (table, lines)] == [
        list(read_rows(lines, columns=None))
    ] * 2
    assert [row.content for row in read_rows(table, columns=None)] == rows


def test_a_saved_selection_keeps_its_order(tokenizer, tmp_path):
    # datasets writes the rows that are left, in their new order, not an index into the old ones
    datasets.Dataset.from_list(ROWS).select([2, 0]).save_to_disk(tmp_path / "saved")
    prompts = read_prompts(tmp_path / "saved", tokenizer).prompts
    assert [prompt.text for prompt in prompts] == ["How many are left?", "Tom has 3 apples."]


def test_files_of_a_directory_and_of_a_glob_are_read_in_sorted_order(tokenizer, tmp_path):
    for name in ("b", "a", "c"):
        write_json(tmp_path / f"{name}.jsonl", [{"prompt": name}])
    write_table(tmp_path / "d.parquet", [{"prompt": "d"}])
    (tmp_path / "README.md").write_text("not data")
    assert [p.text for p in read_prompts(tmp_path, tokenizer).prompts] == ["a", "b", "c", "d"]
    assert [p.text for p in read_prompts([tmp_path / "[bc].jsonl", tmp_path / "a.jsonl"], tokenizer).prompts] == [
        "b", "c", "a",
    ]  # fmt: skip


def test_only_the_columns_asked_for_are_read_from_a_table(tmp_path):
    path = write_table(tmp_path / "a.parquet", [{"prompt": "a", "image": b"0" * 1000, "deep": {"x": 1, "y": 2}}])
    (row,) = read_rows(path, columns={"prompt", "deep.x", "nothing"})
    assert row.content == {"prompt": "a", "deep": {"x": 1, "y": 2}}


def test_fields_of_columns_are_named_with_a_dot(tokenizer, tmp_path):
    chat = [{"role": "user", "content": "Tom?", "name": None}]  # a table gives every message every field
    rows = [{"prompt": chat, "reward_model": {"ground_truth": "34", "style": "rule"}}]
    columns = ColumnsConfig(answer="reward_model.ground_truth")
    (prompt,) = read_prompts(write_table(tmp_path / "a.parquet", rows), tokenizer, columns=columns).prompts
    assert (prompt.text, prompt.answer) == ("Tom?", "34")
    assert prompt.token_ids.tolist() == tokenizer.render_prompt([{"role": "user", "content": "Tom?"}])


def test_a_million_rows_would_not_be_a_million_objects(tokenizer, tmp_path):
    rows, count = [f'{{"prompt": "Tom has {i} apples.", "answer": {i}}}\n' for i in range(1_500)], 1_500
    (tmp_path / "a.jsonl").write_text("".join(rows))
    (tmp_path / "first.jsonl").write_text(rows[0])
    read_prompts(tmp_path / "first.jsonl", tokenizer)  # what is loaded once is loaded
    tracemalloc.start()
    prompts = read_prompts(tmp_path / "a.jsonl", tokenizer).prompts
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(prompts) == count and prompts[1_499].answer == "1499"
    assert prompts.nbytes / count < 300  # some 30 tokens of 4 bytes, 21 bytes of text, and where it is from
    assert held < 1.5 * prompts.nbytes and peak < 2.5 * prompts.nbytes


# --------------------------------------------------------------------------- rows into prompts


def test_templates_make_prompt_and_answer_from_any_columns(tokenizer, tmp_path):
    rows = [{"question": "Which is odd?", "choices": ["2", "3"], "label": 1}]
    source = Source(
        paths=(write_table(tmp_path / "a.parquet", rows),),
        template="{{ question }}\n{% for choice in choices %}\n{{ 'ABCD'[loop.index0] }}. {{ choice }}\n{% endfor %}\n",
        answer_template="{{ 'ABCD'[label] }}",
    )
    (prompt,) = read_sources([source], tokenizer).prompts
    assert (prompt.text, prompt.answer) == ("Which is odd?\nA. 2\nB. 3\n", "B")
    ends = Source(paths=source.paths, template="{{ question }}\nAnswer:\n", answer_template="{{ label }}\n")
    (prompt,) = read_sources([ends], tokenizer).prompts
    assert (prompt.text, prompt.answer) == ("Which is odd?\nAnswer:\n", "1\n")  # white space is kept as written


def test_a_template_goes_around_the_last_message_and_sees_the_prompt_column(tokenizer, tmp_path):
    chat = [{"role": "system", "content": "S"}, {"role": "user", "content": "3+4?"}]
    path = write_json(tmp_path / "a.jsonl", [{"messages": chat}, {"q": "5+6? {{ no }}", "answer": "11"}])
    source = Source(
        paths=(path,), columns=ColumnsConfig(prompt="q"), template="{{ prompt }} Answer:", system="Be kind."
    )
    source_answer = Source(paths=source.paths, columns=source.columns, answer_template="<{{ answer }}>")
    first, second = read_sources([source], tokenizer).prompts
    shown = [*chat[:1], {"role": "user", "content": "3+4? Answer:"}]
    assert first.token_ids.tolist() == tokenizer.render_prompt(shown)
    shown = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "5+6? {{ no }} Answer:"}]
    assert second.token_ids.tolist() == tokenizer.render_prompt(shown)  # data is never a template
    with pytest.raises(DataError, match=r"a.jsonl:1: the template '<\{\{ answer \}\}>' fails: 'answer' is undefined"):
        read_sources([source_answer], tokenizer)


def test_a_conversation_that_ends_in_an_answer_brings_its_own_response(tokenizer, tmp_path):
    chat = [{"role": "user", "content": "3+4?"}, {"role": "assistant", "content": "7"}]
    rows = [{"messages": chat}, {"messages": chat, "response": "seven"}, {"messages": chat[1:]}]
    result = read_prompts(write_json(tmp_path / "a.jsonl", rows), tokenizer, on_bad_row="skip")
    spoken, written = result.prompts
    assert spoken.token_ids.tolist() == written.token_ids.tolist() == tokenizer.render_prompt("3+4?")
    assert spoken.response_ids.tolist() == [*tokenizer.encode("7"), tokenizer.eos_ids[0]]
    assert written.response_ids.tolist() == [*tokenizer.encode("seven"), tokenizer.eos_ids[0]]
    assert "a.jsonl:3: the conversation has only an assistant message" in result.bad_rows[0]


def test_a_template_cannot_leave_its_sandbox(tokenizer, tmp_path):
    path = write_json(tmp_path / "a.jsonl", ROWS)
    for text in ("{{ prompt.__class__.__mro__[1].__subclasses__() }}", "{{ cycler.__init__.__globals__.os.getcwd() }}"):
        with pytest.raises(DataError, match=r"a.jsonl:1: the template .* fails: access to attribute"):
            read_sources([Source(paths=(path,), template=text)], tokenizer)
    with pytest.raises(ConfigError, match="not valid Jinja, line 1: "):
        read_sources([Source(paths=(path,), template="{{ prompt")], tokenizer)


# --------------------------------------------------------------------------- sources and limits


def test_prompts_remember_source_teacher_and_place(tokenizer, tmp_path):
    first = write_json(tmp_path / "a.jsonl", ROWS)
    second = write_table(tmp_path / "b.parquet", ROWS[:2])
    sources = [
        Source(paths=(first,), name="math", teacher="big"),
        Source(paths=(second, first), name="code", teacher="small"),
    ]
    prompts = read_sources(sources, tokenizer).prompts
    assert [(p.source, p.teacher, p.index) for p in prompts] == [
        *(("math", "big", i) for i in range(3)),
        *(("code", "small", i) for i in range(3, 8)),
    ]
    rows = {name: rows.tolist() for name, rows in prompts.sources().items()}
    assert rows == {"math": [0, 1, 2], "code": [3, 4, 5, 6, 7]}
    assert [prompts.place(row) for row in (2, 4, 5)] == [f"{first}:3", f"{second}:2", f"{first}:1"]


def test_row_limits_count_usable_rows_and_length_limits_leave_rows_out(tokenizer, tmp_path, caplog):
    rows = [{"prompt": "a" * 500}, *({"prompt": f"{i}", "response": "12" * i} for i in range(1, 30))]
    source = Source(paths=(write_json(tmp_path / "a.jsonl", rows),), name="s")
    longest = len(tokenizer.render_prompt("1"))
    limits = Limits(max_prompt_tokens=longest, max_response_tokens=5, max_rows=3)
    result = read_sources([source], tokenizer, limits=limits)
    assert result.too_long[0] == 0 and [p.index for p in result.prompts] == [1, 2, 3]
    assert "s: kept 3 prompts, left out 1 longer than" in caplog.text and "or 5 of response" in caplog.text


def test_the_longest_response_counts_its_end_token(tokenizer, tmp_path):
    source = Source(paths=(write_json(tmp_path / "a.jsonl", [{"prompt": "a", "response": "12"}]),))
    length = len(tokenizer.encode("12")) + 1
    assert len(read_sources([source], tokenizer, limits=Limits(max_response_tokens=length)).prompts) == 1
    with pytest.raises(DataError, match="no usable prompt"):
        read_sources([source], tokenizer, limits=Limits(max_response_tokens=length - 1))


def test_the_largest_id_is_found_between_rows_that_have_none():
    responses = [None, [3, 9, 4], None, [2, 7], None, None]
    table = table_of(
        Prompt(index=i, token_ids=np.array([i]), text="", response_ids=None if ids is None else np.array(ids))
        for i, ids in enumerate(responses)
    )
    assert table.largest_ids().tolist() == [0, 9, 2, 7, 4, 5]


def test_a_table_of_prompts_gives_back_what_was_put_in():
    given = [
        Prompt(index=4, token_ids=np.array([5, 1]), text="é\ud800", answer=None, response_ids=np.array([9])),
        Prompt(index=7, token_ids=np.array([], dtype=np.int64), text="", answer="", source="s", teacher="t"),
        Prompt(index=8, token_ids=np.array([2]), text="x", answer="y", source="s", teacher="t"),
    ]
    table = table_of(given)
    for row, prompt in enumerate(given):
        for place in (row, row - 3):
            found = table[place]
            assert found.token_ids.tolist() == prompt.token_ids.tolist() and found.token_ids.dtype == np.int64
            assert (found.response_ids is None) == (prompt.response_ids is None)
            assert (found.index, found.text, found.answer) == (prompt.index, prompt.text, prompt.answer)
            assert (found.source, found.teacher) == (prompt.source, prompt.teacher)
    assert [prompt.index for prompt in table[1:]] == [7, 8]
    assert (table.prompt_lengths().tolist(), table.response_lengths().tolist()) == ([2, 0, 1], [1, 0, 0])
    assert table.largest_ids().tolist() == [9, -1, 2] and table.answered().tolist() == [False, True, True]
    with pytest.raises(IndexError):
        table[3]
    assert len(PromptTable()) == 0 and PromptTable().sources() == {} and PromptTable().largest_ids().tolist() == []


def test_fingerprints_change_with_anything_that_training_sees():
    def fingerprint(**changes: Any) -> str:
        fields: dict[str, Any] = {"index": 0, "token_ids": np.array([1, 2]), "text": "a", "answer": "3"}
        after = Prompt(index=1, token_ids=np.array([3]), text="b")
        return table_of([Prompt(**{**fields, **changes}), after]).fingerprint()

    changes: list[dict[str, Any]] = [
        {"token_ids": np.array([1])},
        {"token_ids": np.array([2, 1])},
        {"answer": "4"},
        {"response_ids": np.array([3])},
        {"source": "s"},
        {"teacher": "t"},
    ]
    prints = [fingerprint(), *(fingerprint(**change) for change in changes)]
    assert len(set(prints)) == len(prints)
    assert fingerprint(text="shown otherwise") == fingerprint()
    mixtures = [
        table_of(Prompt(index=i, token_ids=np.array([1]), text="", source=name) for i, name in enumerate(names))
        for names in ("stt", "sst")
    ]
    assert mixtures[0].fingerprint() != mixtures[1].fingerprint()
    cut = [table_of(Prompt(index=i, token_ids=np.array(row), text="") for i, row in enumerate(rows)) for rows in (
        ([1, 2], [3]), ([1], [2, 3]),
    )]  # fmt: skip
    assert cut[0].fingerprint() != cut[1].fingerprint()  # the same tokens in a row


# --------------------------------------------------------------------------- what is wrong


def test_a_table_without_its_columns_is_refused_as_a_whole(tokenizer, tmp_path):
    path = write_table(tmp_path / "a.parquet", [{"question": "a", "answer": "b"}])
    for policy in ("error", "skip"):
        with pytest.raises(DataError, match=r"a.parquet has no column 'prompt' or 'messages', only \['answer', 'que"):
            read_prompts(path, tokenizer, on_bad_row=policy)


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_a_torn_table_is_refused_with_its_name(tokenizer, tmp_path, suffix):
    whole = write_table(tmp_path / f"whole.{suffix}", ROWS * 50).read_bytes()
    for name, content in {"torn": whole[: len(whole) // 2], "empty": b"", "other": b'{"prompt": "a"}\n' * 9}.items():
        path = tmp_path / f"{name}.{suffix}"
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"{name}.{suffix} is torn or no {suffix.capitalize()} file"):
            read_prompts(path, tokenizer, on_bad_row="skip")


def test_bad_rows_of_tables_are_named_by_row(tokenizer, tmp_path):
    rows = [{"prompt": "a", "answer": ["x"]}, {"prompt": None, "answer": None}]
    path = write_table(tmp_path / "a.parquet", rows)
    with pytest.raises(DataError, match=r"a.parquet:1: column 'answer' holds list, expected text or a number"):
        read_prompts(path, tokenizer)
    rows = [{"prompt": "a"}, {"prompt": None}]
    with pytest.raises(DataError, match=r"b.parquet:2: has neither 'prompt' nor 'messages'"):
        read_prompts(write_table(tmp_path / "b.parquet", rows), tokenizer)


def test_paths_that_name_no_data_or_too_much_are_refused(tmp_path):
    saved = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match=r"splits holds several splits. Give the directory of one of them: .*/train"):
        find_files(tmp_path / "splits")
    (tmp_path / "hub").mkdir()
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001"):
        write_table(tmp_path / "hub" / f"{name}.parquet", ROWS)
    with pytest.raises(DataError, match=r"files of several splits \(test, train\), which would be mixed. .*train\*"):
        find_files(tmp_path / "hub")
    assert len(find_files(tmp_path / "hub" / "train*.parquet")) == 2
    with pytest.raises(DataError, match=r"test-00000-of-00001.parquet would be read twice"):
        find_files([tmp_path / "hub" / "*.parquet", tmp_path / "hub" / "test-00000-of-00001.parquet"])
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match=r"has no .jsonl, .parquet or .arrow file in it, but nothing"):
        find_files(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"no file matches .*\*.jsonl"):
        find_files(tmp_path / "*.jsonl")
    with pytest.raises(DataError, match="gone does not exist"):
        find_files(tmp_path / "gone")
    saved.save_to_disk(tmp_path / "part", num_shards=2)
    (tmp_path / "part" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00002.arrow is listed in .* but missing"):
        find_files(tmp_path / "part")
