"""Whole trainings through the command line: what they leave on disk, under every method, on one rank and on two."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.support.run_inputs import (
    Task,
    assert_metrics_agree,
    assert_weights_agree,
    commands,
    make_task,
    steady_metrics,
    weights_of,
)
from tests.support.torch_dist import save_megatron

TP2 = ("student.parallel.tensor=2", "teacher.parallel.tensor=2")
QUIET = ("report.samples=0", "report.html=false", "evaluate.prompts=null", "checkpoint.every=0")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tmp_path_factory.mktemp("task"))


@pytest.fixture(scope="module")
def trained(task: Task, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything asked for, on one process without a launcher."""
    run_dir = tmp_path_factory.mktemp("trained")
    wishes = (
        "evaluate.every=4",
        "report.tensorboard=true",
        f"export.hf={run_dir}/export",
        "train.minibatches=2",
        "report.html=true",
    )
    outcome = commands().run("train", task.config, f"run_dir={run_dir}", *wishes).expect_success()
    for line in ("student before", "student after", "teacher", f"report: {run_dir}/report.html"):
        assert line in outcome.output
    assert "Error" not in outcome.output and "Warning" not in outcome.output, outcome.output
    return run_dir


# --------------------------------------------------------------------------- what a run leaves


def test_a_run_leaves_metrics_of_every_step_that_the_table_knows(trained: Path):
    from megatron_tropd.report.metrics import unknown_names

    rows = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    promised = "loss grad_norm tokens outlier_fraction trusted_fraction reverse_kl student_entropy teacher_entropy "
    promised += "response_length logprob_gap_mean lr prefix_length time_rollout time_teacher time_train time_publish"
    for row in rows:
        assert set(promised.split()) <= row.keys() and unknown_names(row) == []
        assert all(math.isfinite(value) for value in row.values())
        assert row["sequences"] == 9  # 3 prompts, each 2 times alone and once guided
        assert row["outlier_fraction"] + row["trusted_fraction"] == pytest.approx(1.0)
        # the sampler and the trainer are the same model
        assert row["logprob_gap_max"] < 1e-4
    # alpha = (1 + cos(pi t / 6)) / 2: the first guided sequences are all prefix
    alphas = [(1 + math.cos(math.pi * t / 6)) / 2 for t in range(6)]
    assert [row["prefix_fraction"] for row in rows] == pytest.approx(alphas)
    # warm-up over one of six steps of two updates, then linearly to 0 one update after the last
    assert [row["lr"] for row in rows] == pytest.approx([2e-3 * x / 11 for x in (11, 9, 7, 5, 3, 1)], rel=1e-6)


def test_a_run_leaves_a_config_that_loads_back(task: Task, trained: Path):
    from megatron_tropd.config.loading import load_config

    config = load_config(trained / "config.yaml")
    asked = load_config(task.config, [f"run_dir={trained}", "report.tensorboard=true"])
    assert config.run_dir == trained and config.method == asked.method and config.optimizer == asked.optimizer
    assert config.train.minibatches == 2 and config.evaluate.suites == asked.evaluate.suites


def test_a_run_leaves_its_report_evaluations_samples_and_tensorboard_events(trained: Path):
    assert "<svg" in (trained / "report.html").read_text()
    evaluations = json.loads((trained / "evaluation.json").read_text())
    taken = {(row["model"], row["suite"], row["step"]) for row in evaluations}
    when = {("student before", 0), ("student", 4), ("student after", 6), ("teacher", None)}
    assert taken == {(model, suite, step) for model, step in when for suite in ("greedy", "sampled")}
    samples = [json.loads(line) for line in (trained / "samples.jsonl").read_text().splitlines()]
    assert [sample["when"] for sample in samples] == ["before"] * 4 + ["after"] * 4
    for alone, guided in zip(samples[::2], samples[1::2], strict=True):
        assert {token["region"] for token in alone["tokens"]} == {"continuation"}
        assert guided["tokens"][0]["region"] == "prefix"
        assert all((token["trusted"] is None) == (token["region"] == "prefix") for token in guided["tokens"])
        assert all(math.isfinite(token["log_ratio"]) for token in alone["tokens"])

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "tensorboard")).Reload()
    written = [(event.step, event.value) for event in events.Scalars("loss")]
    expected = [(row["step"], row["loss"]) for row in steady_metrics(trained)]
    assert written == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in expected]


