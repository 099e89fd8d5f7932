"""A response is what the chat template writes; what a text repeats of that is cut once, and everything cut is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from megatron_tropd.config.sections import ColumnsConfig
from megatron_tropd.data.prompts import PromptSet, read_prompts, read_sources
from megatron_tropd.data.rows import Source, ids_digest, tokenizer_digest
from megatron_tropd.data.tokenizer import Tokenizer, load_tokenizer
from megatron_tropd.errors import DataError
from megatron_tropd.types import Prompt
from tests.support.chat_families import FAMILIES, THINKING, Family, save_byte_tokenizer

QUESTION = [{"role": "user", "content": "Rain?"}]
TURNS = [*QUESTION, {"role": "assistant", "content": "No."}, {"role": "user", "content": "Snow?"}]
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {}}}]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
TOOLED = (
    "{% if tools %}{{ '<|im_start|>tools ' + (tools | tojson) + '<|im_end|>' }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' }}{% if m.tool_calls %}{{ 'CALL ' + m.tool_calls[0].function.name }}"
    "{% else %}{{ m['content'] }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    families = FAMILIES | THINKING
    return {name: load_tokenizer(family.save(tmp_path_factory.mktemp("f"))) for name, family in families.items()}


def read(tmp_path: Path, tokenizer: Tokenizer, *rows: dict[str, Any], **options: Any) -> PromptSet:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_prompts(path, tokenizer, **options)


def spelled(tokenizer: Tokenizer, ids: Any) -> str:
    return "".join(tokenizer.tokens([int(i) for i in ids]))


def both(tokenizer: Tokenizer, prompt: Prompt) -> str:
    assert prompt.response_ids is not None
    return spelled(tokenizer, [*prompt.token_ids, *prompt.response_ids])


# --------------------------------------------------------------------------- as the template writes it


@pytest.mark.parametrize("turns", [QUESTION, TURNS], ids=["one turn", "three turns"])
@pytest.mark.parametrize("name", FAMILIES)
def test_prompt_and_response_are_the_ids_of_the_whole_conversation(
    loaded: dict[str, Tokenizer], tmp_path: Path, name: str, turns: list[dict[str, str]]
):
    family, tokenizer = FAMILIES[name], loaded[name]
    oracle = AutoTokenizer.from_pretrained(str(tokenizer.path), local_files_only=True)
    answer = " Dry, naïve 🙂\n"
    whole = [*turns, {"role": "assistant", "content": answer}]
    text = oracle.apply_chat_template(whole, tokenize=False)
    tail = family.end + (family.tail or ("\n" if name == "zephyr" else ""))
    assert text.endswith(tail)
    expected = list(oracle(text.removesuffix(tail) + family.end, add_special_tokens=False).input_ids)

    spoken, column = read(tmp_path, tokenizer, {"messages": whole}, {"prompt": turns, "response": answer}).prompts
    for prompt in (spoken, column):
        start = oracle.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        assert prompt.token_ids.tolist() == list(oracle(start, add_special_tokens=False).input_ids)
        assert [*prompt.token_ids, *prompt.response_ids] == expected
    assert expected[-1] in tokenizer.eos_ids  # the sampler stops where the template's turn ends


@pytest.mark.parametrize("name", FAMILIES)
def test_an_end_token_in_the_text_is_no_second_end(loaded: dict[str, Tokenizer], tmp_path: Path, name: str, caplog):
    family, tokenizer = FAMILIES[name], loaded[name]
    pad = family.specials[0]
    rows = ["ok", f"ok{family.end}", f"ok{family.eos}\n{family.eos}", f"ok{family.end}\nUser: more", f"ok{pad}{pad}"]
    found = read(tmp_path, tokenizer, *({"prompt": "Rain?", "response": row} for row in rows)).prompts
    assert len({tuple(prompt.response_ids.tolist()) for prompt in found}) == 1
    assert spelled(tokenizer, found[0].response_ids).endswith(f"ok{family.end}")
    assert "3 rows hold a response with an end or padding token inside" in caplog.text


def test_a_response_that_the_template_begins_otherwise_is_the_templates(tmp_path: Path):
    head = "{% for m in messages %}<{{m['role']}}>"
    templates = {
        "{{'\n'+m['content']}}<eos>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}": "\n ok <eos>",
        "{{m['content']|trim}}<turn>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}": "ok<turn>",
        # it ends nothing
        "{{m['content']}}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}": " ok <eos>",
    }
    row = {"messages": [*QUESTION, {"role": "assistant", "content": " ok "}]}
    for number, (template, expected) in enumerate(templates.items()):
        directory = save_byte_tokenizer(
            tmp_path / str(number), specials=("<pad>", "<eos>", "<turn>"), template=head + template
        )
        tokenizer = load_tokenizer(directory)
        (prompt,) = read(tmp_path, tokenizer, row).prompts
        assert spelled(tokenizer, prompt.response_ids) == expected


# --------------------------------------------------------------------------- texts that repeat what we add


@pytest.mark.parametrize(
    "start", ["<think>\n", "<think>", "<|Assistant|><think>\n", "<|begin|><|User|>Hi<|Assistant|><think>\n", ""]
)
def test_thoughts_are_opened_once(loaded: dict[str, Tokenizer], tmp_path: Path, start: str, caplog):
    tokenizer, text = loaded["r1"], start + "hmm\n</think>\n\nHello"
    rows = [
        {"prompt": "Hi", "response": text},
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]},
    ]
    for prompt in read(tmp_path, tokenizer, *rows).prompts:
        assert both(tokenizer, prompt) == "<|begin|><|User|>Hi<|Assistant|><think>\nhmm\n</think>\n\nHello<|end|>"
    assert ("2 rows hold a response that began with what the prompt ends in" in caplog.text) == bool(start)


def test_a_template_that_opens_thoughts_itself_does_not_close_those_of_the_text(loaded, tmp_path: Path):
    tokenizer = loaded["qwen3"]
    texts = ["<think>\nhmm\n</think>\n\nHello", "<think>\nhmm, hm", "Hello", "<|im_start|>assistant\nHello"]
    found = read(tmp_path, tokenizer, *({"prompt": "Hi", "response": text} for text in texts)).prompts
    assert [spelled(tokenizer, prompt.response_ids) for prompt in found] == [
        "<think>\nhmm\n</think>\n\nHello<|im_end|>",
        "<think>\nhmm, hm<|im_end|>",
        "<think>\n\n</think>\n\nHello<|im_end|>",
        "<think>\n\n</think>\n\nHello<|im_end|>",
    ]
    quiet = load_tokenizer(tokenizer.path, template_options={"enable_thinking": False})
    (prompt,) = read(tmp_path, quiet, {"prompt": "Hi", "response": "<think>\n\n</think>\n\nHello"}).prompts
    assert both(quiet, prompt).endswith("assistant\n<think>\n\n</think>\n\nHello<|im_end|>")
    assert both(quiet, prompt).count("<think>") == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_rendered_prompt_is_not_rendered_again(loaded: dict[str, Tokenizer], tmp_path: Path, name: str, caplog):
    tokenizer = loaded[name]
    plain, multi = tokenizer.chat.render(QUESTION), tokenizer.chat.render(TURNS)
    rows = [{"prompt": "Rain?"}, {"prompt": plain}, {"prompt": plain.strip()}, {"prompt": multi}]
    found = read(tmp_path, tokenizer, *rows).prompts
    assert [p.token_ids.tolist() for p in found[1:3]] == [found[0].token_ids.tolist()] * 2
    assert found[3].token_ids.tolist() == tokenizer.encode(multi)
    (answered,) = read(tmp_path, tokenizer, {"prompt": plain, "response": "No."}).prompts
    assert both(tokenizer, answered) == f"{plain}No.{FAMILIES[name].end}"
    assert "3 rows hold a whole rendered prompt" in caplog.text


def test_half_a_rendered_prompt_is_refused(loaded, tmp_path: Path):
    for row in (
        {"prompt": "<|im_start|>user\nRain?<|im_end|>\n"},
        {"prompt": [{"role": "user", "content": "<|im_start|>user\nRain?"}]},
    ):
        with pytest.raises(DataError, match=r"rows.jsonl:1: begins with '<\|im_start\|>', which the chat template"):
            read(tmp_path, loaded["chatml"], row)
    rendered = loaded["chatml"].chat.render(QUESTION)
    (tmp_path / "r.jsonl").write_text(json.dumps({"prompt": rendered}) + "\n")
    with pytest.raises(DataError, match=r"into which data.system cannot be written"):
        read_sources([Source(paths=(tmp_path / "r.jsonl",), system="S")], loaded["chatml"])


def test_a_beginning_token_is_added_once(loaded, tmp_path: Path, caplog):
    tokenizer = loaded["llama3"]
    rows = [{"prompt": "<|begin|>Rain?", "response": "<|begin|>No."}, {"prompt": "Rain?", "response": "No."}]
    first, second = read(tmp_path, tokenizer, *rows).prompts
    assert both(tokenizer, first) == both(tokenizer, second) and both(tokenizer, first).count("<|begin|>") == 1
    plain = load_tokenizer(tokenizer.path, chat_template=False)
    first, second = read(tmp_path, plain, *rows).prompts
    assert both(plain, first) == both(plain, second) == "<|begin|>Rain?No.<|end_of_text|>"
    assert caplog.text.count("1 row holds a text that begins with the beginning token") == 2


@pytest.mark.parametrize("chat", [True, False])
def test_a_prompt_that_is_nothing_but_an_end_token_is_refused(loaded, tmp_path: Path, chat: bool):
    tokenizer = load_tokenizer(loaded["llama3"].path, chat_template=chat)
    for text in ("<|end_of_text|>", " <|end_of_text|>\n<|end_of_text|>", "<|begin|>"):
        with pytest.raises(DataError, match=r"rows.jsonl:1: column 'prompt' is empty"):
            read(tmp_path, tokenizer, {"prompt": text})
    (prompt,) = read(tmp_path, tokenizer, {"prompt": "Rain?<|end_of_text|>"}).prompts
    assert "<|end_of_text|>" not in spelled(tokenizer, prompt.token_ids)


# --------------------------------------------------------------------------- cut responses


def test_a_response_that_was_cut_off_teaches_no_end(loaded, tmp_path: Path, caplog):
    for name in ("chatml", "qwen3", "r1"):
        tokenizer = loaded[name]
        rows = [
            {"prompt": "Hi", "response": "<think>\nhm", "finished": False},
            {"prompt": "Hi", "response": "<think>\nhm", "finish_reason": "length"},
            {"prompt": "Hi", "response": "hm", "finished": True, "finish_reason": "length"},
        ]
        *cut, whole = read(tmp_path, tokenizer, *rows).prompts
        for prompt in cut:
            assert both(tokenizer, prompt).endswith("<think>\nhm") and not prompt.response_finished
            assert both(tokenizer, prompt).count("<think>") == 1
        assert whole.response_ids[-1] == tokenizer.turn_end and whole.response_finished
    assert caplog.text.count("2 rows hold a response that was cut off") == 3
    with pytest.raises(DataError, match="column 'finished' holds '1', expected true, or false"):
        read(tmp_path, loaded["chatml"], {"prompt": "Hi", "response": "a", "finished": 1})


def test_the_mark_of_a_cut_response_stands_beside_its_own_column(loaded, tmp_path: Path):
    row = {"prompt": "Hi", "response": "a", "finished": False, "other": "b", "other_finished": True}
    (prompt,) = read(tmp_path, loaded["chatml"], row, columns=ColumnsConfig(response="other")).prompts
    assert prompt.response_finished and prompt.response_ids[-1] == loaded["chatml"].turn_end


# --------------------------------------------------------------------------- tools and thoughts


@pytest.fixture
def tooled(tmp_path: Path) -> Tokenizer:
    marks = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    directory = save_byte_tokenizer(tmp_path / "tooled", specials=marks, template=TOOLED, eos_token="<|im_end|>")
    return load_tokenizer(directory)


def test_tools_reach_the_template_or_the_row_is_refused(tooled: Tokenizer, loaded, tmp_path: Path):
    oracle = AutoTokenizer.from_pretrained(str(tooled.path), local_files_only=True)
    expected = oracle.apply_chat_template(QUESTION, tools=TOOLS, add_generation_prompt=True, return_dict=True)
    rows = [{"messages": QUESTION, "tools": TOOLS}, {"prompt": "Rain?", "tools": json.dumps(TOOLS)}]
    for prompt in read(tmp_path, tooled, *rows).prompts:
        assert prompt.token_ids.tolist() == list(expected["input_ids"])
    bare = read(tmp_path, tooled, {"prompt": "Rain?", "tools": []}, {"prompt": "Rain?", "tools": "[]"}).prompts
    assert all("tools" not in spelled(tooled, prompt.token_ids) for prompt in bare)
    with pytest.raises(DataError, match="has tools, which the chat template does not write"):
        read(tmp_path, loaded["chatml"], rows[0])
    plain = load_tokenizer(tooled.path, chat_template=False)
    with pytest.raises(DataError, match="has tools, which only a chat template can write"):
        read(tmp_path, plain, rows[1])
    with pytest.raises(DataError, match="expected a list of tools"):
        read(tmp_path, tooled, {"prompt": "Rain?", "tools": {"name": "weather"}})


def test_calls_and_thoughts_of_the_last_message_are_its_response_or_refused(tooled, loaded, tmp_path: Path, caplog):
    called = {"role": "assistant", "content": None, "tool_calls": CALL}
    talked = {"role": "assistant", "content": "Let me look.", "tool_calls": CALL}
    first, second = read(tmp_path, tooled, {"messages": [*QUESTION, called]}, {"messages": [*QUESTION, talked]}).prompts
    assert spelled(tooled, first.response_ids) == spelled(tooled, second.response_ids) == "CALL weather<|im_end|>"
    assert "1 row ends in a message with text beside tool calls, which the chat template leaves out" in caplog.text
    with pytest.raises(DataError, match="holds 'tool_calls', which the chat template does not write"):
        read(tmp_path, loaded["chatml"], {"messages": [*QUESTION, talked]})
    thought = {"messages": [*QUESTION, {"role": "assistant", "content": "No.", "reasoning_content": "It is dry."}]}
    (prompt,) = read(tmp_path, loaded["qwen3"], thought).prompts
    assert spelled(loaded["qwen3"], prompt.response_ids) == "<think>\nIt is dry.\n</think>\n\nNo.<|im_end|>"
    with pytest.raises(DataError, match="holds 'reasoning_content', which the chat template does not write"):
        read(tmp_path, tooled, thought)
    quiet = load_tokenizer(loaded["qwen3"].path, template_options={"enable_thinking": False})
    with pytest.raises(DataError, match="otherwise than behind its generation prompt"):
        read(tmp_path, quiet, thought)


def test_content_may_be_null_beside_calls_and_nowhere_else(tooled, tmp_path: Path):
    for empty in ({"content": None}, {}):
        called = {"role": "assistant", "tool_calls": CALL, **empty}
        row = {"messages": [*QUESTION, called, {"role": "tool", "content": "no"}]}
        (prompt,) = read(tmp_path, tooled, row).prompts
        assert "assistant\nCALL weather<|im_end|>\n<|im_start|>tool\nno<|im_end|>" in spelled(tooled, prompt.token_ids)
    with pytest.raises(DataError, match="expected text or a list of messages"):
        read(tmp_path, tooled, {"messages": [{"role": "user", "content": None}]})


# --------------------------------------------------------------------------- what `tropd generate` keeps


def test_kept_ids_are_read_bit_for_bit_while_they_are_what_the_row_says(loaded, tmp_path: Path, caplog):
    tokenizer = loaded["qwen3"]
    ids = [*tokenizer.encode("<think>"), *tokenizer.encode("x"), tokenizer.eos_ids[0]]  # no template writes it so
    prompt_ids = tokenizer.render_prompt("Hi")
    kept = {"ids": ids, "prompt": ids_digest(prompt_ids), "tokenizer": tokenizer_digest(tokenizer)}
    row = {"prompt": "Hi", "response": "<think>x", "finished": True, "generated": kept}
    (prompt,) = read(tmp_path, tokenizer, row).prompts
    assert prompt.response_ids.tolist() == ids and not caplog.text
    changed = [
        {**row, "response": "<think>y"},
        {**row, "generated": {**kept, "tokenizer": "other"}},
        {**row, "prompt": "Ho"},
    ]
    edited, other, asked = read(tmp_path, tokenizer, *changed).prompts
    assert spelled(tokenizer, edited.response_ids) == "<think>y<|im_end|>"
    assert spelled(tokenizer, other.response_ids) == "<think>x<|im_end|>"
    assert asked.response_ids.tolist() == ids
    for said in ("was changed since", "another tokenizer wrote", "wrote to another prompt than this run"):
        assert said in caplog.text
    foreign = {**kept, "ids": [*ids[:-1], tokenizer.vocab["<|im_start|>"]]}  # what ends answers of another model
    (ended,) = read(tmp_path, tokenizer, {**row, "generated": foreign}).prompts
    assert ended.response_ids.tolist() == ids and "does not end the student's" in caplog.text
    with pytest.raises(DataError, match="column 'generated' holds"):
        read(tmp_path, tokenizer, {**row, "generated": {"ids": "x"}})


# --------------------------------------------------------------------------- what nobody reads


def test_columns_that_nothing_reads_are_named(loaded, tmp_path: Path, caplog):
    rows = [{"prompt": "a", "system": "S", "responses": ["b"], "source": "x"}, {"prompt": "b", "system": "S"}]
    read(tmp_path, loaded["chatml"], *rows)
    assert "2 rows have a column 'system', which nothing reads" in caplog.text
    assert "1 row has a column 'responses', which nothing reads; 'response' is the name that is read" in caplog.text
    assert "'source'" not in caplog.text
    source = Source(paths=(tmp_path / "rows.jsonl",), template="{{ hint | default('') }}{{ system }} {{ prompt }}")
    caplog.clear()
    read_sources([source], loaded["chatml"])
    assert "the template reads 'hint', which no row has" in caplog.text and "'system'" not in caplog.text


def test_a_system_message_that_the_template_drops_is_said(loaded, tmp_path: Path, caplog):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    source = Source(paths=(tmp_path / "rows.jsonl",), system="S")
    read_sources([source], loaded["llama3"])
    assert not caplog.text
    read_sources([source], loaded["r1"])
    assert "2 rows have a system message (their own, or data.system), which the chat template does not" in caplog.text


def test_every_family_differs_where_it_should():
    ends: dict[str, Family] = FAMILIES
    assert len({family.template for family in ends.values()}) >= 10


def test_marks_that_are_special_stand_in_an_answer_s_text_and_its_end_does_not(tmp_path: Path):
    marks = ("<think>", "</think>")
    save_byte_tokenizer(tmp_path / "special", specials=("<pad>", "<eos>", *marks))
    save_byte_tokenizer(tmp_path / "plain", extra=marks)
    for name in ("special", "plain"):
        tokenizer = load_tokenizer(tmp_path / name)
        ids = tokenizer.encode("<think>x</think>y<eos>z")
        assert tokenizer.response_text(ids) == "<think>x</think>y"
