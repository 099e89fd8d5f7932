"""A prompt of the teacher's own: made from the row, beside the student's, counted where there is none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from megatron_tropd.config.sections import ColumnsConfig
from megatron_tropd.data.prompts import Limits, PromptSet, read_sources
from megatron_tropd.data.rows import Source
from megatron_tropd.data.table import PromptTable
from megatron_tropd.data.tokenizer import Tokenizer, load_tokenizer
from megatron_tropd.errors import DataError

ANY = Limits()
CHAT = (
    "{% for message in messages %}({{ message['role'][0] }}){{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}(a){% endif %}"
)


def letters(directory: Path, chat: str | None) -> Tokenizer:
    """One token per printable ASCII character."""
    raw = RawTokenizer(models.WordLevel({chr(code): code - 31 for code in range(32, 127)} | {"<eos>": 0}))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    raw.decoder = decoders.Fuse()
    raw.add_special_tokens(["<eos>"])
    raw.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    config |= {} if chat is None else {"chat_template": chat}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return letters(tmp_path_factory.mktemp("plain"), None)


@pytest.fixture(scope="module")
def chatting(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return letters(tmp_path_factory.mktemp("chatting"), CHAT)


def text(ids: np.ndarray | None) -> str | None:
    return None if ids is None else "".join(chr(i + 31) for i in ids.tolist())


def read(tokenizer: Tokenizer, place: Path, *rows: Any, limits: Limits = ANY, **source: Any) -> PromptSet:
    path = place / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_sources([Source(paths=(path,), **source)], tokenizer, limits=limits)


def both(found: PromptSet) -> list[tuple[str | None, str | None]]:
    return [(text(one.token_ids), text(one.teacher_ids)) for one in found.prompts]


HINTED = ColumnsConfig(teacher_prompt="hinted")


def test_a_template_goes_around_what_the_student_is_asked(plain, chatting, tmp_path):
    row = {"prompt": "1+1?", "solution": "two", "answer": "2"}
    own = "{{ prompt }} It is {{ solution }} ({{ answer }})."
    found = read(plain, tmp_path, row, template="{{ prompt }} Say.", teacher_template=own)
    assert both(found) == [("1+1? Say.", "1+1? Say. It is two (2).")]
    # of a conversation it is around the last message
    talk = {"prompt": [{"role": "user", "content": "hi"}, {"role": "user", "content": "1+1?"}], "solution": "two"}
    found = read(chatting, tmp_path, talk, system="be", teacher_template="{{ prompt }}={{ solution }}")
    assert both(found) == [("(s)be(u)hi(u)1+1?(a)", "(s)be(u)hi(u)1+1?=two(a)")]


def test_a_system_message_of_the_teacher_s_takes_the_place_of_any_other(chatting, tmp_path):
    rows = (
        {"prompt": "a"},
        {"prompt": [{"role": "system", "content": "own"}, {"role": "user", "content": "b"}]},
    )
    found = read(chatting, tmp_path, *rows, system="all", teacher_system="long")
    assert both(found) == [("(s)all(u)a(a)", "(s)long(u)a(a)"), ("(s)own(u)b(a)", "(s)long(u)b(a)")]


def test_a_column_is_a_whole_prompt_and_rows_without_it_are_counted(chatting, tmp_path, caplog):
    rows = (
        {"prompt": "a", "hinted": "a, b"},
        {"prompt": "b", "hinted": [{"role": "user", "content": "c"}]},
        {"prompt": "c", "hinted": None},
        {"prompt": "d", "hinted": "d"},
    )
    found = read(chatting, tmp_path, *rows, columns=HINTED)
    assert [own for _, own in both(found)] == ["(u)a, b(a)", "(u)c(a)", None, None]
    said = " ".join(caplog.messages)
    assert "1 row" in said and "has no 'hinted': the teacher reads the student's prompt" in said
    assert "gives the teacher the very prompt of the student" in said
    # the template goes around the column, where there is one
    found = read(chatting, tmp_path, *rows[::2], columns=HINTED, teacher_template="<{{ prompt }}>")
    assert [own for _, own in both(found)] == ["(u)<a, b>(a)", "(u)<c>(a)"]


def test_a_column_that_nobody_named_is_said(plain, tmp_path, caplog):
    found = read(plain, tmp_path, {"prompt": "a", "teacher_prompt": "b"})
    assert both(found) == [("a", None)]
    assert "'teacher_prompt', which nothing reads; data.columns.teacher_prompt may name it" in " ".join(caplog.messages)


@pytest.mark.parametrize(
    ("hinted", "reason"),
    [
        (7, r"column 'hinted' holds '7', expected text or a list of messages"),
        ([{"role": "assistant", "content": "x"}], r"has a prompt for the teacher that ends in an assistant message"),
        ("<eos>", r"has an empty prompt for the teacher"),
    ],
)
def test_what_is_no_prompt_is_a_bad_row(plain, tmp_path, hinted, reason):
    with pytest.raises(DataError, match=r"rows.jsonl:1: " + reason):
        read(plain, tmp_path, {"prompt": "a", "hinted": hinted}, columns=HINTED)


def test_rows_whose_own_prompt_is_too_long_are_left_out_and_counted(plain, tmp_path, caplog):
    rows = ({"prompt": "a", "hinted": "x" * 9}, {"prompt": "b", "hinted": "x" * 8})
    found = read(plain, tmp_path, *rows, columns=HINTED, limits=Limits(max_teacher_prompt_tokens=8))
    assert both(found) == [("b", "x" * 8)] and found.too_long == (0,)


def test_the_table_keeps_them_and_its_fingerprint_changes_with_them_alone(plain, tmp_path):
    rows = ({"prompt": "a", "hinted": "x"}, {"prompt": "b"}, {"prompt": "c", "hinted": "yz"})
    cache = tmp_path / "cache"
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = {name: [Source(paths=(path,), columns=one)] for name, one in (("no", ColumnsConfig()), ("own", HINTED))}
    tables: dict[str, PromptTable] = {}
    for name, source in sources.items():
        for _ in range(2):  # made, then mapped
            tables[name] = read_sources(source, plain, cache_dir=cache).prompts
    own, no = tables["own"], tables["no"]
    assert [text(one.teacher_ids) for one in own] == ["x", None, "yz"]
    assert own.teacher_prompt_lengths().tolist() == [1, 1, 2] and own.with_own_teacher_prompt().tolist() == [0, 2]
    assert own.largest_ids().tolist() == [ord(c) - 31 for c in "xbz"]
    assert no.largest_ids().tolist() == [ord(c) - 31 for c in "abc"] and not len(no.with_own_teacher_prompt())
    assert own.fingerprint() != no.fingerprint() and own.row_of_index() == {0: 0, 1: 1, 2: 2}
