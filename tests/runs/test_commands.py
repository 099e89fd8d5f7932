"""Commands as a user runs them: what they write and print, and one readable message and exit status 2 for a mistake."""

from __future__ import annotations

import datetime
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from typer.testing import CliRunner

from megatron_tropd import cli
from megatron_tropd.config.loading import load_config
from megatron_tropd.config.sections import SuiteConfig
from megatron_tropd.errors import ConfigError, DataError
from megatron_tropd.evaluate.suites import Answered, summarize
from megatron_tropd.methods import PRESETS
from megatron_tropd.parallel import torchrun
from megatron_tropd.storage.locks import take_lock
from megatron_tropd.storage.owned import UNFINISHED, start_unfinished
from tests.support.run_inputs import TEACHER, Task, commands, make_task, save_model

CHECK = "check"  # reads and refuses what train does, without a world to fit


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tmp_path_factory.mktemp("task"))


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --------------------------------------------------------------------------- generate


def test_generate_adds_a_response_to_every_row_and_keeps_the_rest(task: Task, tmp_path: Path):
    rows = read_rows(task.prompts)
    source, out = tmp_path / "prompts.jsonl", tmp_path / "new" / "out.jsonl"
    # as files come: a byte-order mark, blank lines, a stale response, columns of any kind
    lines = [json.dumps({**row, "response": "", "answer": [1], "source": "ä"}, ensure_ascii=False) for row in rows]
    source.write_text("\ufeff" + "\n\n".join(lines) + "\n", encoding="utf-8")
    command = ("generate", task.teacher, source, out, "--max-new-tokens", 9, "--samples", 2, "--dtype", "fp32")

    outcome = commands().run(*command).expect_success()

    written = read_rows(out)
    assert [row["prompt"] for row in written] == [row["prompt"] for row in rows for _ in range(2)]
    assert all(row["answer"] == [1] and row["source"] == "ä" for row in written)
    assert all(isinstance(row["response"], str) for row in written)
    assert len({row["response"] for row in written}) > len(rows)
    assert f"{len(written)} responses in {out} (" in outcome.output
    assert [path.name for path in out.parent.iterdir()] == ["out.jsonl"]

    # the same responses from two ranks; the file may be replaced by itself
    commands().run(*command, ranks=2).expect_success()
    assert read_rows(out) == written
    commands().run("generate", task.teacher, out, out, "--max-new-tokens", 3, "--dtype", "fp32").expect_success()
    assert len(read_rows(out)) == len(written) and read_rows(out) != written


def test_generate_reads_what_training_reads_and_writes_json_lines(task: Task, tmp_path: Path):
    rows = [{"prompt": row["prompt"], "day": datetime.date(2026, 6, 1)} for row in read_rows(task.prompts)]
    (tmp_path / "in").mkdir()
    for part in range(2):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows[part::2]), tmp_path / "in" / f"{part}.parquet")
    options = ("--max-new-tokens", 3, "--temperature", 0, "--dtype", "fp32")
    commands().run("generate", task.student, tmp_path / "in", tmp_path / "a.jsonl", *options).expect_success()
    commands().run("generate", task.student, task.prompts, tmp_path / "b.jsonl", *options).expect_success()
    expected = {row["prompt"]: row["response"] for row in read_rows(tmp_path / "b.jsonl")}
    assert [(row["prompt"], row["day"], row["response"]) for row in read_rows(tmp_path / "a.jsonl")] == [
        (row["prompt"], "2026-06-01", expected[row["prompt"]]) for row in rows[::2] + rows[1::2]
    ]


def test_greedy_answers_are_those_of_transformers(task: Task, tmp_path: Path):
    out = tmp_path / "out.jsonl"
    options = ("--max-new-tokens", 20, "--temperature", 0, "--dtype", "fp32")
    commands().run("generate", task.student, task.prompts, out, *options).expect_success()
    commands().call(compare_with_transformers, task.student, out, 20)


