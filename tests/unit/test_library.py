"""What the package gives a program: names, a configuration of keywords, callbacks that are all called."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import megatron_tropd
from megatron_tropd import Callbacks, Config
from megatron_tropd.errors import ConfigError
from tests.support.run_inputs import ROOT

KEYS = {"run_dir": "run", "student": {"model": "s"}, "teacher": {"model": "t"}, "data": {"prompts": "p.jsonl"}}


def test_the_stub_and_the_package_name_the_same():
    stub = ast.parse((ROOT / "megatron_tropd" / "__init__.pyi").read_text())
    homes = {a.asname: n.module for n in stub.body if isinstance(n, ast.ImportFrom) for a in n.names}
    assert homes == megatron_tropd._HOMES
    for name, home in homes.items():
        there = getattr(importlib.import_module(home), name)
        assert getattr(megatron_tropd, name) is there or name in megatron_tropd._ROOMS


def test_the_package_alone_brings_in_nothing_and_its_rooms_can_be_called_whoever_imports_them_first():
    code = (
        "import sys, megatron_tropd\n"
        "assert not {'torch', 'pydantic', 'transformers'} & set(sys.modules)\n"
        "import megatron_tropd.train.hooks, megatron_tropd.evaluate as rules\n"
        "from megatron_tropd import train, evaluate\n"
        "assert train.hooks.Hooks and callable(train) and callable(evaluate) and evaluate is rules\n"
        "try: train('nowhere.yaml')\n"
        "except megatron_tropd.errors.ConfigError as error: print(error)\n"
        "try: megatron_tropd.trian\n"
        "except AttributeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "nowhere.yaml" in done.stdout and "has no attribute 'trian'" in done.stdout


def test_a_configuration_of_keywords_is_that_of_a_file(tmp_path: Path):
    from megatron_tropd.config.loading import load_config

    file = tmp_path / "my.yaml"
    file.write_text("run_dir: run\nstudent: {model: s}\nteacher: {model: t}\ndata: {prompts: p.jsonl}\n")
    changes = ["train.steps=7", "method.k=9"]
    expected = load_config(file, changes, check_paths=False).model_dump()
    assert Config(KEYS, train={"steps": 7}, method={"k": 9}).model_dump() == expected
    assert Config(**KEYS, train={"steps": 7}, method={"k": 9}).model_dump() == expected
    assert Config(file, *changes).model_dump() == expected
    nested = {"student": {"parallel": {"tensor": 2}}}
    assert str(Config(file, **nested).student.model) == "s" and Config(file, **nested).student.parallel.tensor == 2


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Config(KEYS, trian={"steps": 7}), ("trian", "train")),
        (lambda: Config(KEYS, train={"steps": 0}), ("train.steps", "0")),
        (lambda: Config(KEYS, "train.steps=3"), ("train.steps=3", "no file")),
        (lambda: Config(run_dir="run"), ("student",)),
    ],
    ids=["unknown key", "bad value", "override without a file", "missing key"],
)
def test_a_bad_configuration_of_keywords_has_the_message_of_a_file(build, words):
    with pytest.raises(ConfigError) as caught:
        build()
    assert all(word in str(caught.value) for word in words), caught.value


def test_callbacks_that_nothing_would_call_are_refused():
    from megatron_tropd.train.callbacks import check_callbacks

    class Misspelled(Callbacks):
        def on_steps(self) -> None: ...

    with pytest.raises(ConfigError, match="on_steps, which nothing calls"):
        check_callbacks(Misspelled())
    with pytest.raises(ConfigError, match="callbacks is function"):
        check_callbacks(lambda step: None)
    assert check_callbacks(mine := Callbacks()) is mine


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no row"),
        ([{"prompt": "a"}, "b"], "row 1 of prompts is str"),
        ([{"prompt": {1}}], "row 0 of prompts"),
    ],
    ids=["none", "no mapping", "not JSON"],
)
def test_rows_that_cannot_be_trained_on_are_named(tmp_path: Path, rows, message):
    from megatron_tropd.commands.api import _write_rows
    from megatron_tropd.errors import DataError

    with pytest.raises(DataError, match=message):
        _write_rows(tmp_path, rows)
    assert not list(tmp_path.iterdir())


def test_rows_are_written_once_under_the_name_of_their_content(tmp_path: Path):
    from megatron_tropd.commands.api import _write_rows

    rows = [{"prompt": "é", "answer": "2"}, {"prompt": "b"}]
    first = _write_rows(tmp_path, rows)
    assert first.read_text(encoding="utf-8") == '{"prompt": "é", "answer": "2"}\n{"prompt": "b"}\n'
    assert _write_rows(tmp_path, iter(rows)) == first and [*tmp_path.iterdir()] == [first]
    assert _write_rows(tmp_path, rows[::-1]) != first
