"""Which tokens end a response, to whom, and what is made of a difference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_tropd.config.sections import TeacherConfig
from megatron_tropd.data.tokenizer import Tokenizer, load_tokenizer
from megatron_tropd.errors import ConfigError
from megatron_tropd.methods import build_method
from megatron_tropd.setup.ends import response_ends, stopping_at
from megatron_tropd.setup.validate import check_teacher
from tests.support.chat_families import save_byte_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>")


def model(directory: Path, eos: str, generation: Any, **files: Any) -> Tokenizer:
    """A tokenizer of bytes with the marks of Qwen's and a generation_config.json."""
    save_byte_tokenizer(directory, specials=MARKS, eos_token=eos, template=files.pop("template", CHATML))
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    for name, ids in files.items():
        (directory / f"{name}.json").write_text(json.dumps({"eos_token_id": ids}))
    return load_tokenizer(directory)


@pytest.fixture
def pair(tmp_path: Path) -> dict[str, Tokenizer]:
    """A base model that came with its instruct model's template, and the instruct model, as Qwen's are."""
    return {
        "student": model(tmp_path / "base", "<|endoftext|>", 0),
        "teacher": model(tmp_path / "instruct", "<|im_end|>", [2, 0]),
    }


def test_a_base_student_and_an_instruct_teacher_have_one_class_of_ends_unless_told_otherwise(pair):
    ends = response_ends(pair, None)
    assert ends.ids == (0, 2)
    assert ends.lines == (
        "responses end, to the student, with 0 '<|endoftext|>' (tokenizer, "
        "generation_config.json); 2 '<|im_end|>' (chat template)",
        "responses end, to the teacher, with 2 '<|im_end|>' (tokenizer, chat template); 2 '<|im_end|>', "
        "0 '<|endoftext|>' (generation_config.json)",
        "they count as one token, and sampling stops at each (method.end_tokens=class): 0 '<|endoftext|>', "
        "2 '<|im_end|>'",
    )
    assert response_ends(pair, "class") == ends


def test_told_apart_they_are_but_not_without_a_word(pair):
    ends = response_ends(pair, "exact")
    assert ends.ids == ()
    assert len(ends.lines) == 3 and ends.lines[2].startswith("WARNING: they differ, and each counts by itself")


def test_a_refusal_names_both_sets(pair):
    with pytest.raises(ConfigError, match=r"student, with 0 '<\|endoftext\|>'.*teacher, with 2 '<\|im_end\|>'"):
        response_ends(pair, "refuse")


@pytest.mark.parametrize("wanted", [None, "exact", "refuse"])
def test_models_that_agree_keep_every_id_for_itself(tmp_path, pair, wanted):
    again = {"student": pair["teacher"], "teacher": model(tmp_path / "other", "<|im_end|>", [0, 2])}
    ends = response_ends(again, wanted)
    assert ends.ids == () and len(ends.lines) == 2  # both sets are said all the same


def test_a_class_may_be_asked_for_where_models_agree(pair):
    assert response_ends({"student": pair["teacher"], "teacher": pair["teacher"]}, "class").ids == (2, 0)


def test_one_end_is_no_class(tmp_path):
    alone = model(tmp_path, "<|im_end|>", 2)
    assert response_ends({"student": alone, "teacher": alone}, "class").ids == ()


def test_every_model_beside_the_student_counts(tmp_path, pair):
    third = model(tmp_path / "third", "<|im_end|>", [2, 0], config=[3])
    ends = response_ends({"student": pair["teacher"], "teacher": pair["teacher"], "base model": third}, None)
    assert (
        ends.ids == (2, 0, 3) and "to the base model" in ends.lines[2] and "3 '<|pad|>' (config.json)" in ends.lines[2]
    )


def test_an_end_that_some_model_does_not_know_is_left_out_and_named(pair):
    ends = response_ends(pair, None, vocab_size=2)
    assert ends.ids == ()  # one is left, which is no class
    several = {**pair, "teacher": stopping_at(pair["teacher"], (1, 2))}
    ends = response_ends(several, None, vocab_size=2)
    assert ends.ids == (0, 1) and ends.lines[-1] == "not among them, since some model has no such id: [2]"


def test_a_teacher_that_tells_its_likeliest_ids_only_is_refused_by_name():
    method = replace(build_method("opd"), end_ids=(7, 9))
    inputs = SimpleNamespace(method=method, vocab_size=20, teacher=SimpleNamespace(vocab_size=20))

    def config(**more: Any) -> Any:
        return SimpleNamespace(
            teacher=TeacherConfig(model=Path("unread"), engine="vllm", **more), method=SimpleNamespace(name="opd")
        )

    with pytest.raises(ConfigError, match=r"ids \[7, 9\], but teacher.engine=vllm reports.*method.end_tokens=exact"):
        check_teacher(config(), cast(Any, inputs))
    check_teacher(config(whole_vocabulary=True), cast(Any, inputs))
    inputs.method = replace(method, end_ids=())
    check_teacher(config(), cast(Any, inputs))


def test_sampling_stops_at_all_of_them_the_own_end_first(pair):
    both = stopping_at(pair["student"], (2, 0, 1))
    assert both.eos_ids == (0, 2, 1) and pair["student"].eos_ids == (0, 2)
    assert stopping_at(pair["student"], ()) is pair["student"]
