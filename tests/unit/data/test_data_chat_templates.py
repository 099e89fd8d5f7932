"""Chat templates render exactly as transformers renders them, in a sandbox, and no special token is added twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, processors
from transformers import AutoTokenizer

from megatron_tropd.data.tokenizer import Tokenizer, load_tokenizer
from megatron_tropd.errors import TokenizerError
from tests.unit.data.test_data_tokenizer import save_byte_bpe

# the constructions that published templates are made of: white-space control, bos inside the template, a default system
# message, alternating roles, slices, namespaces, filters, loop controls, a generation block, a thinking switch
TEMPLATES = {
    "chatml": (
        "{%- if messages[0].role == 'system' %}\n    {{- '<|im_start|>system\\n' + messages[0].content "
        "+ '<|im_end|>\\n' }}\n{%- else %}\n    {{- '<|im_start|>system\\nBe brief.<|im_end|>\\n' }}\n{%- endif %}\n"
        "{%- for message in messages %}\n    {%- if message.role != 'system' %}\n        {{- '<|im_start|>' + "
        "message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}\n    {%- endif %}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n"
        "    {%- if enable_thinking is defined and enable_thinking is false %}\n"
        "        {{- '<think>\\n\\n</think>\\n\\n' }}\n    {%- endif %}\n{%- endif %}"
    ),
    "bos_and_headers": (
        "{{ bos_token }}{% set loop_messages = messages %}{% for message in loop_messages %}"
        "{% set content = '<|' + message['role'] + '|>\n\n' + message['content'] | trim + eos_token %}{{ content }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n\n' }}{% endif %}"
    ),
    "instructions": (
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] + '\n\n' %}"
        "{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}\n"
        "{{ bos_token }}\n{% for m in rest %}\n"
        "  {% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}"
        "{% endif %}\n  {% if m['role'] == 'user' %}[INST] {{ (system if loop.first else '') + m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}\n{% endfor %}"
    ),
    "namespaces_and_filters": (
        "{%- set ns = namespace(count=0) -%}{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
        "{{ {'tools': [], 'note': m.content} | tojson }}{% continue %}{% endif %}{% set ns.count = ns.count + 1 %}"
        "{{ ns.count }}|{{ m.content.split('</think>')[-1] | upper }}|{% generation %}{{ m.role | capitalize }}"
        "{% endgeneration %}{% endfor %}{{ 'A:' if add_generation_prompt }}"
    ),
}
CONVERSATIONS: dict[str, list[dict[str, str]]] = {
    "question": [{"role": "user", "content": "What is 3*12?"}],
    "system": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "  Zoë's café?  "}],
    "turns": [
        {"role": "user", "content": "Tom has 12 apples.\nHow many?"},
        {"role": "assistant", "content": "<think>12</think>12"},
        {"role": "user", "content": "{{ 7*7 }} <|im_end|> & <b> 🙂"},  # text that looks like a template or a token
    ],
}


@pytest.fixture(scope="module", params=TEMPLATES)
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_with_bos(tmp_path_factory.mktemp(request.param), chat_template=TEMPLATES[request.param])


def save_with_bos(directory: Path, **config: Any) -> Path:
    """A tokenizer that, like Llama's, puts its beginning token before whatever it encodes on its own."""
    save_byte_bpe(directory, bos_token="<|endoftext|>", **config)
    file = directory / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save(str(file))
    return directory


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_ids_are_those_of_apply_chat_template(directory: Path, conversation: str):
    messages = CONVERSATIONS[conversation]
    oracle = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    expected = oracle.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    found = load_tokenizer(directory).render_prompt(messages)
    assert found == list(expected)
    if "bos_token" in TEMPLATES[directory.name.rstrip("0123456789")]:
        assert found[0] == 0 and 0 not in found[1:]  # the template's own, and no second one
    else:
        assert 0 not in found


def test_a_question_is_a_conversation_of_one_user_message(directory: Path):
    tokenizer = load_tokenizer(directory)
    assert tokenizer.render_prompt("What is 3*12?") == tokenizer.render_prompt(CONVERSATIONS["question"])


def test_options_reach_the_template_as_with_transformers(tmp_path: Path):
    save_byte_bpe(tmp_path, chat_template=TEMPLATES["chatml"])
    oracle = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    question = CONVERSATIONS["question"]
    expected = oracle.apply_chat_template(
        question, add_generation_prompt=True, enable_thinking=False, return_dict=True
    )["input_ids"]
    found = load_tokenizer(tmp_path, template_options={"enable_thinking": False}).render_prompt(question)
    assert found == list(expected) != load_tokenizer(tmp_path).render_prompt(question)


ESCAPES = {
    "class walk": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "module through a function": "{{ strftime_now.__globals__['sys'].exit(3) }}",
    "changing the messages": "{{ messages.append(1) }}",
    "endless text": "{{ 'x' * 10 ** 30 }}",
}


@pytest.mark.parametrize("escape", ESCAPES)
def test_a_template_cannot_leave_its_sandbox(tmp_path: Path, escape: str):
    save_byte_bpe(tmp_path, chat_template=ESCAPES[escape])
    with pytest.raises(TokenizerError, match=r"chat template of .* refuses"):
        load_tokenizer(tmp_path).render_prompt("hi")


def test_characters_without_a_token_fall_back_to_bytes(tmp_path: Path):
    tokenizer = load_tokenizer(save_byte_fallback(tmp_path))
    oracle = AutoTokenizer.from_pretrained(str(tmp_path), local_files_only=True)
    text = "Tom 🙂 é"
    ids = tokenizer.encode(text)
    assert ids == oracle.encode(text, add_special_tokens=False)
    # 🙂 is F0 9F 99 82 and é C3 A9 in UTF-8; byte b has id 3 + b
    assert [i - 3 for i in ids if 3 <= i < 259] == [0xF0, 0x9F, 0x99, 0x82, 0xC3, 0xA9]
    assert tokenizer.decode(ids) == text == "".join(tokenizer.tokens(ids))


def save_byte_fallback(directory: Path) -> Path:
    """Llama 2's kind: pieces with a marked space, and one token per byte for what no piece covers."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    vocab |= {piece: 259 + number for number, piece in enumerate("▁Tom")}
    raw = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    raw.add_special_tokens(["<unk>", "<s>", "</s>"])
    raw.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_the_fixture_adds_its_beginning_token_outside_templates(tmp_path: Path):
    plain: Tokenizer = load_tokenizer(save_with_bos(tmp_path))
    assert plain.render_prompt("hi") == [0, *plain.encode("hi")]