def test_the_exported_student_answers_in_transformers_as_the_sampler_does(task: Task, trained: Path, tmp_path: Path):
    import torch

    from tests.runs.test_commands import compare_with_transformers

    before, after = weights_of(task.student), weights_of(trained / "export")
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert all(before[name].shape == after[name].shape and after[name].dtype == torch.float32 for name in before)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (trained / "export" / name).read_bytes() == (task.student / name).read_bytes()
    out = tmp_path / "out.jsonl"
    options = ("--max-new-tokens", 20, "--temperature", 0, "--dtype", "fp32")
    commands().run("generate", trained / "export", task.prompts, out, *options).expect_success()
    commands().call(compare_with_transformers, trained / "export", out, 20)


# --------------------------------------------------------------------------- ranks


def test_two_tensor_parallel_ranks_train_as_one_process_does(task: Task, trained: Path, tmp_path: Path):
    wishes = ("train.minibatches=2", f"export.hf={tmp_path}/export")
    command = ("train", task.config, f"run_dir={tmp_path}", *QUIET, *wishes, *TP2)
    outcome = commands().run(*command, ranks=2).expect_success()
    assert outcome.outputs[1] == ""
    assert_metrics_agree(steady_metrics(tmp_path), steady_metrics(trained))
    assert_weights_agree(tmp_path / "export", trained / "export")


def test_a_student_of_megatron_lm_and_a_teacher_of_bridge_train_to_the_same_digits(
    task: Task, trained: Path, tmp_path: Path
):
    student = save_megatron(tmp_path / "student", task.student, qk_layernorm=True, rotary_base=10_000)
    teacher = save_megatron(tmp_path / "teacher", task.teacher)
    (teacher / "iter_0000100" / "run_config.yaml").write_text("model:\n  num_layers: 2\n  num_attention_heads: 2\n")
    models = (f"student.model={student}", f"student.like={task.student}", f"teacher.model={teacher}")
    command = ("train", task.config, f"run_dir={tmp_path}/run", *QUIET, *models, f"teacher.like={task.teacher}")
    outcome = commands().run(*command, "train.minibatches=2", f"export.hf={tmp_path}/export").expect_success()
    for writer in ("Megatron-LM", "Megatron-Bridge"):
        assert outcome.output.count(f"weights of a checkpoint of {writer}, iteration 100; left out: ") == 1
    assert steady_metrics(tmp_path / "run") == steady_metrics(trained)
    assert (tmp_path / "export" / "tokenizer.json").is_file()


def test_a_checkpoint_of_another_model_is_refused_before_training(task: Task, tmp_path: Path):
    student = save_megatron(tmp_path / "student", task.student, num_attention_heads=8)
    models = (f"student.model={student}", f"student.like={task.student}")
    outcome = commands().run("train", task.config, f"run_dir={tmp_path}/run", *models)
    assert outcome.status == 2 and "student.model" in outcome.output
    assert "num_attention_heads = 8, where config.json wants 4" in outcome.output


def test_replicas_with_less_than_a_sequence_each_train_as_one_process_does(task: Task, tmp_path: Path):
    single = ("train.prompts_per_step=1", "rollout.samples_per_prompt=1", "rollout.guided_per_prompt=0")
    runs = {ranks: tmp_path / f"{ranks}" for ranks in (0, 2)}
    for ranks, run_dir in runs.items():
        command = (
            "train",
            task.config,
            f"run_dir={run_dir}",
            *QUIET,
            *single,
            "train.steps=2",
            "optimizer.warmup_steps=0",
        )
        commands().run(*command, ranks=ranks).expect_success()
    assert_metrics_agree(steady_metrics(runs[2]), steady_metrics(runs[0]))
