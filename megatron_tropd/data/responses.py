"""Token ids of a response that a row of data holds: what the model would have sampled after the rendered prompt.

A response is what the chat template itself writes behind the prompt, up to the token that ends the turn, so that the
ids of prompt and response together are those of the whole conversation. Where a template cannot write a response as it
stands (it drops thoughts, or opens them in the generation prompt alone), the text continues the prompt directly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_tropd.data.chat import Frame, Message, Tools, first_tag, tag_places
from megatron_tropd.data.files import BadRow
from megatron_tropd.data.notes import Notes
from megatron_tropd.data.tokenizer import Tokenizer
from megatron_tropd.errors import TokenizerError
from megatron_tropd.types import Int64Array

# parts of an assistant's message that are part of what it says
SPOKEN_FIELDS = ("tool_calls", "reasoning_content", "reasoning", "thinking", "function_call")

REPEATED = "hold a response that began with what the prompt ends in: cut there once"
CUT_AT_END = "hold a response with an end or padding token inside: cut there, and what followed is left out"
UNLIKE_TEMPLATE = (
    "hold a response that the chat template would write otherwise behind its own generation prompt: read as it stands"
)
TEXT_LEFT_OUT = "end in a message with text beside tool calls, which the chat template leaves out"
ENDED_BY_US = "hold a response behind which the chat template writes no end token: the tokenizer's own is appended"
UNFINISHED = "hold a response that was cut off: no end token is appended, and nobody learns to stop there"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A prompt as the model sees it."""

    ids: Int64Array  # [L]
    text: str  # what ``ids`` are the ids of, a beginning token that the tokenizer adds aside
    messages: tuple[Message, ...] = ()  # empty: plain text, or a prompt that was rendered already
    tools: Tools | None = None


