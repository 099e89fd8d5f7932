"""The demo's students, and what it says at its end, from the files of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_tropd.commands.demo import STUDENTS, find_demo, last_words
from megatron_tropd.config.loading import dump_config, load_config
from megatron_tropd.convert.hf import HFWeights, read_architecture
from megatron_tropd.errors import ConfigError
from megatron_tropd.report.records import AFTER, BEFORE, Evaluation, record_evaluations

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "examples" / "demo" / "demo.yaml"
STUCK = {"step": 80, "reverse_kl": 5.0, "stuck_fraction": 0.9, "grad_norm": 0.1}


def finished(directory: Path, *, method: str, accuracy: float, length: float, last: dict[str, float]) -> Path:
    dump_config(load_config(DEMO, [f"method.name={method}"], check_paths=False), directory / "config.yaml")
    (directory / "metrics.jsonl").write_text(json.dumps(last) + "\n")
    interval = {"low": 0.0, "high": 1.0, "problems": 256, "samples": 4}
    for model, share, tokens in ((BEFORE, 0.012, 4.2), (AFTER, accuracy, length)):
        one = Evaluation(model=model, suite="T=1", accuracy=share, mean_length=tokens, step=0, **interval)
        record_evaluations(directory, [one])
    return directory


def test_a_run_that_stood_still_says_why_and_where_to_read(tmp_path: Path):
    run = finished(tmp_path, method="opd", accuracy=0.004, length=3.1, last=STUCK)
    assert last_words(run) == (
        "Accuracy 1.2 -> 0.4 % (T=1): responses fell from 4.2 to 3.1 tokens: the student is confident where the "
        "teacher would never go; opd needs many more steps here, see docs/results.md"
    )


def test_a_run_that_moved_says_so_and_no_more(tmp_path: Path):
    moved = STUCK | {"reverse_kl": 0.1, "stuck_fraction": 0.0}
    run = finished(tmp_path, method="tropd", accuracy=0.9, length=31.4, last=moved)
    assert last_words(run) == "Accuracy 1.2 -> 90.0 % (T=1): responses grew from 4.2 to 31.4 tokens"


def test_a_run_without_steps_and_evaluations_has_nothing_to_say(tmp_path: Path):
    assert last_words(tmp_path) == ""
    (tmp_path / "metrics.jsonl").write_text("")
    assert last_words(tmp_path) == ""


@pytest.mark.parametrize("name", STUDENTS)
def test_every_student_is_shipped_and_fits_the_teacher(name: str):
    config = load_config(DEMO, find_demo(name).overrides, check_paths=False)
    student, teacher = read_architecture(ROOT / config.student.model), read_architecture(ROOT / config.teacher.model)
    assert student.vocab_size == teacher.vocab_size and student.hidden_size < teacher.hidden_size
    assert tuple(HFWeights(ROOT / config.student.model)["model.norm.weight"].shape) == (student.hidden_size,)
    files = [ROOT / model / "tokenizer.json" for model in (config.student.model, config.teacher.model)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_unknown_student_is_refused_by_name():
    with pytest.raises(ConfigError, match="--student is near: use one of direct, mistaken"):
        find_demo("near")
