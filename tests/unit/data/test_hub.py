"""Names on the hub, against one on loopback: what a name means, what is fetched, and what is said of what is not."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_tropd.convert.hub import Parts, check_push, fetch_model, push_model
from megatron_tropd.data import hub as hub_room
from megatron_tropd.data.files import read_rows
from megatron_tropd.data.hub import HubName, commit_of, dataset_files, hub_name
from megatron_tropd.errors import ConfigError, StorageError
from tests.support.hub import Hub, serving, using_hub

FILES = {
    "config.json": b'{"model_type": "qwen3"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "model.safetensors": bytes(range(251)) * 400,
    "chat_template.jinja": b"{{ x }}",
    "additional_chat_templates/tool.jinja": b"{{ y }}",
    # what is left where it is
    "pytorch_model.bin": b"\x80\x02",
    "modeling_own.py": b"raise SystemExit",
    "README.md": b"# own",
    "original/config.json": b"{}",
    "fp16/model.safetensors": b"",
    "consolidated.safetensors": b"",
}
CARD = b"""---
configs:
- {config_name: main, data_files: [{split: train, path: main/train.jsonl}, {split: test, path: main/test.jsonl}]}
- {config_name: torn, data_files: [{split: train, path: torn/train.jsonl}]}
---
"""
ROWS = [{"question": f"{i} + 1", "answer": str(i + 1)} for i in range(5)]
LINES = [json.dumps(row).encode() + b"\n" for row in ROWS]
SUMS = {"README.md": CARD, "main/train.jsonl": b"".join(LINES), "main/test.jsonl": LINES[0], "torn/train.jsonl": b'{"'}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub, and caches of this test's own in ``tmp_path``."""
    monkeypatch.setenv("MEGATRON_TROPD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with serving() as hub, using_hub(hub.url, tmp_path):
        yield hub


def fetched(text: str, parts: Parts = "all") -> Path:
    name = hub_name(text, "model")
    assert name is not None
    return fetch_model(name.at(commit_of(name, key="student.model")), parts=parts, key="student.model")


def rows(text: str) -> list[object]:
    name = hub_name(text, "dataset")
    assert name is not None
    files = dataset_files(name.at(commit_of(name, key="data.prompts")), key="data.prompts")
    return [row.content for file in files for row in read_rows(file, columns=None)]


# --------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Qwen/Qwen3-8B", ("Qwen/Qwen3-8B", None, None, None)),
        ("Qwen/Qwen3-8B@v1.0", ("Qwen/Qwen3-8B", "v1.0", None, None)),
        ("a/b@refs/pr/3", ("a/b", "refs/pr/3", None, None)),
        ("openai/gsm8k:main:train", ("openai/gsm8k", None, "main", "train")),
        ("openai/gsm8k@v2:main:train", ("openai/gsm8k", "v2", "main", "train")),
        ("openai/gsm8k:main", ("openai/gsm8k", None, "main", None)),
        *((path, None) for path in ("model", "./own/model", "/abs/model", "a/b/c", "../x/y", "data/*.jsonl", "a/b@")),
    ],
)
def test_a_name_says_repository_revision_configuration_and_split(text, expected):
    found = hub_name(text, "dataset")
    assert (found and (found.repo, found.revision, found.config, found.split)) == expected
    assert found is None or str(found) == text


def test_what_lies_on_this_machine_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert hub_name("own/tiny", "model") == HubName("model", "own/tiny")
    (tmp_path / "own" / "tiny").mkdir(parents=True)
    assert hub_name("own/tiny", "model") is None
    assert hub_name("own/sums:main:train", "model") is None  # of models there are no splits


# --------------------------------------------------------------------------- models


def test_a_model_is_its_safetensors_config_and_tokenizer_and_no_code(hub: Hub):
    commit = hub.model("own/tiny").push(FILES)
    directory = fetched("own/tiny")
    there = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    assert there == {name: data for name, data in FILES.items() if name in [*FILES][:6]}
    assert directory.name == commit


