"""Whole runs by names on a hub: what is fetched, and that a run that resumes takes the commits it began with."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.hub import Hub, folder, serving, use_hub
from tests.support.run_inputs import Task, commands, make_task, steady_metrics

CARD = b"---\nconfigs:\n- {config_name: main, data_files: [{split: train, path: train.jsonl}]}\n---\n"
QUIET = ("report.samples=0", "report.html=false", "evaluate.prompts=null")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tmp_path_factory.mktemp("task"))


@pytest.fixture
def hub(task: Task) -> Iterator[Hub]:
    with serving() as hub:
        hub.model("own/student").push(folder(task.student))
        hub.model("own/teacher").push(folder(task.teacher))
        hub.dataset("own/sums").push({"README.md": CARD, "train.jsonl": task.prompts.read_bytes()})
        yield hub


def tropd_with_hub(url: str, home: str, arguments: list[str]) -> None:
    """The command line, in a process whose libraries know this hub."""
    use_hub(url, home)
    from megatron_tropd.cli import main

    sys.argv = ["tropd", *arguments]
    main()


def run(hub: Hub, home: Path, *arguments: object, ranks: int = 0):
    call = (hub.url, str(home), [str(argument) for argument in arguments])
    cache = {"MEGATRON_TROPD_CACHE": str(home / "cache")}
    return (
        commands()
        .start(json.dumps(call), ranks=ranks, function="tests.runs.test_hub_names:tropd_with_hub", **cache)
        .wait()
    )


NAMES = ("student.model=own/student", "teacher.model=own/teacher", "data.prompts=own/sums:main:train")


def test_a_run_by_names_is_that_of_the_files_and_resumes_at_its_commits(task: Task, hub: Hub, tmp_path: Path):
    by_files = commands().start("train", task.config, f"run_dir={tmp_path}/files", *QUIET)
    first = ("train", task.config, f"run_dir={tmp_path}/run", *QUIET, *NAMES)
    half = run(hub, tmp_path, *first, "train.steps=6", "optimizer.schedule=linear")
    half.expect_success()
    by_files.wait().expect_success()
    assert steady_metrics(tmp_path / "run") == steady_metrics(tmp_path / "files")
    commits = {name: repo.refs["main"] for (_, name), repo in hub.repos.items()}
    noted = json.loads((tmp_path / "run" / "hub.json").read_text())
    expected = {"own/student": commits["own/student"], "own/teacher": commits["own/teacher"]}
    assert noted == expected | {"own/sums:main:train": commits["own/sums"]}
    written = (tmp_path / "run" / "config.yaml").read_text()
    assert f"model: own/student@{commits['own/student']}" in written
    assert f"- own/sums@{commits['own/sums']}:main:train" in written

    # the branches move on: the run does not
    hub.model("own/student").push({**folder(task.student), "config.json": b"{}"})
    hub.dataset("own/sums").push({"README.md": CARD, "train.jsonl": b'{"prompt": "1+1="}\n'})
    again = run(hub, tmp_path, *first)
    assert "(6 steps done)" in again.expect_success().output


def test_the_ranks_of_a_host_fetch_once_and_a_plan_fetches_no_weights(task: Task, hub: Hub, tmp_path: Path):
    two = ("student.parallel.tensor=2", "teacher.parallel.tensor=2", "train.steps=1", "optimizer.warmup_steps=0")
    checked = run(hub, tmp_path, "check", task.config, f"run_dir={tmp_path}/run", *QUIET, *NAMES, *two)
    assert "own/student" in checked.expect_success().output and hub.asked("model.safetensors") == 0
    command = ("train", task.config, f"run_dir={tmp_path}/run", *QUIET, *NAMES, *two, "checkpoint.every=0")
    run(hub, tmp_path, *command, ranks=2).expect_success()
    assert hub.asked("model.safetensors") == 2 and hub.asked("train.jsonl") == 1  # one of each model
    assert sum(line.startswith("GET /api/models/own/student") for line in hub.requests) <= 4


def test_a_name_that_is_neither_here_nor_there_says_both(task: Task, hub: Hub, tmp_path: Path):
    refused = run(hub, tmp_path, "train", task.config, f"run_dir={tmp_path}/run", "student.model=own/studnet")
    assert refused.status == 2 and not (tmp_path / "run").exists()
    assert "student.model = 'own/studnet': there is nothing at /" in refused.output
    assert "has no model own/studnet" in refused.output
