"""What rows and messages hold and nobody reads is said once, and what may mean two things is refused."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_tropd.data.prompts import Limits, read_prompts, read_sources
from megatron_tropd.data.rows import Source
from megatron_tropd.data.tokenizer import Tokenizer, load_tokenizer
from megatron_tropd.errors import DataError
from tests.support.chat_families import save_byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(save_byte_tokenizer(tmp_path_factory.mktemp("tok"), template=TEMPLATE, pad_token="<pad>"))


def read(tmp_path: Path, tokenizer: Tokenizer, *rows: Any) -> Any:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return read_prompts(file, tokenizer).prompts


def asked(prompts: Any, tokenizer: Tokenizer) -> str:
    return "".join(tokenizer.tokens(prompts[0].token_ids.tolist()))


CALL = [{"role": "user", "content": "Hi"}]


@pytest.mark.parametrize("column", ["prompt", "messages"])
def test_a_conversation_spelled_as_json_is_read_as_its_messages(tmp_path, tokenizer, caplog, column: str):
    assert asked(read(tmp_path, tokenizer, {column: json.dumps(CALL)}), tokenizer) == "[user]Hi<eos>[assistant]"
    assert "1 row holds a conversation as JSON text: read as its messages" in caplog.text


def test_text_that_only_begins_like_json_stays_text(tmp_path, tokenizer):
    assert asked(read(tmp_path, tokenizer, {"prompt": '[{"a": 1}] sums?'}), tokenizer).startswith('[user][{"a"')


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "A", "messages": CALL}, "has a prompt and messages: the prompt is read"),
        ({"prompt": "A", "input": "B"}, "has a column 'input', which nothing reads; data.columns.prompt or"),
        ({"prompt": "A", "output": "B"}, "has a column 'output', which nothing reads; data.columns.response"),
        ({"prompt": "A", "response": "B", "truncated": True}, "has a column 'truncated', which nothing reads"),
        ({"prompt": "A", "response": "B", "finish_reason": "weird"}, "says finish_reason 'weird', which is not known"),
        ({"messages": [{"role": "User", "content": "A"}]}, "has a message whose role is none of system, developer"),
        ({"messages": [{"role": "user", "content": "A", "weight": 2}]}, "has a message with the field 'weight'"),
    ],
)
def test_what_nobody_reads_is_said(tmp_path, tokenizer, caplog, row, said: str):
    read(tmp_path, tokenizer, row)
    assert said in caplog.text


def test_usual_rows_say_nothing(tmp_path, tokenizer, caplog):
    call = [{"id": "1", "function": {"name": "f"}}]
    tool = {"role": "tool", "content": "3", "tool_call_id": "1"}
    read(tmp_path, tokenizer, {"messages": [*CALL, {"role": "assistant", "content": "f()"}, tool]}, {"prompt": "A"})
    assert caplog.text == "" and call


@pytest.mark.parametrize("field", ["finish_reason", "stop_reason"])
@pytest.mark.parametrize(
    ("reason", "ends"), [("length", False), ("max_tokens", False), ("MAX_TOKENS", False), ("stop", True), (None, True)]
)
def test_a_response_that_a_server_says_was_cut_gets_no_end(tmp_path, tokenizer, field, reason, ends: bool):
    prompts = read(tmp_path, tokenizer, {"prompt": "A", "response": "ab", field: reason})
    assert ("".join(tokenizer.tokens(prompts[0].response_ids.tolist())) == "ab<eos>") is ends


def test_a_key_that_is_there_twice_is_refused(tmp_path, tokenizer):
    with pytest.raises(DataError, match="has the key 'prompt' twice"):
        read(tmp_path, tokenizer, '{"prompt": "A", "prompt": "B"}')


def tar_of(name: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.db", b"SQLite format 3\x00" + bytes(90), "an SQLite database"),
        ("x.pkl", b"\x80\x04\x95", "a pickle, which is never loaded"),
        ("x.avro", b"Obj\x01\x04\x16", "an Avro file"),
        ("x.tar", tar_of("x.jsonl"), "a tar archive. Unpack it: `tar xf"),
        ("x.tar.gz", gzip.compress(tar_of("x.jsonl"), mtime=0), "a tar archive. Unpack it: `tar xf"),
        ("x.yaml", b"- prompt: Hi\n", "no JSON lines, by its name and its first character"),
        ("x.jsonl.bz2", bz2.compress(b"{}"), "compressed with bzip2"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.startswith("x.") else "",  # contents are no names
)
def test_files_of_another_kind_are_named(tmp_path, tokenizer, name: str, content: bytes, said: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=said):
        read_prompts(tmp_path / name, tokenizer)


def test_as_many_rows_as_were_wanted_are_enough_however_many_were_passed_over(tmp_path, tokenizer, caplog):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": "long " * 9}) + "\n" for _ in range(20)) + '{"prompt": "A"}\n' * 2)
    source = Source(paths=(file,))
    limits = Limits(max_prompt_tokens=30, max_rows=2)
    assert len(read_sources([source], tokenizer, limits=limits).prompts) == 2
    assert "left out 20 longer than 30 tokens" in caplog.text
    with pytest.raises(DataError, match="of 22 rows 20 are left out"):
        read_sources([source], tokenizer, limits=replace(limits, max_rows=None))
