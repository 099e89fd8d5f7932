"""Tokenized rows are made once per host, keyed by all that shapes them, and mapped into memory as they were made."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest

from megatron_tropd.data import prompt_cache
from megatron_tropd.data.prompt_cache import default_directory, kept_table
from megatron_tropd.data.prompts import Limits, PromptSet, read_sources
from megatron_tropd.data.rows import Source
from megatron_tropd.data.table import table_of
from megatron_tropd.data.table_file import StoredTable, open_table, write_table
from megatron_tropd.data.tokenizer import Tokenizer, load_tokenizer
from megatron_tropd.errors import DataError
from megatron_tropd.progress.phases import Phase
from megatron_tropd.types import Prompt
from tests.unit.data.test_data_chat_templates import TEMPLATES, save_with_bos

ROWS: list[dict[str, Any]] = [
    {"prompt": "Tom has 3 apples.", "answer": "3", "response": "He has 3.", "system": "Be brief."},
    {"prompt": "Zoë", "answer": "\ud83d", "response": "ok", "finish_reason": "length"},
    {"prompt": "How many are left, of all that there were before they were given to Zoë?", "answer": 12},
    {"prompt": "", "answer": "bad"},
    {"prompt": "How many are left?"},
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_bos(tmp_path_factory.mktemp("bpe"), chat_template=TEMPLATES["bos_and_headers"])


@pytest.fixture
def tokenizer(model: Path) -> Tokenizer:
    return load_tokenizer(model)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def read(file: Path, tokenizer: Tokenizer, cache_dir: Path | None, **changes: Any) -> PromptSet:
    limits = Limits(max_prompt_tokens=changes.pop("max_prompt_tokens", 60))
    on_bad_row = changes.pop("on_bad_row", "skip")
    source = replace(Source(paths=(file,), name="s", teacher="t"), **changes)
    return read_sources([source], tokenizer, limits=limits, on_bad_row=on_bad_row, cache_dir=cache_dir)


def contents(found: PromptSet) -> list[Any]:
    rows = [
        {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in slots.items()}
        for slots in ({name: getattr(prompt, name) for name in Prompt.__slots__} for prompt in found.prompts)
    ]
    table = found.prompts
    places, sources = [table.place(i) for i in range(len(table))], {k: v.tolist() for k, v in table.sources().items()}
    arrays = (table.prompt_lengths(), table.response_lengths(), table.answered(), table.largest_ids())
    return [rows, places, sources, [a.tolist() for a in arrays], table.left_out, found.too_long, found.bad_rows]


def tables(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.arrow"))


def test_a_second_reading_maps_the_first_ones_table_and_says_what_it_said(file, tokenizer, model, tmp_path, caplog):
    plain = read(file, tokenizer, None)
    said = [record.getMessage() for record in caplog.records]
    assert len(plain.prompts) == 3 and plain.too_long == (2,) and len(plain.bad_rows) == 1 and len(said) == 3
    encoded: list[str] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            found = getattr(tokenizer, name)
            return (lambda *a, **k: (encoded.append(name), found(*a, **k))[1]) if name == "encode" else found

    for first in (True, False):
        caplog.clear(), encoded.clear()
        found = read(file, Counting(), tmp_path / "cache")  # type: ignore[arg-type]
        assert contents(found) == contents(plain) and found.prompts.fingerprint() == plain.prompts.fingerprint()
        assert [record.getMessage() for record in caplog.records] == said
        assert (encoded != []) is first
        assert [found.kept_in] == tables(tmp_path / "cache")
    assert not found.prompts._token_ids.parts()[0].flags.writeable  # the file's own pages, for all to share
    assert sorted(tmp_path.glob("cache/*.partial")) == []


@pytest.mark.parametrize(
    "change",
    [
        {"system": "Be kind."},
        {"template": "{{ prompt }} Answer:"},
        {"answer_template": "{{ answer }}."},
        {"teacher": "u"},
        {"max_prompt_tokens": 61},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_rule_is_another_table(file, tokenizer, tmp_path, change):
    read(file, tokenizer, tmp_path / "cache")
    read(file, tokenizer, tmp_path / "cache", **change)
    assert len(tables(tmp_path / "cache")) == 2


def test_a_bad_row_is_an_error_every_time_and_nothing_is_kept(file, tokenizer, tmp_path):
    for _ in range(2):
        with pytest.raises(DataError, match=r"rows\.jsonl:4: column 'prompt' is empty"):
            read(file, tokenizer, tmp_path / "cache", on_bad_row="error")
    assert tables(tmp_path / "cache") == []


def test_another_content_or_tokenizer_is_another_table_and_another_date_is_not(file, model, tmp_path):
    cache, tokenizer = tmp_path / "cache", load_tokenizer(model)
    for expected, current in (
        (1, tokenizer),
        (1, load_tokenizer(model)),
        (2, load_tokenizer(model, template_options={"enable_thinking": False})),
        (3, load_tokenizer(model, chat_template=False)),
        (4, replace(tokenizer, eos_ids=(*tokenizer.eos_ids, 7))),  # type: ignore[type-var]
    ):
        read(file, current, cache)
        assert len(tables(cache)) == expected
    file.write_text(file.read_text())
    read(file, tokenizer, cache)
    assert len(tables(cache)) == 4
    file.write_text(file.read_text().replace("3 apples", "4 apples"))
    assert read(file, tokenizer, cache).prompts[0].text == "Tom has 4 apples." and len(tables(cache)) == 5


@pytest.mark.parametrize("day", ["strftime_now('%d')", "'1'"])
def test_a_template_that_writes_the_day_has_a_table_a_day(file, model, tmp_path, monkeypatch, day):
    directory = save_with_bos(tmp_path / "model", chat_template=TEMPLATES["bos_and_headers"] + "{{ " + day + " }}")
    tokenizer = load_tokenizer(directory)

    class Day:
        text = "2031-05-06"

        def isoformat(self) -> str:
            return self.text

    monkeypatch.setattr(prompt_cache, "date", type("Date", (), {"today": staticmethod(Day)}))
    for number in (1, 2):
        Day.text = f"2031-05-{number:02}"
        read(file, tokenizer, tmp_path / "cache")
    assert len(tables(tmp_path / "cache")) == (2 if "strftime" in day else 1)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _flip(path: Path) -> None:
    """Change one token id, which Arrow itself would not notice."""
    content = bytearray(path.read_bytes())
    at = content.index(open_table(path).table._token_ids.parts()[0].tobytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [_truncate, _flip, lambda path: path.write_bytes(b"")])
def test_a_damaged_table_is_named_and_made_again(file, tokenizer, tmp_path, caplog, damage: Callable[[Path], None]):
    expected = contents(read(file, tokenizer, tmp_path / "cache"))
    (path,) = tables(tmp_path / "cache")
    damage(path)
    with pytest.raises(DataError, match="is torn, or no table"):
        open_table(path)
    caplog.clear()
    assert contents(read(file, tokenizer, tmp_path / "cache")) == expected
    assert f"{path} is torn, or no table of prompts" in caplog.text and "It is made again." in caplog.text
    open_table(path)


def test_a_directory_that_cannot_be_written_is_said_and_costs_only_time(file, tokenizer, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file")
    found = read(file, tokenizer, tmp_path / "cache")
    assert contents(found) == contents(read(file, tokenizer, None)) and found.kept_in is None
    assert "cannot be written" in caplog.text and "data.cache_dir" in caplog.text


def test_rows_that_change_under_the_reader_are_kept_by_nobody(file, tokenizer, tmp_path, monkeypatch):
    class Appending:
        def __getattr__(self, name: str) -> Any:
            if name == "encode":
                with file.open("a") as stream:
                    stream.write("\n")
            return getattr(tokenizer, name)

    with pytest.raises(DataError, match=r"rows\.jsonl changed while being read"):
        read(file, Appending(), tmp_path / "cache")  # type: ignore[arg-type]
    assert tables(tmp_path / "cache") == []


def test_of_those_who_come_together_one_makes_the_table_and_the_others_wait_for_it(tmp_path, monkeypatch):
    made, come = [], threading.Barrier(2)

    class Meeting(Phase):
        def __enter__(self) -> Meeting:
            come.wait(100)  # both have seen that there is no table
            return super().__enter__()

    monkeypatch.setattr(prompt_cache, "Phase", Meeting)

    def make() -> StoredTable:
        made.append(threading.get_ident())
        return StoredTable(table=table_of([Prompt(index=5, token_ids=np.array([3, 1]), text="a")]), facts={})

    found: list[StoredTable] = []
    threads = [threading.Thread(target=lambda: found.append(kept_table(tmp_path, "k", make))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert len(made) == 1 and sorted(one.is_new for one in found) == [False, True]
    assert [one.table[0].token_ids.tolist() for one in found] == [[3, 1]] * 2


def test_one_that_fails_leaves_the_lock_to_the_next(tmp_path):
    def fail() -> StoredTable:
        raise DataError("bad row")

    for _ in range(2):
        with pytest.raises(DataError, match="bad row"):
            kept_table(tmp_path, "k", fail)
    assert kept_table(tmp_path, "k", lambda: StoredTable(table=table_of([]), facts={})).table.left_out == 0


def test_a_table_is_an_arrow_file_that_others_can_read(tmp_path):
    prompts = [
        Prompt(index=0, token_ids=np.array([3, 1, 2]), text="a", response_ids=np.array([9])),
        Prompt(index=4, token_ids=np.array([5]), text="Zoë", answer="1"),
    ]
    write_table(tmp_path / "a.arrow", StoredTable(table=table_of(prompts), facts={}))
    with pyarrow.memory_map(str(tmp_path / "a.arrow")) as source:
        rows = pyarrow.ipc.open_file(source).read_all().select(["token_ids", "response_ids", "text", "index"])
    assert rows.to_pylist() == [
        {"token_ids": [3, 1, 2], "response_ids": [9], "text": b"a", "index": 0},
        {"token_ids": [5], "response_ids": [], "text": "Zoë".encode(), "index": 4},
    ]


def test_tables_lie_where_the_variable_says_or_in_the_users_cache(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("MEGATRON_TROPD_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert default_directory() == Path("/home/ada/.cache/megatron_tropd")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/ada")
    assert default_directory() == Path("/var/ada/megatron_tropd")
    monkeypatch.setenv("MEGATRON_TROPD_CACHE", "/fast")
    assert default_directory() == Path("/fast")
