from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from megatron_tropd.config.sections import ColumnsConfig
from megatron_tropd.data.prompts import Limits, read_prompts, read_sources
from megatron_tropd.data.rows import Source
from megatron_tropd.data.tokenizer import Tokenizer, load_tokenizer
from megatron_tropd.errors import ConfigError, DataError

REPOSITORY = Path(__file__).resolve().parents[3]
LETTERS = {chr(code) for code in range(32, 127)} | {"\n"}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """One token per printable ASCII character: expected ids can be written down by hand. No chat template."""
    directory = tmp_path_factory.mktemp("letters")
    letters = {chr(code): code - 31 for code in range(32, 127)} | {"<eos>": 0, "\n": 96}
    raw = RawTokenizer(models.WordLevel(letters))
    raw.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    raw.decoder = decoders.Fuse()
    raw.add_special_tokens(["<eos>"])
    raw.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(directory)


def ids(text: str) -> list[int]:
    return [ord(letter) - 31 for letter in text]


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


# --------------------------------------------------------------------------- reading


def test_rows_become_prompts_with_end_token_and_stable_row_numbers(tokenizer, tmp_path):
    rows = [
        {"prompt": "ab", "answer": 7, "response": "cd"},
        "",
        {"prompt": "x", "response": "y<eos>", "answer": "-1.5"},
    ]
    first, second = read_prompts(write(tmp_path / "a.jsonl", *rows), tokenizer).prompts
    assert (first.index, second.index) == (0, 2)  # the blank line counts
    assert first.token_ids.tolist() == ids("ab") and first.token_ids.dtype == np.int64
    assert first.response_ids.tolist() == [*ids("cd"), 0]
    assert second.response_ids.tolist() == [*ids("y"), 0]  # no second end token
    assert (first.text, first.answer, second.answer) == ("ab", "7", "-1.5")


def test_response_and_answer_are_optional_unless_required(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "ab"})
    (prompt,) = read_prompts(path, tokenizer).prompts
    assert prompt.answer is None and prompt.response_ids is None
    with pytest.raises(DataError, match=r"a.jsonl:1: column 'response' holds 'None'"):
        read_prompts(path, tokenizer, require_response=True)


def test_gsm8k_files_are_read_by_naming_their_columns(tokenizer, tmp_path):
    # the real file where it lies beside the repository, otherwise rows of the same form
    path = REPOSITORY.parent / "shared" / "data" / "gsm8k" / "test.jsonl"
    if not path.exists():
        path = write(tmp_path / "g.jsonl", *({"question": f"{i} + 1?", "answer": f"x\n#### {i + 1}"} for i in range(9)))
    lines = path.read_text(encoding="utf-8").splitlines()
    columns = ColumnsConfig(prompt="question", answer="answer", response="answer")
    result = read_prompts(path, tokenizer, columns=columns, on_bad_row="skip")  # letters beyond ASCII: no token here
    unknown = [i for i, line in enumerate(lines, 1) if not set("".join(json.loads(line).values())) <= LETTERS]
    assert [int(row.split(":")[1]) for row in result.bad_rows] == unknown
    assert len(result.prompts) == len(lines) - len(unknown)
    for prompt in result.prompts:
        row = json.loads(lines[prompt.index])
        assert (prompt.text, prompt.answer) == (row["question"], row["answer"])
        assert len(prompt.response_ids) == len(row["answer"]) + 1


