"""Files of another kind are told what they are, and how to make one that can be read."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from megatron_tropd.convert.hf import HFWeights, read_architecture
from megatron_tropd.data.files import find_files, read_rows
from megatron_tropd.data.tokenizer import load_tokenizer
from megatron_tropd.errors import CheckpointError, DataError, TokenizerError
from tests.support.chat_families import save_byte_tokenizer

ROWS = [{"prompt": "a"}, {"prompt": "b"}]
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 123\n"
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def rows_of(path: Path) -> list[Any]:
    return [(row.number, row.content) for row in read_rows(path, columns=None)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("plain.jsonl", LINES),
        ("lines.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("unnamed", gzip.compress(LINES, mtime=0)),
        ("array.json", json.dumps(ROWS).encode()),
        ("pretty.json", b"\xef\xbb\xbf \n" + json.dumps(ROWS, indent=1).encode()),
        ("array.json.gz", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
    ],
)
def test_lines_and_arrays_are_read_also_under_gzip(tmp_path: Path, name: str, content: bytes):
    (tmp_path / name).write_bytes(content)
    assert rows_of(tmp_path / name) == [(1, ROWS[0]), (2, ROWS[1])]
    assert find_files(tmp_path / name) == [tmp_path / name]


KINDS = {
    "lfs.jsonl": (LFS, "a Git LFS pointer, not the file itself. Run `git lfs pull`"),
    "lfs.parquet": (LFS, "a Git LFS pointer"),
    "page.jsonl": (b"\n<!DOCTYPE html><html>", "a web page: the download went wrong"),
    "a.jsonl.zst": (b"\x28\xb5\x2f\xfd1234", "compressed with zstd. Unpack it: `unzstd"),
    "a.zip": (b"PK\x03\x04rest", "a zip archive"),
    "table.jsonl": (b"PAR1rest", "a table in Parquet's format. Give it the ending .parquet"),
    "utf16.jsonl": (LINES.decode().encode("utf-16"), "text in UTF-16, or no text at all"),
    "utf16le.jsonl": (LINES.decode().encode("utf-16-le"), "text in UTF-16, or no text at all"),
    "a.csv": (b"prompt,answer\n", "a CSV table, not JSON lines"),
    "a.tsv": (b"prompt\tanswer\n", r"dtype=str, sep='\\t'"),
    "unnamed": (b"prompt,answer\na,1\n", "a CSV table, not JSON lines"),
    "object.json": (b'{\n "prompt": "a"\n}\n', "JSON over several lines"),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_file_of_another_kind_is_called_what_it_is(tmp_path: Path, name: str):
    content, message = KINDS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path / name)
    assert f"{tmp_path / name} is " in str(caught.value) and message.replace("\\\\", "\\") in str(caught.value)


def test_a_torn_gzip_file_is_torn_and_lines_of_arrays_are_told_one_by_one(tmp_path: Path):
    (tmp_path / "torn.gz").write_bytes(gzip.compress(LINES * 99, mtime=0)[:-9])
    with pytest.raises(DataError, match="is torn, or no gzip file"):
        rows_of(tmp_path / "torn.gz")
    (tmp_path / "arrays.jsonl").write_text('["a"]\n["b"]\n')
    assert [str(content) for _, content in rows_of(tmp_path / "arrays.jsonl")] == [
        "holds list, expected a JSON object with a prompt."
    ] * 2


def test_models_that_are_pointers_or_adapters_are_called_so(tmp_path: Path):
    directory = save_byte_tokenizer(tmp_path / "model")
    (directory / "model.safetensors").write_bytes(LFS)
    with pytest.raises(CheckpointError, match=r"model.safetensors is a Git LFS pointer"):
        HFWeights(directory)
    (directory / "config.json").write_bytes(LFS)
    with pytest.raises(CheckpointError, match=r"config.json is a Git LFS pointer"):
        read_architecture(directory)
    (directory / "config.json").write_text("{}")
    (directory / "tokenizer.json").write_bytes(LFS)
    with pytest.raises(TokenizerError, match=r"tokenizer.json is a Git LFS pointer"):
        load_tokenizer(directory)
    lora = tmp_path / "lora"
    lora.mkdir()
    (lora / "adapter_config.json").write_text("{}")
    for read, error in ((read_architecture, CheckpointError), (load_tokenizer, TokenizerError)):
        with pytest.raises(error, match=r"lora is a LoRA adapter, not a whole model. Merge it"):
            read(lora)
