"""A chat template is a program that came with a model: none can hold a run up, or eat its memory."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_tropd.data import template_renderer
from megatron_tropd.data.template_cost import is_bounded
from megatron_tropd.data.template_renderer import ChatRequest, TemplateRenderer
from megatron_tropd.data.tokenizer import HuggingFaceTokenizer, load_tokenizer
from megatron_tropd.errors import ModelFileError, TokenizerError
from tests.support.attacks.model import TEMPLATES
from tests.unit.data.test_data_tokenizer import CHATML, save_byte_bpe

# grow, or may, by what they look like: none of these is run
SUSPECT = {
    **TEMPLATES,
    "a width in a date": "{{ strftime_now('%010000000000d') }}",
    "one loop in another over the same": "{% for a in messages %}{% for b in messages %}x{% endfor %}{% endfor %}",
    "the same by another name": (
        "{% for a in messages %}{% set a = messages %}{% for b in a %}x{% endfor %}{% endfor %}"
    ),
    "the same by a namespace": (
        "{% set ns = namespace(l=messages) %}{% for a in messages %}{% for b in ns.l %}x{% endfor %}{% endfor %}"
    ),
    "a loop that calls itself": "{% for a in messages recursive %}{{ loop(messages) }}{% endfor %}",
    "escapes of escapes": "{% set a = messages|tojson %}" + "{% set a = a|tojson %}" * 40 + "{{ a }}",
    "the same in one line": "{{ messages" + "|tojson" * 40 + " }}",
    "a width in a filter": "{{ 'x'|center(10000000000) }}",
    "a width in a method": "{{ 'x'.ljust(10000000000) }}",
    "a width in a format": "{% set x = '%09999999999d' %}{{ x % 3 }}",
    "a block in a name": "{% set x %}{{ x }}{{ x }}{% endset %}",
    "no template": "{% for %}",
    "too deep to read": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "too long to read": "x" * 200_000,
}
CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% for c in m.tool_calls %}{{ c.name + ': ' + c.arguments|tojson }}"
    "{% for k, v in c.arguments.items() %}{{ k ~ v|string }}{% endfor %}{% endfor %}"
    "{% if loop.index0 % 2 == 0 and not loop.last %}{{ m.content.split('</think>')[-1]|trim }}{% endif %}{% endfor %}"
)
MACRO = "{% macro turn(m) %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endmacro %}"
WITH_MACRO = MACRO + (
    "{% for m in messages %}{{ turn(m) }}{% endfor %}{% if tools %}{{ tools|tojson }}{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if quiet %}<quiet>{% endif %}{{ eos_token }}{% endif %}"
)


@pytest.mark.parametrize("name", SUSPECT)
def test_what_may_grow_or_loop_is_not_rendered_in_place(name: str):
    assert not is_bounded(SUSPECT[name])


@pytest.mark.parametrize("template", [CHATML, CALLS, "{{ messages[0]['content'] | upper }}"])
def test_plain_templates_cost_no_process(template: str):
    assert is_bounded(template)


@pytest.fixture(scope="module")
def renderer():
    renderer = TemplateRenderer(seconds=60.0)
    yield renderer
    renderer.close()


def request(template: str, messages: Any, **options: Any) -> ChatRequest:
    return ChatRequest(
        path=Path("some/model"),
        chat_template=template,
        special_tokens_map={"eos_token": "<eos>"},
        messages=messages,
        options=options,
        generate=True,
    )


CHATS = (
    [{"role": "user", "content": "caf\u00e9 \U0001f600 \ud800 </s>\n"}],
    [{"role": "system", "content": "s", "date": 3.5}, {"role": "user", "content": None, "extra": [1, {"a": None}]}],
)


def test_another_process_renders_to_the_same_text(renderer, tmp_path):
    tokenizer = load_tokenizer(save_byte_bpe(tmp_path / "m", chat_template=CHATML))
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"x": 1}}}]
    for template in (CHATML, WITH_MACRO):
        for chat in CHATS:
            for options in ({}, {"quiet": True}, {"tools": tools}):
                given = {"conversation": chat, "add_generation_prompt": True, "tokenize": False, **options}
                library = tokenizer._tokenizer.apply_chat_template(chat_template=template, **given)
                special = tokenizer._tokenizer.special_tokens_map
                asked = replace(request(template, chat, **options), special_tokens_map=special)
                assert renderer.render(asked) == library


def test_a_refusal_is_the_templates_own_words(renderer):
    with pytest.raises(TokenizerError, match=r"some/model refuses .*'x'.*: only one, please"):
        renderer.render(request("{{ raise_exception('only one, please') }}", [{"role": "user", "content": "x"}]))


def test_memory_without_end_is_refused_by_name_and_the_next_template_is_rendered(renderer):
    doubling = "{% set ns = namespace(s='x') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
    memory, characters = "more than 1 GiB of memory", "more than 16,777,216 characters"
    for template, much in (
        (doubling, memory),
        ("{{ 'x' * 2000000000 }}", memory),
        ("{{ 'x' * 20000000 }}", characters),
    ):
        with pytest.raises(ModelFileError, match=rf"of some/model took {much} to write .*'hi'.*without end"):
            renderer.render(request(template, [{"role": "user", "content": "hi"}]))
    assert renderer.render(request("{{ messages[0].content }}", [{"role": "user", "content": "hi"}])) == "hi"


def test_a_loop_without_end_is_refused_when_the_model_is_loaded(tmp_path, monkeypatch):
    impatient = TemplateRenderer(seconds=1.0)
    monkeypatch.setattr("megatron_tropd.data.chat.RENDERER", impatient)
    try:
        with pytest.raises(ModelFileError, match=r"loops took more than 1 s to write"):
            load_tokenizer(save_byte_bpe(tmp_path / "loops", chat_template=TEMPLATES["loops within loops"]))
        assert impatient._process.pid is None  # ended
    finally:
        impatient.close()


def test_a_process_that_was_ended_is_replaced(renderer):
    one = request("{{ messages[0].content * 2 }}", [{"role": "user", "content": "ab"}])
    assert renderer.render(one) == "abab"
    os.kill(renderer._process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, renderer._process.pid, os.WEXITED | os.WNOWAIT)
    assert renderer.render(one) == "abab"


def test_the_process_has_no_keys(renderer, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "s3cret")
    fresh = TemplateRenderer(seconds=60.0)
    try:
        fresh.render(request("{{ 1 * 1 }}", [{"role": "user", "content": "x"}]))
        assert b"s3cret" not in Path(f"/proc/{fresh._process.pid}/environ").read_bytes()
    finally:
        fresh.close()
    assert json.loads(request("t", []).definition)["chat_template"] == "t" and template_renderer.SECONDS <= 10.0
