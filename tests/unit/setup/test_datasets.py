"""What a configuration says about data is what is read: sources and their weights, suites, and what fits the models."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_tropd.config.sections import DataConfig, EvaluateConfig, SourceConfig, SuiteConfig
from megatron_tropd.data.table import PromptTable, table_of
from megatron_tropd.errors import ConfigError, DataError, TokenizerError
from megatron_tropd.setup import datasets as reading
from megatron_tropd.types import Architecture, Prompt


class Letters:
    """Token i is the i-th letter, 0 the end token; a conversation is rendered as ``role:content`` lines."""

    eos_ids, turn_end, pad_id, bos_id, chat, vocab = (0,), 0, 0, None, None, {}

    def token_text(self, i: int) -> str:
        return "" if i == 0 else chr(i)

    def encode(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def identity(self) -> str:
        return "letters"

    def render_prompt(self, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
        lines = prompt if isinstance(prompt, str) else "\n".join(f"{m['role']}:{m['content']}" for m in prompt)
        return self.encode(lines)


MODEL = Architecture(
    family="x", num_layers=1, hidden_size=4, ffn_size=4, num_heads=1, num_kv_heads=1, head_dim=4, vocab_size=20,
    max_positions=10, rope_theta=1.0, norm_eps=1e-6, tied_embeddings=True,
)  # fmt: skip


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table(*ids: Sequence[int], **options: Any) -> PromptTable:
    return table_of(Prompt(index=i, token_ids=np.array(row), text="", **options) for i, row in enumerate(ids))


def shown(prompts: PromptTable) -> list[str]:
    return ["".join(map(chr, prompt.token_ids)) for prompt in prompts]


# --------------------------------------------------------------------------- sources


def test_a_source_has_its_own_columns_template_and_weight_or_those_of_all(tmp_path):
    own = {"columns": {"prompt": "q", "answer": "a"}, "template": "", "system": "be brief", "weight": 3, "teacher": "t"}
    data = DataConfig(
        sources=(
            SourceConfig(name="own", prompts=(tmp_path / "own",), answer_template="{{ a }}!", **own),
            SourceConfig(name="plain", prompts=(tmp_path / "plain",), weight=0.5),
        ),
        columns={"prompt": "text"},
        template="T{{ prompt }}",
        answer_template="A{{ answer }}",
        system="S",
    )
    first, second = reading.sources_of(data)
    assert (first.columns.prompt, first.template, first.answer_template) == ("q", "", "{{ a }}!")  # empty is not unset
    assert (first.system, first.teacher, first.paths) == ("be brief", "t", (tmp_path / "own",))
    assert (second.columns.prompt, second.template, second.answer_template) == (
        "text",
        "T{{ prompt }}",
        "A{{ answer }}",
    )
    assert (second.system, second.teacher) == ("S", "")

    prompts = table_of(
        Prompt(index=i, token_ids=np.array([1]), text="", source=source)
        for i, source in enumerate(["own", "own", "plain"])
    )
    assert [(s.rows_N.tolist(), s.weight) for s in reading.shares_of(data, prompts)] == [([0, 1], 3.0), ([2], 0.5)]
    bare = DataConfig(sources=tuple(SourceConfig(name=s.name, prompts=s.prompts) for s in data.sources))
    assert [share.weight for share in reading.shares_of(bare, prompts)] == [2.0, 1.0]  # by size


def test_the_identity_of_the_data_changes_with_content_weights_order_and_teachers():
    def identity(*, ids: int = 1, weight: float = 1.0, shuffle: bool = True, teacher: str | None = None) -> str:
        source = SourceConfig(name="s", prompts=(Path("p"),), weight=weight, teacher=teacher)
        data = DataConfig(sources=(source,), shuffle=shuffle)
        return json.dumps(reading.data_identity(data, table([ids], source="s")))

    changed = [identity(), identity(ids=2), identity(weight=2.0), identity(shuffle=False), identity(teacher="t")]
    assert len(set(changed)) == 5 and identity() == changed[0]


def test_one_prompt_without_a_response_is_one_too_many_for_guidance(tmp_path):
    path = write(tmp_path / "p.jsonl", {"prompt": "a", "response": "b"}, {"prompt": "c"})
    config: Any = SimpleNamespace(
        data=DataConfig(prompts=(path,), responses="required"), method=SimpleNamespace(name="tropd")
    )
    with pytest.raises(DataError, match=r"1 of 2 prompts have no teacher response .* first is .*p.jsonl:2"):
        reading.read_training_prompts(config, Letters(), guided=True)
    assert len(reading.read_training_prompts(config, Letters(), guided=False)) == 2
    config.data = DataConfig(prompts=(path,), on_bad_row="skip")
    assert shown(reading.read_training_prompts(config, Letters(), guided=True)) == ["a"]


# --------------------------------------------------------------------------- suites


def test_a_suite_keeps_what_it_says_and_takes_the_rest_from_around_it(tmp_path):
    data = DataConfig(prompts=(Path("p"),), template="T", answer_template="A", system="S", grader="exact")
    mine = SuiteConfig(
        name="mine", prompts=(Path("m"),), max_problems=3, template="", system="", grader="choice", max_new_tokens=5
    )
    evaluate = EvaluateConfig(prompts=(Path("h"),), max_problems=7, suites=(mine, SuiteConfig(name="plain")))
    first, second = reading.complete_suites(evaluate, data, budget=90)
    assert (first.prompts, first.max_problems, first.template, first.system) == ((Path("m"),), 3, "", "")
    assert (first.grader, first.max_new_tokens, first.answer_template) == ("choice", 5, "A")
    assert (second.prompts, second.max_problems, second.template, second.system) == ((Path("h"),), 7, "T", "S")
    assert (second.grader, second.max_new_tokens) == ("exact", 90)
    without = EvaluateConfig(suites=(mine, SuiteConfig(name="plain")))  # no problems, no suite
    assert [suite.name for suite in reading.complete_suites(without, data, budget=90)] == ["mine"]


def test_suites_of_one_file_have_problems_of_their_own_number_and_shape(tmp_path):
    path = write(tmp_path / "p.jsonl", *({"prompt": letter, "answer": letter} for letter in "abc"))
    data = DataConfig(prompts=(path,), grader="exact")
    suites = (
        SuiteConfig(name="all"),
        SuiteConfig(name="two", max_problems=2),
        SuiteConfig(name="told", system="S"),
        SuiteConfig(name="again", temperature=1.0, samples=2),
    )
    complete = reading.complete_suites(EvaluateConfig(prompts=(path,), suites=suites), data, budget=9)
    problems = reading.read_problems(complete, data, Letters(), allow_code=False)
    assert {name: len(rows) for name, rows in problems.items()} == {"all": 3, "two": 2, "told": 3, "again": 3}
    assert shown(problems["two"]) == ["a", "b"] and shown(problems["told"])[0] == "system:S\nuser:a"
    assert problems["again"] is problems["all"]


def test_every_reference_is_looked_at_wherever_it_stands(tmp_path):
    rows = [{"prompt": "q", "answer": "A"} for _ in range(90)]
    data = DataConfig(prompts=(Path("p"),), grader="choice")

    def read(**changed: Any) -> None:
        path = write(tmp_path / "p.jsonl", *rows[:47], {"prompt": "q"} | changed, *rows[47:])
        suites = reading.complete_suites(
            EvaluateConfig(prompts=(path,), suites=(SuiteConfig(name="s"),)), data, budget=9
        )
        reading.read_problems(suites, data, Letters(), allow_code=False)

    with pytest.raises(DataError, match=r"p.jsonl:48: reference answer 'Z' is not a choice"):
        read(answer="Z")
    with pytest.raises(DataError, match=r"1 of 91 problems have no reference answer .* first is .*p.jsonl:48"):
        read()


# --------------------------------------------------------------------------- what fits the models


def test_ids_must_be_below_the_smallest_embedding():
    tokenizer: Any = SimpleNamespace(eos_ids=(19,))
    rows = {"prompt": [table([1, 2], [19, 3])], "problem": [table([4])]}
    reading.check_ids(rows, tokenizer, vocab_sizes={"student": 20, "teacher": 30})
    rows["problem"].append(table([4], [5, 20], [20]))
    with pytest.raises(TokenizerError, match=r"the problem at memory:2 holds token id 20, but the teacher has .* 20 "):
        reading.check_ids(rows, tokenizer, vocab_sizes={"student": 30, "teacher": 20})
    with pytest.raises(TokenizerError, match=r"the end-of-sequence id is 19, but the student has embeddings for 19 "):
        reading.check_ids({}, tokenizer, vocab_sizes={"student": 19, "teacher": 30})
    answered = table([1], response_ids=np.array([25, 0]))  # what the teacher wrote is read too
    with pytest.raises(TokenizerError, match="the prompt at memory:1 holds token id 25"):
        reading.check_ids({"prompt": [answered]}, tokenizer, vocab_sizes={"student": 20})


def test_the_longest_prompt_and_a_full_answer_must_fit_every_model():
    prompts = table([1], [1, 2, 3], [1, 2])
    config: Any = SimpleNamespace(rollout=SimpleNamespace(max_new_tokens=7))
    reading.check_training_lengths(config, prompts, {"student": MODEL})  # 3 + 7 = 10
    shorter = replace(MODEL, max_positions=9)
    with pytest.raises(
        ConfigError, match=r"prompt at memory:2 has 3 tokens; .* may have 10, but the teacher has 9 .* 6 "
    ):
        reading.check_training_lengths(config, prompts, {"student": MODEL, "teacher": shorter})

    suites = (SuiteConfig(name="a", max_new_tokens=7), SuiteConfig(name="b", max_new_tokens=8))
    reading.check_problem_lengths(suites[:1], {"a": prompts}, {"student": MODEL})
    with pytest.raises(ConfigError, match=r"max_new_tokens of the suite 'b' = 8 a sequence may have 11"):
        reading.check_problem_lengths(suites, {"a": prompts, "b": prompts}, {"student": MODEL})