def test_a_plan_fetches_the_config_alone_and_a_check_no_weights(hub: Hub):
    hub.model("own/tiny").push(FILES)
    assert {path.name for path in fetched("own/tiny", "config").iterdir()} == {"config.json"}
    fetched("own/tiny", "tokenizer")
    assert hub.asked("tokenizer.json") == 1 and hub.asked("model.safetensors") == 0


def test_a_commit_that_is_here_is_not_asked_for_again_and_a_branch_only_what_it_means(hub: Hub):
    commit = hub.model("own/tiny").push(FILES)
    directory = fetched("own/tiny")
    hub.requests.clear()
    assert fetched(f"own/tiny@{commit}") == directory and hub.requests == []
    assert fetched("own/tiny@main") == directory
    assert [line for line in hub.requests if "agent" not in line] == ["GET /api/models/own/tiny/revision/main"]


def test_a_download_that_is_cut_off_is_taken_up_again(hub: Hub):
    hub.model("own/tiny").push(FILES)
    hub.cut["model.safetensors"] = 30_000
    assert (fetched("own/tiny") / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert hub.asked("model.safetensors") == 2


def test_a_branch_that_moves_is_another_commit(hub: Hub):
    repo = hub.model("own/tiny")
    first, second = repo.push(FILES), repo.push({**FILES, "config.json": b'{"model_type": "llama"}'})
    assert fetched("own/tiny").name == second and fetched(f"own/tiny@{first}").name == first


# --------------------------------------------------------------------------- what is not to be had


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("own/none", ("there is nothing at /", "own/none", "has no model own/none", "no token is set")),
        ("own/tiny@v9", ("own/tiny has no revision 'v9'",)),
        ("own/gated", ("is gated", "no token is set", "/own/gated", "hf auth login", "HF_TOKEN")),
        ("own/pickled", ("no model.safetensors", "Pickles are not read")),
        ("own/nothing", ("no config.json",)),
    ],
)
def test_a_model_that_is_not_to_be_had_is_named_with_the_reason(hub: Hub, text, words):
    hub.model("own/tiny").push(FILES)
    hub.model("own/gated", gated=True).push(FILES)
    hub.model("own/pickled").push({"config.json": b"{}", "pytorch_model.bin": b"\x80"})
    hub.model("own/nothing").push({"README.md": b""})
    with pytest.raises(ConfigError) as caught:
        fetched(text)
    assert str(caught.value).startswith(f"student.model = '{text}'")
    assert all(word in str(caught.value) for word in words), caught.value


def test_offline_takes_what_is_cached_and_says_what_is_not(hub: Hub, tmp_path: Path, caplog):
    commit = hub.model("own/tiny").push(FILES)
    hub.model("own/other").push(FILES)
    directory = fetched("own/tiny")
    hub.requests.clear()
    with using_hub(hub.url, tmp_path, offline=True):
        assert fetched("own/tiny") == fetched(f"own/tiny@{commit}") == directory
        assert commit in caplog.text and "HF_HUB_OFFLINE is set" in caplog.text
        with pytest.raises(ConfigError, match=r"there is nothing at /.*not cached here: HF_HUB_OFFLINE is set"):
            fetched("own/other")
    assert hub.requests == []


def test_a_hub_that_is_not_reached_leaves_what_is_cached(hub: Hub, tmp_path: Path, caplog):
    hub.model("own/tiny").push(FILES)
    directory = fetched("own/tiny")
    with using_hub("http://127.0.0.1:9", tmp_path):  # the port to discard to, where nobody listens
        assert fetched("own/tiny") == directory and "cannot be reached" in caplog.text
        with pytest.raises(ConfigError, match=r"not cached here: http://127.0.0.1:9 cannot be reached"):
            fetched("own/other")


# --------------------------------------------------------------------------- data sets


