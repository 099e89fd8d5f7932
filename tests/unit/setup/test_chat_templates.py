"""Where student and teacher write conversations otherwise, that is said, and the teacher is evaluated as it speaks."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from megatron_tropd.config.sections import DataConfig, EvaluateConfig, SuiteConfig, TeacherConfig
from megatron_tropd.data.tokenizer import load_tokenizer
from megatron_tropd.errors import ConfigError
from megatron_tropd.setup import chat_templates, datasets
from tests.support.chat_families import save_byte_tokenizer

OURS = "{% for m in messages %}[{{m['role']}}]{{m['content']}}<eos>{% endfor %}" + (
    "{% if add_generation_prompt %}[bot]{% endif %}"
)
THEIRS = "{% for m in messages %}User: {{m['content']}}<turn>{% endfor %}{% if add_generation_prompt %}Bot:{% endif %}"


@pytest.fixture
def config(tmp_path: Path) -> Any:
    for name, template in (("ours", OURS), ("theirs", THEIRS), ("same", OURS), ("plain", None)):
        save_byte_tokenizer(tmp_path / name, specials=("<pad>", "<eos>", "<turn>"), template=template)
    rows = [{"prompt": f"{i}?", "answer": str(i)} for i in range(3)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return SimpleNamespace(
        data=DataConfig(prompts=(tmp_path / "p.jsonl",), grader="exact", template_options={"thinking": True}),
        teacher=TeacherConfig(model=tmp_path / "theirs", chat_template="student"),
        teachers=(),
        evaluate=EvaluateConfig(prompts=(tmp_path / "p.jsonl",), suites=(SuiteConfig(name="s"),)),
    )


def test_both_renderings_are_shown_and_a_warning_says_that_they_differ(config: Any, tmp_path: Path, caplog):
    student = load_tokenizer(tmp_path / "ours")
    (found,) = chat_templates.template_differences(config, student)
    assert found.prompts[0] == ("[user]0?<eos>[bot]", "User: 0?<turn>Bot:") and len(found.prompts) == 3
    assert found.ends == ("<eos>", "<turn>, <eos>")
    console = Console(file=io.StringIO(), width=160)
    console.print(chat_templates.difference_table([found]))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[user]0?<eos>[bot]" in shown and "User: 0?<turn>Bot:" in shown
    chat_templates.warn_of_differences(config, student)
    assert "the teacher has another chat template than the student" in caplog.text and "3 of the first 3" in caplog.text
    config.teacher = config.teacher.model_copy(update={"chat_template": "own"})
    with pytest.raises(ConfigError, match=r"teacher.chat_template=own: the teacher renders 3 of the first 3"):
        chat_templates.warn_of_differences(config, student)


def test_two_of_one_template_say_nothing_and_may_be_asked_under_their_own(config: Any, tmp_path: Path, caplog):
    student = load_tokenizer(tmp_path / "ours")
    config.teacher = TeacherConfig(model=tmp_path / "same", chat_template="own")
    chat_templates.warn_of_differences(config, student)
    assert not caplog.text
    config.teacher = TeacherConfig(model=tmp_path / "plain", chat_template="own")  # a base model has none
    assert chat_templates.template_differences(config, student)[0].prompts[0][1] == "0?"


def test_the_teacher_is_posed_its_problems_as_it_writes_them(config: Any, tmp_path: Path):
    student = load_tokenizer(tmp_path / "ours")
    suites = datasets.complete_suites(config.evaluate, config.data, budget=9)
    problems = datasets.read_problems(suites, config.data, student, allow_code=False)
    own, posed = chat_templates.teacher_problems(config, suites, student, problems)
    assert "".join(own.tokens(posed["s"][0].token_ids.tolist())) == "User: 0?<turn>Bot:"
    assert own.turn_end == own.vocab["<turn>"] and own.turn_end in own.eos_ids
    config.teacher = config.teacher.model_copy(update={"model": tmp_path / "same"})
    assert chat_templates.teacher_problems(config, suites, student, problems) == (student, problems)


def test_options_that_no_template_reads_are_named(config: Any, tmp_path: Path, caplog):
    options = {"thinking": True, "role": "x"}
    student = load_tokenizer(tmp_path / "ours", template_options=options)
    config.data = DataConfig(prompts=config.data.prompts, template_options=options)
    chat_templates.warn_of_unread_options(config, student)
    assert "data.template_options sets thinking: the student's chat template does not read them" in caplog.text
    chat_templates.warn_of_unread_options(config, load_tokenizer(tmp_path / "plain"))
    assert "sets role, thinking: the student's chat template has none" in caplog.text


def test_a_teacher_of_the_same_template_with_other_ends_is_evaluated_by_its_own(config: Any, tmp_path: Path):
    plain = "{% for m in messages %}[{{m['role']}}]{{m['content']}}{% endfor %}"
    for name, end in (("base", "<eos>"), ("instruct", "<turn>")):
        specials = ("<pad>", "<eos>", "<turn>")
        save_byte_tokenizer(tmp_path / name, specials=specials, template=plain, eos_token=end)
    student = load_tokenizer(tmp_path / "base")
    config.teacher = config.teacher.model_copy(update={"model": tmp_path / "instruct"})
    suites = datasets.complete_suites(config.evaluate, config.data, budget=9)
    problems = datasets.read_problems(suites, config.data, student, allow_code=False)
    own, _ = chat_templates.teacher_problems(config, suites, student, problems)
    assert [own.token_text(i) for i in own.eos_ids] == ["<turn>"]
    (found,) = chat_templates.template_differences(config, student)
    assert not found.prompts and found.ends == ("<eos>", "<turn>")
