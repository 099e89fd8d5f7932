"""Chat templates as ``transformers`` renders them, and the marks that they write around a text."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_tropd.data.template_cost import is_bounded
from megatron_tropd.data.template_renderer import RENDERER, ChatRequest
from megatron_tropd.errors import TokenizerError

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}, and whatever else the template reads of a message
Tools = Sequence[Mapping[str, Any]]

_PROBE = "qprobeq"  # survives trimming, and any letter case
_TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")  # <think>, <|im_start|>, [INST]


@dataclass(frozen=True, slots=True)
class Frame:
    """The text that a template writes around a single user message: ``head``, the message, ``closing``.

    ``closing`` ends in the generation prompt. Both are empty where the template refuses such a conversation.
    """

    head: str = ""
    closing: str = ""


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """The chat template of a Hugging Face tokenizer, with the variables that it is given."""

    path: Path
    options: Mapping[str, Any]
    _tokenizer: Any = field(repr=False)

    def render(self, messages: Sequence[Message], *, tools: Tools | None = None, generate: bool = True) -> str:
        """Write a conversation as text, with the generation prompt where ``generate`` is set.

        A message whose content is null is given to the template as such, and with an empty text where it refuses that
        or would write "None".

        Raises:
            TokenizerError: the template refuses the conversation.
            ModelFileError: it takes more time or memory than any template does.
        """
        emptied = [{**m, "content": ""} if m.get("content") is None else m for m in messages]
        if emptied == list(messages):
            return self._render(emptied, tools, generate)
        plain = self._render(emptied, tools, generate)
        try:
            text = self._render([{"content": None, **m} for m in messages], tools, generate)
        except TokenizerError:
            return plain
        return plain if text.count("None") > plain.count("None") else text

    def _render(self, messages: Sequence[Message], tools: Tools | None, generate: bool) -> str:
        given = {**self.options, **({} if tools is None else {"tools": [dict(tool) for tool in tools]})}
        if not self._in_place:
            return self._render_apart(messages, given, generate)
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    [dict(message) for message in messages], add_generation_prompt=generate, tokenize=False, **given
                )
            )
        except Exception as error:  # templates are programs: they raise whatever their author chose
            raise TokenizerError(f"the chat template of {self.path} refuses {str(messages)[:300]}: {error}") from error

    def _render_apart(self, messages: Sequence[Message], given: Mapping[str, Any], generate: bool) -> str:
        """Render within limits, in another process."""
        request = ChatRequest(
            path=self.path,
            chat_template=self._tokenizer.chat_template,
            special_tokens_map=self._tokenizer.special_tokens_map,
            messages=messages,
            options=given,
            generate=generate,
        )
        return RENDERER.render(request)

    @cached_property
    def _in_place(self) -> bool:
        """Say whether every template is bounded, or is not Jinja's: few tokenizer classes write chats by themselves."""
        from transformers import PreTrainedTokenizerBase

        if type(self._tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template:
            return True
        given = self._tokenizer.chat_template
        return all(is_bounded(str(text)) for text in (given.values() if isinstance(given, Mapping) else [given]))

    @cached_property
    def frame(self) -> Frame:
        """Return what stands around a user message."""
        try:
            text = self.render([{"role": "user", "content": _PROBE}])
        except TokenizerError:
            return Frame()
        before, found, after = _around(text)
        return Frame(before, after) if found else Frame()

    @cached_property
    def turn_tail(self) -> str:
        """Return what the template writes behind a last message of an assistant; empty where it refuses one."""
        turns = [{"role": "user", "content": _PROBE.upper()}, {"role": "assistant", "content": _PROBE}]
        try:
            return _around(self.render(turns, generate=False))[2]
        except TokenizerError:
            return ""

    def fingerprint(self) -> str:
        """Hash the template and its variables (SHA-256, hex)."""
        text = json.dumps([self._tokenizer.chat_template, dict(self.options)], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def source(self) -> str:
        """Return the template itself; of a tokenizer with several, all of them."""
        given = self._tokenizer.chat_template
        return "\n".join(map(str, given.values() if isinstance(given, Mapping) else [given]))

    @property
    def unread_options(self) -> tuple[str, ...]:
        """List the options that no line of the template mentions."""
        text = self.source
        # read by transformers itself, not by the template
        own = {"documents", "continue_final_message", "chat_template"}
        return tuple(
            name for name in self.options if name not in own and not re.search(rf"\b{re.escape(name)}\b", text)
        )


def _around(text: str) -> tuple[str, bool, str]:
    """Return the text before the last probe, whether there is one, and the text behind it."""
    at = text.lower().rfind(_PROBE)
    return (text[:at], True, text[at + len(_PROBE) :]) if at >= 0 else (text, False, "")


def first_tag(text: str) -> str | None:
    """Return the mark (``<think>``, ``[INST]``) that a text begins with, white space aside."""
    found = _TAG.match(text.lstrip())
    return found.group() if found else None


def tag_places(text: str) -> list[int]:
    """List the places where marks begin in a text."""
    return [found.start() for found in _TAG.finditer(text)]