def test_a_split_of_a_data_set_is_its_rows(hub: Hub):
    hub.dataset("own/sums").push(SUMS)
    assert rows("own/sums:main:train") == ROWS and rows("own/sums:main:test") == ROWS[:1]
    hub.requests.clear()
    assert rows(f"own/sums@{hub.repos['datasets', 'own/sums'].refs['main']}:main:train") == ROWS
    assert hub.requests == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("own/sums:main:val", ("has no split 'val'", "train, test", "own/sums:main:train")),
        ("own/sums:main", ("names no split", "own/sums:main:train")),
        ("own/sums:other:train", ("'other' not found", "main")),
        ("own/sums:torn:train", ("cannot be read by `datasets`", "JSON parse error")),
        ("own/none:main:train", ("there is nothing at /", "has no data set own/none")),
    ],
)
def test_rows_that_are_not_to_be_had_are_named_with_the_reason(hub: Hub, text, words):
    hub.dataset("own/sums").push(SUMS)
    with pytest.raises(ConfigError) as caught:
        rows(text)
    assert str(caught.value).startswith(f"data.prompts = '{text}'")
    assert all(word in str(caught.value) for word in words), caught.value


def test_ranks_of_a_launch_ask_once_what_a_branch_means(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    repo = hub.model("own/tiny")
    first = repo.push(FILES)
    monkeypatch.setenv("RANK", "0")
    name = hub_name("own/tiny", "model")
    assert name is not None and commit_of(name, key="m") == first
    repo.push({"config.json": b"{}"})
    monkeypatch.setenv("RANK", "1")  # a rank that comes later, when the branch has moved
    assert commit_of(name, key="m") == first
    monkeypatch.delenv("RANK")
    assert commit_of(name, key="m") == repo.refs["main"] != first


def test_names_compare_by_what_they_mean():
    name = HubName("model", "a/b", "main")
    assert name.at("0" * 40) == HubName("model", "a/b", "0" * 40) and name.at("0" * 40).written == "a/b@main"
    assert dataclasses.replace(name, revision=None) != name


# --------------------------------------------------------------------------- pushing


def exported(directory: Path) -> Path:
    from megatron_tropd.storage.owned import mark_directory

    directory.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (directory / name).write_bytes(FILES[name])
    (directory / "README.md").write_text("---\nlibrary_name: transformers\n---\n# tiny\n")
    mark_directory(directory, kind="Hugging Face model")
    return directory


@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")  # huggingface_hub's
def test_an_export_is_pushed_as_one_commit_and_fetched_again(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
    check_push("own/new")
    export = exported(tmp_path / "export")
    url = push_model(export, "own/new", private=True, message="tropd, 6 steps")
    repo = hub.model("own/new")
    there = repo.commits[repo.refs["main"]]
    assert there == {path.name: path.read_bytes() for path in export.iterdir() if not path.name.startswith(".")}
    assert repo.private and [push["summary"] for push in hub.pushes] == ["tropd, 6 steps"]
    assert url == f"{hub.url}/own/new/commit/{repo.refs['main']}"
    assert (fetched("own/new") / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    assert export.exists()


def test_a_push_that_is_refused_leaves_the_export_and_says_how_to_go_about_it(hub: Hub, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_of_this_test")
    hub.readers_only = True
    export = exported(tmp_path / "export")
    with pytest.raises(StorageError, match=r"own/new'.*403.*The export is whole, in .*hf upload own/new"):
        push_model(export, "own/new", private=True, message="m")
    assert (export / "model.safetensors").exists() and hub.pushes == []


def test_a_push_without_a_token_or_offline_is_refused_before_the_run(hub: Hub, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"no token is set.*hf auth login"):
        check_push("own/new")
    with using_hub(hub.url, tmp_path, offline=True), pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        check_push("own/new")


def test_a_note_drops_those_of_launches_long_gone_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MEGATRON_TROPD_CACHE", str(tmp_path))
    notes = tmp_path / "hub"
    notes.mkdir()
    names = ("commit-old.json", "commit-old.lock", "newest-a.json", "mine.json")
    for name in names:
        (notes / name).write_text("1")
        os.utime(notes / name, (0, 0))
    (notes / "commit-new.json").write_text("1")
    hub_room._write(notes / "commit-own.json", "c")
    assert {path.name for path in notes.iterdir()} == {*names[1:], "commit-new.json", "commit-own.json"}
