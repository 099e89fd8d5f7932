"""Chat templates with the structure of ten published families, over a tokenizer of bytes and their marks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as RawTokenizer


def save_byte_tokenizer(
    directory: Path,
    *,
    specials: Sequence[str] = ("<pad>", "<eos>"),
    extra: Sequence[str] = (),
    template: str | None = None,
    add_bos: bool = False,
    **settings: Any,
) -> Path:
    """One token per byte; ``specials`` are marked special, ``extra`` are added tokens that are not."""
    directory.mkdir(parents=True, exist_ok=True)
    vocab = {mark: i for i, mark in enumerate((*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in specials])
    raw.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in extra])
    if add_bos:
        bos = settings["bos_token"]
        raw.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, raw.token_to_id(bos))]
        )
    raw.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>", **settings}
    if template is not None:
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


@dataclass(frozen=True, kw_only=True)
class Family:
    """``end``: what ends an assistant's turn. ``tail``: what the template writes behind it, which is no response."""

    template: str
    specials: tuple[str, ...]
    eos: str
    end: str
    tail: str = ""
    bos: str | None = None
    extra: tuple[str, ...] = ()
    trims: bool = False

    def save(self, directory: Path) -> Path:
        """Write the tokenizer files."""
        more = {} if self.bos is None else {"bos_token": self.bos}
        return save_byte_tokenizer(
            directory,
            specials=self.specials,
            extra=self.extra,
            template=self.template,
            add_bos=self.bos is not None,
            eos_token=self.eos,
            pad_token=self.specials[0],
            **more,
        )


_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_QWEN3 = (
    "{%- for m in messages %}{%- if m.role != 'assistant' %}{{- '<|im_start|>' + m.role + '\n' + m.content "
    "+ '<|im_end|>\n' }}{%- else %}{%- set content = m.content %}{%- set thought = '' %}"
    "{%- if m.reasoning_content is string %}{%- set thought = m.reasoning_content %}"
    "{%- elif '</think>' in content %}"
    "{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.last %}{{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' "
    "+ content.lstrip('\n') }}{%- else %}{{- '<|im_start|>assistant\n' + content }}{%- endif %}"
    "{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{%- endif %}"
)
_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}"
    "{% elif m['role'] == 'assistant' %}{% set content = m['content'] %}{% if '</think>' in content %}"
    "{% set content = content.split('</think>')[-1] %}{% endif %}{{ '<|Assistant|>' + content + '<|end|>' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}"
)
_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

FAMILIES = {
    "llama3": Family(
        template=(
            "{% set ns = namespace(first=true) %}{% for m in messages %}{% set c = '<|start_header_id|>' + m['role'] + "
            "'<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
            "{% set c = bos_token + c %}{% endif %}{{ c }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
        ),
        specials=("<|pad|>", "<|begin|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        eos="<|end_of_text|>",
        end="<|eot_id|>",
        bos="<|begin|>",
        trims=True,
    ),
    "chatml": Family(template=_CHATML, specials=_IM, eos="<|im_end|>", end="<|im_end|>", tail="\n"),
    "chatml of a base model": Family(template=_CHATML, specials=_IM, eos="<|endoftext|>", end="<|im_end|>", tail="\n"),
    "mistral": Family(
        template=(
            "{{ bos_token }}{% for m in messages %}"
            "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
            "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
        ),
        specials=("<unk>", "<s>", "</s>", "[INST]", "[/INST]"),
        eos="</s>",
        end="</s>",
        bos="<s>",
    ),
    "gemma": Family(
        template=(
            "{{ bos_token }}{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
            "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
        ),
        specials=("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        eos="<eos>",
        end="<end_of_turn>",
        tail="\n",
        bos="<bos>",
        trims=True,
    ),
    "phi": Family(
        template=(
            "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
        ),
        specials=("<|endoftext|>", "<|assistant|>", "<|user|>", "<|end|>", "<|system|>"),
        eos="<|endoftext|>",
        end="<|end|>",
        tail="\n<|endoftext|>",
    ),
    "zephyr": Family(
        template=(
            "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}\n"
            "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
        ),
        specials=("<unk>", "<s>", "</s>"),
        eos="</s>",
        end="</s>",
        bos="<s>",
    ),
    "vicuna": Family(
        template=(
            "{{ bos_token + 'A chat.' }}{% for m in messages %}"
            "{% if m['role'] == 'user' %}{{ ' USER: ' + m['content'] }}"
            "{% else %}{{ ' ASSISTANT: ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
        ),
        specials=("<unk>", "<s>", "</s>"),
        eos="</s>",
        end="</s>",
        bos="<s>",
    ),
    "olmo": Family(
        template=(
            "{{ bos_token }}{% for m in messages %}"
            "{% if m['role'] == 'assistant' %}{{ '<|assistant|>\n' + m['content'] }}"
            "{% if not loop.last %}{{ eos_token + '\n' }}{% else %}{{ eos_token }}{% endif %}"
            "{% else %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '\n' }}{% endif %}"
            "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
        ),
        specials=("<|padding|>", "<|endoftext|>"),
        eos="<|endoftext|>",
        end="<|endoftext|>",
        bos="<|endoftext|>",
    ),
    "granite": Family(
        template=(
            "{% for m in messages %}{{ '<|start_of_role|>' + m['role'] + '<|end_of_role|>' + m['content'] "
            "+ '<|end_of_text|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"
        ),
        specials=("<|pad|>", "<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"),
        eos="<|end_of_text|>",
        end="<|end_of_text|>",
        tail="\n",
    ),
    "qwen3": Family(
        template=_QWEN3, specials=_IM, extra=("<think>", "</think>"), eos="<|im_end|>", end="<|im_end|>", tail="\n"
    ),
}
THINKING = {
    "qwen3": FAMILIES["qwen3"],
    "r1": Family(
        template=_R1,
        specials=("<|pad|>", "<|begin|>", "<|end|>", "<|User|>", "<|Assistant|>"),
        extra=("<think>", "</think>"),
        eos="<|end|>",
        end="<|end|>",
        bos="<|begin|>",
    ),
}