def test_long_prompts_are_left_out_not_cut(tokenizer, tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", *({"prompt": text} for text in ("abcd", "abc", "abcde", "a")))
    result = read_prompts(path, tokenizer, max_prompt_tokens=3)
    assert [prompt.index for prompt in result.prompts] == [1, 3]
    assert result.too_long == (0, 2)
    assert "kept 2 prompts, left out 2 longer than 3 tokens, 0 bad" in caplog.text
    with pytest.raises(DataError, match=r"no usable prompt in .*4 longer than 0 tokens"):
        read_prompts(path, tokenizer, max_prompt_tokens=0)


def test_most_rows_left_out_is_an_error_unless_that_is_wanted(tokenizer, tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", *({"prompt": text} for text in ("abcd", "abc", *[""] * 9)))
    source = Source(paths=(path,))
    limits = Limits(max_prompt_tokens=3)
    with pytest.raises(
        DataError, match=r"of 11 rows 10 are left out, 1 longer than 3 tokens, 9 bad(.|\n)*max_left_out"
    ):
        read_sources([source], tokenizer, limits=limits, on_bad_row="skip")
    wanted = replace(limits, max_left_out=10 / 11)
    assert len(read_sources([source], tokenizer, limits=wanted, on_bad_row="skip").prompts) == 1
    assert "kept 1 prompts, left out 1 longer" in caplog.text


def test_several_files_are_numbered_through(tokenizer, tmp_path):
    paths = [write(tmp_path / f"{name}.jsonl", {"prompt": name}, {"prompt": name * 2}) for name in "ab"]
    assert [(p.index, p.text) for p in read_prompts(paths, tokenizer).prompts] == [
        (0, "a"), (1, "aa"), (2, "b"), (3, "bb"),
    ]  # fmt: skip


BAD_ROWS = {
    '{"prompt": "torn': "not valid JSON",
    '["a list"]': "holds list, expected a JSON object",
    '{"question": "q"}': r"has neither 'prompt' nor 'messages', only \['question'\]",
    '{"prompt": "  "}': "column 'prompt' is empty",
    '{"prompt": 5}': "prompt holds '5', expected text or a list of messages",
    '{"messages": [{"role": "user"}]}': "expected text or a list of messages",
    '{"messages": [{"role": "user", "content": "hi"}]}': "no chat template",
    '{"prompt": "a", "answer": [1]}': "column 'answer' holds list",
    '{"prompt": "a", "answer": true}': "column 'answer' holds bool",
    '{"prompt": "a", "response": ""}': "column 'response' holds ''",
    '{"prompt": "\\u00e9"}': "cannot encode",
}


@pytest.mark.parametrize("row", BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_a_bad_row_stops_with_file_line_and_reason_or_is_skipped_and_named(tokenizer, tmp_path, row, caplog):
    path = write(tmp_path / "a.jsonl", {"prompt": "good"}, row, {"prompt": "fine"})
    with pytest.raises(DataError, match=rf"a\.jsonl:2: .*{BAD_ROWS[row]}"):
        read_prompts(path, tokenizer)
    result = read_prompts(path, tokenizer, on_bad_row="skip")
    assert [prompt.text for prompt in result.prompts] == ["good", "fine"]
    assert len(result.bad_rows) == 1 and "a.jsonl:2: " in result.bad_rows[0]
    assert "1 bad" in caplog.text and "a.jsonl:2: " in caplog.text


def test_bytes_that_are_not_utf8_are_a_bad_row_and_a_byte_order_mark_is_not(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match=r"a.jsonl:2: not valid JSON: .*utf-8"):
        read_prompts(path, tokenizer)


def test_missing_files_and_unknown_policies_are_refused(tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"nowhere.jsonl does not exist"):
        read_prompts(tmp_path / "nowhere.jsonl", tokenizer)
    with pytest.raises(ConfigError, match="'error' or 'skip'"):
        read_prompts(tmp_path / "nowhere.jsonl", tokenizer, on_bad_row="ignore")


def test_chat_rows_are_rendered_with_the_template(tokenizer, tmp_path):
    directory = tmp_path / "chat"
    directory.mkdir()
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    template = (
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    (directory / "tokenizer.json").write_text((tokenizer.path / "tokenizer.json").read_text())
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    path = write(tmp_path / "a.jsonl", {"messages": messages}, {"prompt": "V"})
    first, second = read_prompts(path, load_tokenizer(directory)).prompts
    assert first.token_ids.tolist() == ids("s:S;u:U;a:") and first.text == "S\nU"
    assert second.token_ids.tolist() == ids("u:V;a:")


def test_every_source_gives_so_many_rows_with_numbers_of_their_own(tokenizer, tmp_path):
    first = write(tmp_path / "a.jsonl", *({"prompt": letter} for letter in "abcd"))
    second = write(tmp_path / "b.jsonl", *({"prompt": letter} for letter in "xyz"))
    sources = [Source(paths=(path,), name=path.stem) for path in (first, second)]
    prompts = read_sources(sources, tokenizer, limits=Limits(max_rows=2)).prompts
    assert [(p.text, p.source) for p in prompts] == [("a", "a"), ("b", "a"), ("x", "b"), ("y", "b")]
    assert len({p.index for p in prompts}) == 4


def test_the_first_end_token_ends_a_response_that_has_none_of_them(tokenizer, tmp_path):
    several = replace(tokenizer, eos_ids=(0, *ids("~")))
    rows = write(tmp_path / "a.jsonl", {"prompt": "a", "response": "b"}, {"prompt": "a", "response": "b~"})
    first, second = read_prompts(rows, several).prompts
    assert (first.response_ids.tolist(), second.response_ids.tolist()) == ([*ids("b"), 0], ids("b~"))


def test_an_answer_template_sees_the_answer_column_whatever_its_name(tokenizer, tmp_path):
    path = write(tmp_path / "a.jsonl", {"prompt": "a", "meta": {"gold": 7}}, {"prompt": "b", "meta": {"gold": 0}})
    source = Source(paths=(path,), columns=ColumnsConfig(answer="meta.gold"))
    assert [p.answer for p in read_sources([source], tokenizer).prompts] == ["7", "0"]  # 0 is an answer
    templated = replace(source, answer_template="#### {{ answer }}")
    assert [p.answer for p in read_sources([templated], tokenizer).prompts] == ["#### 7", "#### 0"]
