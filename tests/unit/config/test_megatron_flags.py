"""What is spelled in Megatron's words is answered with the keys that stand for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_tropd.cli import app
from megatron_tropd.config.loading import load_config
from megatron_tropd.config.megatron_flags import FLAGS, answer_to, flags_table
from megatron_tropd.config.reference import reference_rows
from megatron_tropd.config.run import RunConfig
from megatron_tropd.errors import ConfigError

DOCS = Path(__file__).resolve().parents[3] / "docs"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text("run_dir: run\nstudent: {model: s}\nteacher: {model: t}\ndata: {prompts: p.jsonl}\n")
    return path


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("tensor_model_parallel_size=2", "student.parallel.tensor and teacher.parallel.tensor"),
        ("student.parallel.tensor_model_parallel_size=2", "--tensor-model-parallel-size is here student.parallel"),
        ("train.seq_length=4096", "data.max_prompt_tokens and rollout.max_new_tokens and train.pack_tokens"),
        ("train.micro-batch-size=2", "train.pack_tokens (a microbatch is a pack"),
        ("--use-distributed-optimizer", "optimizer.distributed"),
        ("--overlap-grad-reduce=true", "optimizer.overlap"),
        ("--recompute-granularity=full", "student.recompute"),
        ("student.num_layers=3", "has no key here: read from config.json"),
        ("virtual_pipeline_model_parallel_size=2", "student.parallel.virtual_pipeline"),
    ],
)
def test_an_override_in_megatrons_words_is_answered_with_ours(config: Path, override: str, answer: str):
    with pytest.raises(ConfigError) as error:
        load_config(config, [override], check_paths=False)
    assert answer in str(error.value)


@pytest.mark.parametrize("command", ["check", "train"])
def test_a_flag_on_the_command_line_is_answered_too(config: Path, command: str):
    result = CliRunner().invoke(app, [command, str(config), "--sequence-parallel"])
    assert isinstance(result.exception, ConfigError)
    assert "is here student.parallel.sequence and teacher.parallel.sequence" in str(result.exception)


def test_a_word_that_is_no_flag_is_not_answered():
    assert answer_to("tensor") is None and answer_to("--parallel") is None


def test_every_key_of_the_table_is_a_key_and_no_flag_is_there_twice():
    keys = {row.key for row in reference_rows(RunConfig)}
    assert {key for one in FLAGS for key in one.keys} <= keys
    assert len({one.flag for one in FLAGS}) == len(FLAGS)


def test_the_table_in_the_docs_is_up_to_date():
    assert flags_table() in (DOCS / "migrate.md").read_text(encoding="utf-8")