def compare_with_transformers(model: str, out: str, budget: int) -> None:
    """Runs beside the program: the responses in ``out`` are what ``transformers`` decodes greedily."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    rows = read_rows(Path(out))
    assert len(rows) > 4
    for row in rows:
        chat = [{"role": "user", "content": row["prompt"]}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        answer = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=budget,
            pad_token_id=0,
            eos_token_id=tokenizer.eos_token_id,
        )
        said = answer[0, ids.shape[1] :].tolist()
        end = said.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in said else len(said)
        assert tokenizer.decode(said[:end], skip_special_tokens=False) == row["response"]  # marks are part of it


# --------------------------------------------------------------------------- evaluate


def test_evaluate_grades_both_models_and_leaves_the_results_of_a_training_run_alone(task: Task, tmp_path: Path):
    # three of five reference answers are what the student says, none is what the teacher says
    said = tmp_path / "said.jsonl"
    options = ("--max-new-tokens", 11, "--temperature", 0, "--dtype", "fp32")
    commands().run("generate", task.student, task.directory / "heldout.jsonl", said, *options).expect_success()
    problems = tmp_path / "problems.jsonl"
    rows = [
        {"prompt": row["prompt"], "answer": row["response"].strip() if number < 3 else "never"}
        for number, row in enumerate(read_rows(said))
    ]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ("evaluate", task.config, f"evaluate.prompts={problems}", "data.grader=exact", f"run_dir={tmp_path}/run")

    outcome = commands().run(*command).expect_success()

    # 95 % Wilson interval of 3 out of 5, by hand
    assert "60.0 [23.1, 88.2]" in outcome.output
    assert "student before, sampled: mean length " in outcome.output and "pass@2" not in outcome.output
    recorded = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    greedy = {row["model"]: row["accuracy"] for row in recorded if row["suite"] == "greedy"}
    assert greedy == {"student before": 0.6, "teacher": 0.0}

    (tmp_path / "run" / "config.yaml").touch()  # what a run that has just begun has left
    again = commands().run(*command, "evaluate.max_problems=2", ranks=2).expect_success()
    assert "100.0" in again.output and "is left as it is" in again.output
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text()) == recorded
    assert again.outputs[1] == ""


def test_a_teacher_with_another_template_answers_in_a_run_s_evaluation_as_it_does_alone(task: Task, tmp_path: Path):
    teacher = tmp_path / "other"
    shutil.copytree(task.teacher, teacher)
    settings = json.loads((teacher / "tokenizer_config.json").read_text())
    settings["chat_template"] = settings["chat_template"].replace("<|user|>", "<|user|>9: ")
    (teacher / "tokenizer_config.json").write_text(json.dumps(settings))
    suite = tmp_path / "suite.yaml"
    suite.write_text(f"name: greedy\nprompts: {task.directory}/heldout.jsonl\nmax_new_tokens: 11\nmax_problems: 3\n")
    commands().run("evaluate", teacher, "--suite", suite, "--out", tmp_path, "--dtype", "fp32").expect_success()
    here = (f"teacher.model={teacher}", f"run_dir={tmp_path}/run", f"evaluate.suites=[{{file: {suite}}}]")
    outcome = commands().run("evaluate", task.config, *here).expect_success()
    assert "has another chat template" not in outcome.output  # nothing is scored here
    alone, beside = tmp_path / "answers-other-greedy.jsonl", tmp_path / "run" / "answers-teacher-greedy.jsonl"
    assert alone.read_text() == beside.read_text() and len(read_rows(alone)) == 3


def test_a_problem_is_solved_when_one_of_its_answers_is_right():
    right = np.array([[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]])
    answered = Answered(right=right, mean_length=3.0)
    assert answered.solved == pytest.approx(2 / 3)  # pass@2; the mean of 2 is 1/2
    suite = SuiteConfig(name="mean@2", samples=2, temperature=1.0, pass_at=(1, 2))
    summary = summarize(answered, suite, model="teacher")
    assert summary.accuracy == summary.pass_at["1"][0] == pytest.approx(1 / 2)
    assert summary.pass_at["2"][0] == pytest.approx(2 / 3)


# --------------------------------------------------------------------------- check, report, demo


def test_check_prints_the_plan_and_writes_nothing(task: Task, tmp_path: Path):
    layout = ("student.parallel.tensor=2", "student.parallel.pipeline=2")
    outcome = commands().run(CHECK, task.config, *layout, f"run_dir={tmp_path}/run").expect_success()
    lines = [" ".join(line.split()) for line in outcome.output.splitlines()]
    assert "ranks a multiple of 4" in lines
    assert "prompts 11 to train on, 5 to evaluate on" in lines
    assert "step 3 prompts, 9 sequences, 1 update(s)" in lines
    assert any(line.startswith("teacher == student self check") for line in lines)
    assert not (tmp_path / "run").exists()
    # 8 bytes, and 7 ids with their log-probs; then as much again in log-probs of 7 ids of the student's, and tails
    told = "scores 64 bytes per response token from the teacher; at most 0.0 MiB per step and tensor rank"
    assert told in " ".join(lines)
    union = ("method.support=union", "method.tail=bucket", "rollout.max_new_tokens=20", "train.prompts_per_step=6000")
    agreed = " ".join(commands().run(CHECK, task.config, *union).expect_success().output.split())
    told = "scores 96 bytes per response token from the teacher, 28 to it for the student's own likeliest tokens; "
    assert told + "none travels, as the layouts agree" in agreed
    apart = commands().run(CHECK, task.config, *union, "teacher.parallel.tensor=2").expect_success().output
    # 6000 prompts, 3 sequences each, 20 tokens
    assert f"{told}at most {18_000 * 20 * 124 / 2**20:.1f} MiB" in " ".join(apart.split())
    # a method without guidance has no guided sequences
    unguided = commands().run(CHECK, task.config, "method.prefix_schedule=none", "method.k=218").expect_success()
    assert "3 prompts, 6 sequences" in unguided.output


def test_report_is_made_again_from_what_a_run_left(tmp_path: Path):
    row = {"step": 1, "loss": 0.5, "reverse_kl": 0.25, "time_step": 1.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    outcome = commands().run("report", tmp_path).expect_success()
    assert outcome.output.strip() == str(tmp_path / "report.html")
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_demo_hands_method_processes_and_overrides_to_torchrun(monkeypatch: pytest.MonkeyPatch):
    seen: list[Any] = []

    def run(*words: Any, **options: Any) -> int:
        seen.extend((*words, options))
        return 3

    monkeypatch.setattr(torchrun, "run_ranks", run)
    result = CliRunner().invoke(cli.app, ["demo", "--method", "opd", "--processes", "3", "train.steps=9", "seed=4"])
    assert result.exit_code == 3
    launch, command, options = seen
    assert launch == ("--standalone", "--nproc-per-node=3")
    assert command[:3] == ("-m", "megatron_tropd", "train")
    assert Path(command[3]) == options["cwd"] / "examples" / "demo" / "demo.yaml" and Path(command[3]).exists()
    assert list(command[4:]) == [
        "student.model=examples/demo/student_direct",
        "method.name=opd",
        "rollout.temperature=1.0",
        "rollout.top_p=1.0",
        "checkpoint.resume=never",
        "student.parallel.tensor=3",
        "teacher.parallel.tensor=3",
        "train.steps=9",
        "seed=4",
    ]


@pytest.mark.parametrize("method", PRESETS)
def test_demo_gives_every_method_the_rollouts_it_wants(monkeypatch: pytest.MonkeyPatch, method: str):
    seen: list[str] = []
    monkeypatch.setattr(torchrun, "run_ranks", lambda launch, command, **_: seen.extend(command) or 0)
    assert CliRunner().invoke(cli.app, ["demo", "--method", method], catch_exceptions=False).exit_code == 0
    config = load_config(seen[3], seen[4:], check_paths=False)
    wanted = yaml.safe_load((Path(seen[3]).parents[1] / "methods" / f"{method}.yaml").read_text())
    assert config.method.options == {key: value for key, value in wanted["method"].items() if key != "name"}
    assert config.rollout.model_dump().items() >= wanted.get("rollout", {}).items()
    # what the preset says nothing of stays the demo's
    assert config.rollout.max_new_tokens == 64 and config.student.parallel.tensor == 2


def test_demo_trains_beside_a_server_of_its_own_and_ends_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    well = """import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()"""
    start = subprocess.Popen
    seen: list[Any] = []
    servers: list[subprocess.Popen[bytes]] = []

    def stand_in(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        seen.append(command)
        servers.append(start([sys.executable, "-c", well, command[-1].removeprefix("--port=")], **options))
        return servers[0]

    def run(launch: Any, command: Any, **options: Any) -> int:
        assert servers[0].poll() is None
        seen.extend((command, options["environment"]["TROPD_API_KEY"]))
        return 0

    monkeypatch.setattr("subprocess.Popen", stand_in)
    monkeypatch.setattr(torchrun, "run_ranks", run)
    monkeypatch.delenv("TROPD_API_KEY", raising=False)
    arguments = ["demo", "--engine", "vllm_server", f"run_dir={tmp_path}", "train.steps=9"]
    assert CliRunner().invoke(cli.app, arguments, catch_exceptions=False).exit_code == 0
    serving, training, key = seen
    assert serving[1:5] == ["-m", "megatron_tropd", "serve", "student"] and "train.steps=9" in serving
    settings = load_config(training[3], list(training[4:]), check_paths=False)
    port = serving[-1].removeprefix("--port=")
    assert settings.rollout.engine == "vllm_server"
    assert settings.rollout.vllm_server.urls == (f"http://127.0.0.1:{port}",)
    assert len(key) >= 32 and not [word for word in (*serving, *training) if key in word]
    assert servers[0].returncode is not None


def test_demo_refuses_a_mistake_before_it_launches_anything(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torchrun, "run_ranks", lambda *_, **__: pytest.fail("launched"))
    for arguments, message in (
        (["--student", "near"], "--student is near: use one of direct, mistaken"),
        (["--method", "tropdd"], "Did you mean 'tropd'?"),
        (["train.stepz=2"], "Did you mean train.steps?"),
        (["--processes", "2", "student.parallel.tensor=4"], "world size 2 is not a multiple of"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            CliRunner().invoke(cli.app, ["demo", *arguments], catch_exceptions=False)


# --------------------------------------------------------------------------- one writer at a time


def refused_everywhere(run_dir: str) -> None:
    """On the ranks: what one of them finds, all of them raise."""
    from megatron_tropd.errors import StorageError
    from megatron_tropd.parallel.groups import initialize_distributed
    from megatron_tropd.setup.claims import claimed, run_directory

    initialize_distributed()
    with pytest.raises(StorageError, match="is in use by process"), claimed(run_directory(Path(run_dir))):
        pass


def test_a_second_writer_is_refused_by_name_and_touches_nothing(task: Task, tmp_path: Path):
    run, out, export = tmp_path / "run", tmp_path / "out.jsonl", tmp_path / "export"
    run.mkdir()
    train = ("train", task.config, f"run_dir={run}")
    cases: dict[Path, tuple[object, ...]] = {
        run / ".tropd.lock": train,
        tmp_path / ".export.tropd.lock": (*train, f"export.hf={export}"),
        tmp_path / ".out.jsonl.tropd.lock": ("generate", task.student, task.prompts, out),
        tmp_path / ".mega.tropd.lock": ("convert", "hf-to-megatron", task.student, tmp_path / "mega"),
    }
    for path, command in cases.items():
        held = take_lock(path, name="x", fix="y")
        before = sorted(tmp_path.rglob("*"))
        refused = commands().run(*command)
        assert refused.status == 2
        assert f"is in use by process {os.getpid()} on {socket.gethostname()} since " in refused.output, refused.output
        if command is train:
            commands().call(refused_everywhere, run, ranks=2)
        assert sorted(tmp_path.rglob("*")) == before
        held.release()


def test_what_is_written_under_a_lock_leaves_none_behind(task: Task, tmp_path: Path):
    command = ("convert", "hf-to-megatron", task.student, tmp_path / "mega")
    commands().run(*command).expect_success()
    assert [path.name for path in tmp_path.iterdir()] == ["mega"]
    assert "left as it is" in commands().run(*command).expect_success().output
    config = task.student / "config.json"
    was = config.read_text()
    try:
        config.write_text(json.dumps(json.loads(was) | {"rope_theta": 20000.0}))
        refused = commands().run(*command)
    finally:
        config.write_text(was)
    assert refused.status == 2 and "but config.json of the source has changed since" in refused.output
    # a conversion that was killed leaves a note; what is the user's beside or in it stays
    partial = tmp_path / "other.partial"
    start_unfinished(partial, "a checkpoint")
    (partial / "__0_0.distcp").write_bytes(b"half")
    (partial / "hf").mkdir()
    (partial / "hf" / "notes.txt").write_text("mine")
    commands().run("convert", "hf-to-megatron", task.student, tmp_path / "other").expect_success()
    assert (tmp_path / "other.partial.kept" / "hf" / "notes.txt").read_text() == "mine"
    assert not partial.exists() and not (tmp_path / "other" / UNFINISHED).exists()


# --------------------------------------------------------------------------- mistakes


@pytest.fixture(scope="module")
def broken(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of models and files, each wrong in one way."""
    home = tmp_path_factory.mktemp("broken")

    def model(name: str, **changes: Any) -> Path:
        return save_model(home / name, TEACHER, tied=False, seed=3, **changes)

    def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
        tree = json.loads(path.read_text())
        change(tree)
        path.write_text(json.dumps(tree))

    def swap_two_tokens(tree: dict[str, Any]) -> None:
        vocabulary = tree["model"]["vocab"]
        first, second = list(vocabulary)[10:12]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]

    edit(model("other_tokenizer") / "tokenizer.json", swap_two_tokens)
    (model("no_tokenizer") / "tokenizer.json").unlink()
    edit(model("endless") / "tokenizer_config.json", lambda tree: tree.pop("eos_token"))
    model("few_ids", vocab_size=100)
    edit(model("other_config") / "config.json", lambda tree: tree.update(vocab_size=300))
    edit(model("neox") / "config.json", lambda tree: tree.update(architectures=["GPTNeoXForCausalLM"]))
    pickled = model("pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    os.truncate(model("torn") / "model.safetensors", 5000)

    rows = read_rows(task.prompts)
    files = {
        "unanswered": [{"prompt": row["prompt"], "response": row["response"]} for row in rows],
        "bare": [row if number < 2 else {"prompt": row["prompt"]} for number, row in enumerate(rows)],
        "unknown_word": [{"prompt": "Zebras?", "response": "1"}],
    }
    for name, content in files.items():
        (home / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    (home / "not_json.jsonl").write_text(task.prompts.read_text() + '{"prompt": \n')
    (home / "file").touch()
    pyarrow.parquet.write_table(pyarrow.table({"question": ["a"]}), home / "columns.parquet")
    (home / "torn.parquet").write_bytes((home / "columns.parquet").read_bytes()[:-9])
    for name in ("opd", "sft", "exopd"):
        text = task.config.read_text().replace("name: tropd\n  k: 7\n  beta: 0.3", f"name: {name}")
        assert f"name: {name}" in text
        (home / f"{name}.yaml").write_text(text)
    return home


# (CONFIG is the task's, HOME the directory of broken things), and what the message must say
TRAINING_MISTAKES = [
    ("train nothing.yaml", "ConfigError: there is no config file nothing.yaml ("),
    ("train CONFIG student.model=gone", "ConfigError: student.model = 'gone': there is nothing at "),
    ("train CONFIG train.stepz=3", "train.stepz is not a key. Did you mean train.steps?"),
    ("train CONFIG student.parallel.tensor=2", "Launch 2 ranks (or a multiple), as in `torchrun --nproc-per-node 2 -m"),
    (
        "train CONFIG run_dir=HOME/file/run",
        "ConfigError: run_dir: cannot write to HOME/file/run (a file is in the way)",
    ),
    ("train CONFIG run_dir=/proc/run", "ConfigError: run_dir: cannot write to /proc/run ("),
    ("train CONFIG export.hf=HOME/file/x", "ConfigError: export.hf: cannot write to HOME/file (a file is in the way)"),
    ("train CONFIG rollout.record=HOME/file", "ConfigError: rollout.record: cannot write to HOME/file ("),
    ("train CONFIG teacher.model=HOME/other_config", "Give the config.json that belongs to the weights."),
    ("train CONFIG teacher.model=HOME/pickled", "has only pickled weights (pytorch_model.bin), which are never loaded"),
    ("train CONFIG teacher.model=HOME/torn", "HOME/torn/model.safetensors is torn or not safetensors"),
    ("train CONFIG teacher.recorded_from=HOME", "DataError: HOME is not a recording of a teacher (recording.json is"),
    ("evaluate CONFIG evaluate.prompts=null", "evaluate.prompts is null: there is nothing to evaluate on."),
    (
        "evaluate CONFIG evaluate.suites[0].max_new_tokens=90",
        "Lower max_new_tokens of the suite 'greedy' to 48 or less.",
    ),
]
INPUT_MISTAKES = [
    (
        "teacher.model=HOME/other_tokenizer",
        "TokenizerError: student and teacher disagree about 2 of 219 shared token ids",
    ),
    (
        "student.model=HOME/no_tokenizer",
        "TokenizerError: HOME/no_tokenizer holds no tokenizer: expected tokenizer.json",
    ),
    ("teacher.model=HOME/endless", "HOME/endless names no end-of-sequence token, so responses would never end"),
    ("teacher.model=HOME/few_ids", "but the teacher has embeddings for 100 ids only (vocab_size in its config.json)."),
    ("teacher.model=HOME/neox", "teacher.model = 'HOME/neox': architecture ['GPTNeoXForCausalLM'] is not supported."),
    ("student.model=HOME", "CheckpointError: student.model = 'HOME': HOME/config.json does not exist."),
    (
        "data.prompts=HOME/bare.jsonl data.responses=required",
        "9 of 11 prompts have no teacher response in column 'response' (the first is HOME/bare.jsonl:3), and ",
    ),
    ("data.prompts=HOME/not_json.jsonl", "DataError: HOME/not_json.jsonl:12: not valid JSON"),
    ("data.prompts=HOME/unknown_word.jsonl", "DataError: HOME/unknown_word.jsonl:1: tokenizer "),
    ("data.max_prompt_tokens=3", "DataError: no usable prompt in "),
    ("data.prompts=HOME/columns.parquet", "HOME/columns.parquet has no column 'prompt' or 'messages', only ['question"),
    ("data.prompts=HOME/torn.parquet data.on_bad_row=skip", "DataError: HOME/torn.parquet is torn or no Parquet"),
    ("data.prompts=HOME/*.csv", "data.prompts = 'HOME/*.csv': there is nothing at HOME/*.csv"),
    ("data.template='{{question}}'", "train.jsonl:1: the template '{{question}}' fails: 'question' is undefined."),
    ("evaluate.prompts=HOME/unanswered.jsonl", "11 of 11 problems have no reference answer in column 'answer'"),
    ("method.name=tropdd", ": override 'method.name=tropdd': unknown method 'tropdd'. Did you mean 'tropd'? Methods: "),
    ("method.kk=3", ": method 'tropd': override 'method.kk=3': kk is not a key. Did you mean k? "),
    ("method.k=0", ": method 'tropd': override 'method.k=0': k = 0: must be at least 1."),
    ("method.k=500", "ConfigError: method.k=500 candidates per token, but the models share 219 ids."),
    ("rollout.max_new_tokens=60 train.pack_tokens=200", "but the student has 96 positions (max_position_embeddings)."),
    ("evaluate.suites[1].max_new_tokens=90", "with max_new_tokens of the suite 'sampled' = 90 a sequence may have"),
    (
        "student.parallel.tensor=4",
        "ConfigError: student.parallel: tensor parallel size 4 does not divide the model's 2",
    ),
    ("rollout.parallel.tensor=4", "ConfigError: rollout.parallel: tensor parallel size 4 does not divide"),
    ("student.parallel.pipeline=5", "5 stages for a model of 3 layers. Use at most 3 stages."),
    ("rollout.engine=vllm", "ConfigError: vLLM is not installed in this environment."),
    ("student.attention=te", "ConfigError: student.attention=te is not available yet"),
]
METHOD_MISTAKES = [
    ("check HOME/exopd.yaml base.model=HOME/gone", "ConfigError: base.model = 'HOME/gone': there is nothing at "),
    ("check HOME/exopd.yaml base.model=HOME", "CheckpointError: base.model = 'HOME': HOME/config.json does not exist."),
    ("check HOME/exopd.yaml base.model=HOME/other_tokenizer", "student and base model disagree about 2 of 219 shared"),
    ("check HOME/exopd.yaml base.model=HOME/few_ids", "but the base model has embeddings for 100 ids only"),
    ("check HOME/exopd.yaml base.parallel.tensor=4", "ConfigError: base.parallel: tensor parallel size 4 does not"),
    ("check HOME/opd.yaml rollout.samples_per_prompt=0", "nothing would be sampled. Raise rollout.samples_per_prompt."),
    ("check HOME/opd.yaml train.minibatches=7", "train.minibatches=7 is more than the 6 sequences of a step."),
    ("check HOME/sft.yaml rollout.guided_per_prompt=0", "method.name=sft learns from the teacher's responses alone"),
]
GENERATE_MISTAKES = [
    ("HOME/gone PROMPTS OUT", "CheckpointError: HOME/gone/config.json does not exist."),
    ("TEACHER HOME/gone.jsonl OUT", "DataError: data file HOME/gone.jsonl does not exist"),
    (
        "TEACHER PROMPTS OUT",
        "there is room for 39 more, not for --max-new-tokens 1024. Give --max-new-tokens 39 or less.",
    ),
    ("TEACHER PROMPTS OUT --dtype fp16", "ConfigError: --dtype is fp16: use one of fp32, bf16."),
    ("TEACHER PROMPTS OUT --temperature -1", "ConfigError: --temperature is -1.0: 0 is greedy"),
    ("TEACHER PROMPTS OUT --temperature 0 --samples 2", "ConfigError: --samples is 2: at temperature 0 all would be"),
    ("TEACHER PROMPTS OUT --prompt-column text", "has neither 'text' nor 'messages', only ['answer', 'prompt'"),
    ("TEACHER PROMPTS HOME", "ConfigError: HOME is a directory: give the file to write."),
    (
        "TEACHER PROMPTS HOME/file/out.jsonl",
        "cannot write HOME/file/out.jsonl (a file is in the way). Name another file.",
    ),
]
MISTAKES = [
    *TRAINING_MISTAKES,
    *((f"check CONFIG {overrides}", message) for overrides, message in INPUT_MISTAKES),
    *METHOD_MISTAKES,
    *((f"generate {arguments}", message) for arguments, message in GENERATE_MISTAKES),
    ("report HOME/gone", "DataError: there is no run directory HOME/gone"),
]


@pytest.mark.parametrize(("command", "message"), MISTAKES, ids=[command for command, _ in MISTAKES])
def test_a_mistake_is_one_message_and_exit_status_2(
    task: Task, broken: Path, tmp_path: Path, command: str, message: str
):
    names = {"CONFIG": task.config, "HOME": broken, "PROMPTS": task.prompts, "TEACHER": task.teacher}
    for name, path in (names | {"OUT": tmp_path / "out.jsonl"}).items():
        command, message = command.replace(name, str(path)), message.replace(name, str(path))
    # defaults first: the last of several overrides wins
    verb, first, *rest = command.split()
    run_dir = [f"run_dir={tmp_path}/run"] if verb in ("train", "check", "evaluate") else []
    outcome = commands().run(verb, first, *run_dir, *rest)
    assert outcome.status == 2, outcome.output
    assert message in outcome.output
    assert len(re.findall(r"^\w*Error: ", outcome.output, re.MULTILINE)) == 1, outcome.output
    assert "Traceback" not in outcome.output
    assert not (tmp_path / "out.jsonl").exists() and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_mistake_that_every_rank_sees_is_told_once(task: Task, tmp_path: Path):
    outcome = commands().run("train", task.config, f"run_dir={tmp_path}", "method.kk=1", ranks=2)
    assert outcome.status == 2
    assert outcome.output.count("ConfigError") == 1
    assert "Error" not in outcome.outputs[1]


def test_what_goes_wrong_on_one_rank_alone_is_told_with_its_number(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail() -> None:
        raise DataError("no file here")

    def leave(status: int) -> None:
        raise SystemExit(status)

    monkeypatch.setattr(cli, "app", fail)
    monkeypatch.setattr(cli.os, "_exit", leave)
    monkeypatch.setattr(cli, "_PATIENCE_S", 0.0)
    monkeypatch.setattr(cli.warnings, "showwarning", cli.warnings.showwarning)
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert "DataError on rank 5: no file here" in " ".join(capsys.readouterr().err.split())