class ResponseReader:
    """Turn responses into ids. Its methods raise BadRow and TokenizerError."""

    def __init__(self, tokenizer: Tokenizer, notes: Notes) -> None:
        self._tokenizer, self._notes = tokenizer, notes
        ends = dict.fromkeys((*tokenizer.eos_ids, tokenizer.pad_id))
        self._ends = {text: i for i in ends if (text := tokenizer.token_text(i))}
        self._begin = "" if tokenizer.bos_id is None else tokenizer.token_text(tokenizer.bos_id)

    def ids(self, prompt: Rendered, message: Message, *, finished: bool = True) -> Int64Array:
        """Return the ``[L]`` ids of an assistant's message behind a prompt, with its end token where it is finished."""
        spoken = [name for name in SPOKEN_FIELDS if message.get(name)]
        given, end = self._up_to_end(message.get("content") or "")
        text = self._without_repeat(prompt, given)
        if not finished:
            if spoken:
                raise BadRow(f"a response that was cut off (finished is false) cannot hold {', '.join(spoken)}.")
            self._notes.add(UNFINISHED)
            return self._behind(prompt, text)
        written = self._written(prompt, message, given, text, spoken)
        if written is not None:
            return self._closed(prompt, written, text)
        own = self._tokenizer.turn_end if prompt.messages or end is None else end
        return np.append(self._behind(prompt, text), np.int64(own))

    # ----------------------------------------------------------------------- the text

    def _without_repeat(self, prompt: Rendered, text: str) -> str:
        """Return the response without what it repeats of the prompt's end: a mark, a generation prompt, all of it."""
        bare = text.removeprefix(self._begin)
        frame = Frame() if self._tokenizer.chat is None else self._tokenizer.chat.frame
        closing = len(prompt.text) - len(frame.closing)
        if (frame.head + frame.closing).strip() and prompt.text.endswith(frame.closing):
            places = [0, len(self._begin), closing, *(closing + place for place in tag_places(frame.closing))]
            parts = [part for place in places for part in (prompt.text[place:], prompt.text[place:].strip())]
            bare = next((bare[len(part) :] for part in parts if part.strip() and bare.startswith(part)), bare)
        if bare != text:
            self._notes.add(REPEATED)
        return bare

    def _up_to_end(self, text: str) -> tuple[str, int | None]:
        """Return the text before its first end token, and that token."""
        found = [(place, -len(end), end) for end in self._ends if (place := text.find(end)) >= 0]
        if not found:
            return text, None
        place, _, end = min(found)
        i = self._ends[end]
        if text[place:].strip() != end or i not in self._tokenizer.eos_ids:
            self._notes.add(CUT_AT_END)
        return text[:place], i if i in self._tokenizer.eos_ids else None

    def _written(self, prompt: Rendered, message: Message, given: str, text: str, spoken: Sequence[str]) -> str | None:
        """Return what the template writes behind the prompt; None where the text is to be taken as it stands.

        ``given`` is the text before ``_without_repeat``: templates that open thoughts in the generation prompt alone
        write such a response from the whole of it.
        """
        chat = self._tokenizer.chat
        if chat is None or not prompt.messages:
            if spoken:
                raise BadRow(f"the last message holds {', '.join(spoken)}, which only a chat template can write.")
            return None
        tail = self._tail(prompt, _with_text(message, text), spoken)
        if tail is not None and _says(tail, text) and not _says_twice(tail, text):
            return tail
        if spoken:
            if tail is None:
                raise BadRow(
                    f"the chat template writes the last message, with its {', '.join(spoken)}, otherwise than behind "
                    f"its generation prompt {prompt.text[-40:]!r}: there is no response to read. Check "
                    "data.template_options."
                )
            self._notes.add(TEXT_LEFT_OUT)
            return tail
        if given != text:
            tail, repeated = self._tail(prompt, _with_text(message, given), ()), given[: len(given) - len(text)]
            if tail is not None and _says(tail, text) and not tail.lstrip().startswith(repeated.strip()):
                return tail
        self._notes.add(UNLIKE_TEMPLATE)
        return None

    def _tail(self, prompt: Rendered, message: Message, spoken: Sequence[str]) -> str | None:
        """Return what the template adds to the prompt for a message; None where it changes what the prompt ends in."""
        chat = self._tokenizer.chat
        assert chat is not None
        try:
            whole = chat.render([*prompt.messages, message], tools=prompt.tools, generate=False)
        except TokenizerError:
            if spoken:
                raise
            return None
        for name in spoken:
            without = [*prompt.messages, {k: v for k, v in message.items() if k != name}]
            if _renders(chat, without, prompt.tools) == whole:
                raise BadRow(
                    f"the last message holds {name!r}, which the chat template does not write. Take it out of the row, "
                    "put it into the message's content, or use a template that writes it."
                )
        return whole.removeprefix(prompt.text) if whole.startswith(prompt.text) else None

    # ----------------------------------------------------------------------- the ids

    def _behind(self, prompt: Rendered, text: str) -> Int64Array:
        """Return the ids of a text behind the prompt: cut out of the whole where that leaves the prompt's ids alone."""
        if not text:
            return np.empty(0, np.int64)
        before = self._tokenizer.encode(prompt.text)
        whole = self._tokenizer.encode(prompt.text + text)
        ids = whole[len(before) :] if whole[: len(before)] == before else self._tokenizer.encode(text)
        return np.asarray(ids, dtype=np.int64)

    def _closed(self, prompt: Rendered, written: str, text: str) -> Int64Array:
        """Return the ids of what the template wrote, up to and with the first end token."""
        ids = self._behind(prompt, written)
        ends = np.flatnonzero(np.isin(ids, self._tokenizer.eos_ids))
        if ends.size:
            return ids[: ends[0] + 1]
        self._notes.add(ENDED_BY_US)
        said = text if text in written else text.strip()
        kept = written[: written.rfind(said) + len(said)] if said and said in written else written.rstrip()
        return np.append(self._behind(prompt, kept), np.int64(self._tokenizer.turn_end))


def _with_text(message: Message, text: str) -> Message:
    return message if message.get("content") is None else {**message, "content": text}


def _renders(chat: Any, messages: Sequence[Mapping[str, Any]], tools: Tools | None) -> str | None:
    try:
        return str(chat.render(messages, tools=tools, generate=False))
    except TokenizerError:
        return None


def _says(tail: str, text: str) -> bool:
    """Say whether all of a text is in what a template wrote, white space aside."""
    return "".join(text.split()) in "".join(tail.split())


def _says_twice(tail: str, text: str) -> bool:
    """Say whether a template writes, before a text, the mark that the text itself begins with."""
    place, mark = tail.find(text.strip()), first_tag(text)
    return place > 0 and mark is not None and first_tag(tail[:place]) == mark
