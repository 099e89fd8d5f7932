"""`tropd generate`: asks what training asks, goes on after a kill, and keeps the ids that were sampled."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_tropd.config.loading import load_config
from megatron_tropd.data.tokenizer import load_tokenizer
from megatron_tropd.setup.datasets import read_tokenizer, read_training_prompts
from megatron_tropd.types import ModelSource
from tests.support.run_inputs import Task, commands, make_task

ASKED = ('data.template="{{ prompt }}7"', "rollout.max_new_tokens=7", "seed=3", "dtype=fp32")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tmp_path_factory.mktemp("task"))


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_with_a_configuration_the_teacher_answers_what_training_asks_bit_for_bit(
    task: Task, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    bare = write(tmp_path / "bare.jsonl", [{"prompt": row["prompt"]} for row in read_rows(task.prompts)[:5]])
    out, changes = tmp_path / "out.jsonl", (*ASKED, f"data.prompts={bare}")
    outcome = commands().run("generate", task.config, out, *changes, "--limit", 4).expect_success()
    rows = read_rows(out)
    assert len(rows) == 4 and f"4 responses in {out} (" in outcome.output
    config = load_config(task.config, [*changes[:-1], f"data.prompts={out}"])
    tokenizer = read_tokenizer(config)
    with caplog.at_level(logging.WARNING):
        prompts = read_training_prompts(config, tokenizer, guided=True)
    for row, prompt in zip(rows, prompts, strict=True):
        assert prompt.text.endswith("7")
        assert prompt.response_ids.tolist() == row["generated"]["ids"]
        assert prompt.response_finished == row["finished"] == (row["generated"]["ids"][-1] in tokenizer.eos_ids)
    assert "another prompt" not in caplog.text
    # asked otherwise, that is said
    other = load_config(task.config, [f"data.prompts={out}"])
    with caplog.at_level(logging.WARNING):
        read_training_prompts(other, tokenizer, guided=True)
    assert "4 rows hold a response that `tropd generate` wrote to another prompt than this run" in caplog.text


def test_several_sources_have_a_file_each(task: Task, tmp_path: Path):
    sources = []
    for name, rows in (("one", read_rows(task.prompts)[:2]), ("two", read_rows(task.prompts)[2:5])):
        path = write(tmp_path / f"{name}.jsonl", [{"q": row["prompt"]} for row in rows])
        sources.append({"name": name, "prompts": str(path), "columns": {"prompt": "q", "response": "said"}})
    tree = yaml.safe_load(task.config.read_text())
    tree["data"] = {key: value for key, value in tree["data"].items() if key != "prompts"} | {"sources": sources}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(tree))
    commands().run("generate", tmp_path / "c.yaml", tmp_path / "out", "--max-new-tokens", 3).expect_success()
    assert [len(read_rows(tmp_path / "out" / f"{name}.jsonl")) for name in ("one", "two")] == [2, 3]
    assert set(read_rows(tmp_path / "out" / "one.jsonl")[0]) == {"q", "said", "said_finished", "said_generated"}


def test_a_killed_run_goes_on_and_ends_in_the_same_file(task: Task, tmp_path: Path):
    source = write(tmp_path / "p.jsonl", [{"prompt": row["prompt"]} for row in read_rows(task.prompts)[:9]])
    options = ("--max-new-tokens", 2, "--samples", 100, "--dtype", "fp32")  # blocks of two prompts
    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    commands().run("generate", task.student, source, whole, *options).expect_success()
    lines = whole.read_bytes().splitlines(keepends=True)
    assert len(lines) == 900

    # what a run leaves that was killed in the middle of a row of its third block
    partial, about = tmp_path / "out.jsonl.partial", tmp_path / "out.jsonl.partial.json"
    stopped = ("generate", task.student, source, out, *options)
    commands().run(*stopped[:-2], "--dtype", "fp32", "--limit", 1).expect_success()
    out.unlink()
    partial.write_bytes(b"".join(lines[:450]) + lines[450][:30])
    refused = commands().run(*stopped)
    assert refused.status == 2 and "was started with other settings" in refused.output
    partial.unlink()
    shutil.copy(_description_of(task, source, options, tmp_path), about)
    partial.write_bytes(b"".join(lines[:450]) + lines[450][:30])

    outcome = commands().run(*stopped).expect_success()

    assert "has the responses to 4 prompts: continued from there" in outcome.output
    assert out.read_bytes() == whole.read_bytes()
    assert not partial.exists() and not about.exists()
    other = commands().run("generate", task.student, source, out, "--max-new-tokens", 2, "--dtype", "fp32")
    assert f"the file that was there is kept as {out}.1" in other.expect_success().output
    assert (tmp_path / "out.jsonl.1").read_bytes() == whole.read_bytes()


def _description_of(task: Task, source: Path, options: tuple[Any, ...], tmp_path: Path) -> Path:
    """The description that such a run writes before its first row."""
    from megatron_tropd.commands import generate
    from megatron_tropd.data.response_file import ResponseFile
    from megatron_tropd.data.rows import Source
    from megatron_tropd.types import SamplingParams

    source_ = generate._unanswered(Source(paths=(source,)))
    tokenizer = load_tokenizer(task.student)
    sampling = generate.Sampling(params=SamplingParams(max_new_tokens=2), samples=100, dtype="fp32")
    job = generate._Job(
        model=ModelSource(task.student), source=source_, out=tmp_path / "d.jsonl", column="response",
        tokenizer=tokenizer,
        stops=tuple(tokenizer.eos_ids), limits=generate.Limits(), on_bad_row="skip",
    )  # fmt: skip
    ResponseFile(job.out, generate._description(job, generate._read(job, sampling), sampling))
    return tmp_path / "d.jsonl.partial.json"


def test_one_bad_row_costs_one_row(task: Task, tmp_path: Path):
    prompts = [row["prompt"] for row in read_rows(task.prompts)[:3]]
    lines = [json.dumps({"prompt": text, "note": "\ud83d"}) for text in prompts]  # half a character, beside the prompt
    (tmp_path / "p.jsonl").write_text("\n".join([*lines, '{"prompt": "\\ud800"}', '{"torn']) + "\n")
    out = tmp_path / "out.jsonl"
    outcome = commands().run("generate", task.student, tmp_path / "p.jsonl", out, "--max-new-tokens", 2)
    rows = read_rows(out)
    assert [row["prompt"] for row in rows] == prompts and rows[0]["note"] == "\ud83d"
    assert "2 bad" in outcome.expect_success().output and "p.jsonl:4: " in outcome.output


def test_a_model_that_gives_nan_is_refused_before_anything_is_written(task: Task, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(task.student, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    outcome = commands().run("generate", broken, task.prompts, tmp_path / "out.jsonl", "--max-new-tokens", 2)
    assert outcome.status == 2 and "gives a log-prob of nan" in outcome.output
    assert not (tmp_path / "out.jsonl").exists()
    suite = write(tmp_path / "s.yaml", [])
    suite.write_text(f"name: s\nprompts: {task.prompts}\nmax_new_tokens: 2\n")
    outcome = commands().run("evaluate", broken, "--suite", suite)
    assert outcome.status == 2 and "gives a log-prob of nan" in outcome.output


MISTAKES = [
    ("generate CONFIG seed=3", "seed=3 stands where the file to write is expected"),
    ("generate CONFIG OUT --system S", "--system is for a model; with a configuration set data.*"),
    ("generate CONFIG OUT data.columns.response=answer", "is also the column of the prompt or the answer"),
    ("generate MODEL PROMPTS", "tropd generate MODEL takes PROMPTS and OUT, got 1"),
    ("generate MODEL PROMPTS OUT --template-option x", "--template-option is x: give name=value"),
    ("generate MODEL PROMPTS OUT --engine recorded", "--engine is recorded: use one of megatron, vllm."),
    ("generate MODEL PROMPTS OUT --engine vllm", "vLLM is not installed in this environment"),
    ("generate MODEL PROMPTS OUT --limit 0", "--limit is 0: answer at least 1 prompt"),
]


@pytest.mark.parametrize(("command", "message"), MISTAKES, ids=[command for command, _ in MISTAKES])
def test_what_does_not_go_together_is_refused(task: Task, tmp_path: Path, command: str, message: str):
    names = {"CONFIG": task.config, "MODEL": task.student, "PROMPTS": task.prompts, "OUT": tmp_path / "out.jsonl"}
    outcome = commands().run(*(names.get(word, word) for word in command.split()))
    assert outcome.status == 2 and message in " ".join(outcome.output.split())
