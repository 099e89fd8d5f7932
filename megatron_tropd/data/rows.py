"""One row of a data file becomes one tokenized prompt. Whatever a row holds and nobody reads is noted, or refused."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np

from megatron_tropd.config.sections import ColumnsConfig
from megatron_tropd.data.cells import cell_text, is_missing
from megatron_tropd.data.chat import ChatTemplate, Frame, Message, Tools, first_tag
from megatron_tropd.data.files import BadRow, column_of
from megatron_tropd.data.notes import Notes
from megatron_tropd.data.responses import SPOKEN_FIELDS, Rendered, ResponseReader
from megatron_tropd.data.templates import RowTemplate, row_template
from megatron_tropd.data.tokenizer import Tokenizer
from megatron_tropd.errors import TokenizerError
from megatron_tropd.types import Int64Array, Prompt

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "environment", "observation")
RENDERED_ALREADY = "hold a whole rendered prompt: taken as it stands, without the chat template around it once more"
BEGUN_TWICE = "hold a text that begins with the beginning token, which is added anyway: cut there once"
ENDED_PROMPT = "hold a prompt or message that ends in an end or padding token: cut there"
SYSTEM_LEFT_OUT = "have a system message (their own, or data.system), which the chat template does not write"
SPELLED = "hold a conversation as JSON text: read as its messages"
TWO_PROMPTS = "have a prompt and messages: the prompt is read"
ODD_ROLE = "have a message whose role is none of " + ", ".join(ROLES)
ODD_FIELD = "have a message with the field {!r}, which nothing reads"
ODD_REASON = "say finish_reason {!r}, which is not known: taken for an end of its own"
TWO_RESPONSES = "end in an assistant message and have a response column: the column is read"
OTHER_END = "hold a response that ended in a token which does not end the student's: its own stands there"
EDITED = "hold a response that was changed since `tropd generate` wrote it: tokenized anew"
OTHER_TOKENIZER = "hold a response that another tokenizer wrote: tokenized anew from its text"
OTHER_PROMPT = (
    "hold a response that `tropd generate` wrote to another prompt than this run's (template, system message, "
    "template_options or model differ); `tropd generate CONFIG.yaml OUT` takes the prompts of training"
)
NO_TEACHER_PROMPT = "have no {!r}: the teacher reads the student's prompt"
SAME_PROMPT = "give the teacher the very prompt of the student"

# ``finish_reason`` (``stop_reason``) of responses that were cut off, and of those that were not, in lower case
_CUT = ("length", "max_tokens", "max_output_tokens", "max_new_tokens", "model_length", "context_length", "abort")
_ENDED = ("stop", "eos", "eos_token", "end_turn", "stop_sequence", "stop_token", "tool_calls", "function_call", "")
_REASONS = ("finish_reason", "stop_reason")
# fields of a message that chat templates write, or that say nothing
_MESSAGE_FIELDS = {"role", "content", "tool_call_id", "id", *SPOKEN_FIELDS}

# columns of other programs' rows that would change what a row means; each is noted where nothing reads it
_FOREIGN = {
    **dict.fromkeys(("system", "system_prompt"), "data.system or data.template may use it"),
    **dict.fromkeys(("functions", "documents", "context"), "data.template may use it"),
    **dict.fromkeys(("completion", "completions", "chosen", "output"), "data.columns.response may name it"),
    **dict.fromkeys(("input", "instruction", "question", "query"), "data.columns.prompt or data.template may use it"),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), "put it into the response"),
    "truncated": "give `finished: false` where a response was cut off",
    "teacher_prompt": "data.columns.teacher_prompt may name it",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """The files that prompts come from, and the rules by which a row becomes one."""

    paths: tuple[Path, ...]  # files, globs and directories
    name: str = ""
    teacher: str = ""  # who scores it; empty where there is only one teacher
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    template: str | None = (
        None  # Jinja over the row's columns, ``{{ prompt }}`` the prompt column; None: the prompt alone
    )
    answer_template: str | None = None  # the same for the reference answer
    system: str | None = None  # system message of every conversation that has none
    teacher_template: str | None = None  # Jinja around the student's prompt that makes the teacher's own
    teacher_system: str | None = None  # system message of the teacher's own, in place of any other


class RowParser:
    """Turn rows of one source into prompts. ``prompt`` raises BadRow."""

    def __init__(self, source: Source, tokenizer: Tokenizer, *, require_response: bool, notes: Notes) -> None:
        self._source, self._tokenizer, self._required, self._notes = source, tokenizer, require_response, notes
        self._template, self._answer_template = _compiled(source.template), _compiled(source.answer_template)
        self._teacher_template = _compiled(source.teacher_template)
        self._responses = ResponseReader(tokenizer, notes)
        self._repeats = _PromptRepeats(tokenizer, source.system, notes)
        self._teacher_system = source.system if source.teacher_system is None else source.teacher_system
        templates = (self._template, self._answer_template, self._teacher_template)
        names, used = source.columns, [t.columns for t in templates if t]
        self._template_columns = frozenset().union(*used) - {"prompt", "answer"}
        self._used_by_templates = frozenset().union(*used)
        self._seen: set[str] = set()
        self._unread: dict[str, str] = {}  # what is said of a column, by its name
        self._system_is_written = False
        own = {names.prompt, names.messages, names.response, names.answer, names.tools}
        own |= set() if names.teacher_prompt is None else {names.teacher_prompt}
        self._used = frozenset(own | {names.finished, names.generated, *_REASONS}.union(*used))
        self.columns = self._used | frozenset(_FOREIGN)
        # with a template of its own a source may have neither
        self.one_of = () if self._template else (names.prompt, names.messages)

    def prompt(self, index: int, row: dict[str, Any]) -> Prompt:
        """Check and tokenize one row. Raises BadRow with the reason why it cannot be used."""
        self._look_for_unread(row)
        conversation, spoken = self._conversation(row)
        if isinstance(conversation, str):
            shown = conversation
        else:
            shown = "\n".join(m.get("content") or "" for m in conversation)
        tools = _tools(column_of(row, self._source.columns.tools))
        prompt = self._rendered(conversation, tools, self._source.system)
        response, finished = self._response(row, prompt, spoken)
        return Prompt(
            index=index,
            token_ids=prompt.ids,
            text=shown,
            answer=self._answer(row),
            response_ids=response,
            response_finished=finished,
            source=self._source.name,
            teacher=self._source.teacher,
            teacher_ids=self._teacher_ids(row, conversation, tools, prompt),
        )

    def _teacher_ids(
        self, row: dict[str, Any], conversation: str | list[Message], tools: Tools | None, prompt: Rendered
    ) -> Int64Array | None:
        """Return the teacher's own prompt; None where it reads the student's.

        A column of its own takes the place of the student's prompt, the template goes around either, and the system
        message in place of any other. The student's responses are never part of it.
        """
        source, own = self._source, None
        if source.columns.teacher_prompt is not None:
            own = column_of(row, source.columns.teacher_prompt)
            if is_missing(own):
                self._notes.add(NO_TEACHER_PROMPT.format(source.columns.teacher_prompt))
                own = None
        if own is None and self._teacher_template is None and source.teacher_system is None:
            return None
        read = conversation if own is None else self._own_conversation(own)
        if self._teacher_template is not None:
            read = self._filled(self._teacher_template, read, row)
        read = self._repeats.cut(read)
        if isinstance(read, str) and not read.strip():
            raise BadRow("has an empty prompt for the teacher.")
        if source.teacher_system is not None and isinstance(read, list) and read[0]["role"] == "system":
            read = read[1:]
        ids = self._rendered(read, tools, self._teacher_system).ids
        if np.array_equal(ids, prompt.ids):
            self._notes.add(SAME_PROMPT)
            return None
        return ids

    def _own_conversation(self, given: Any) -> str | list[Message]:
        spelled = _spelled(given) if isinstance(given, str) else None
        given = given if spelled is None else spelled
        if isinstance(given, str):
            return given
        if isinstance(given, list) and given and all(_is_message(message) for message in given):
            if given[-1]["role"] == "assistant":
                raise BadRow("has a prompt for the teacher that ends in an assistant message.")
            self._look_at_messages(given)
            return list(given)
        raise BadRow(
            f"column {self._source.columns.teacher_prompt!r} holds {str(given)[:80]!r}, expected text or a list of "
            "messages with text 'role' and 'content'."
        )

    def unseen_columns(self) -> list[str]:
        """List the columns that a template reads and that no row so far had."""
        return sorted(self._template_columns - self._seen)

    def _look_for_unread(self, row: Mapping[str, Any]) -> None:
        for name in row:
            if name in self._used:
                self._seen.add(name)
                continue
            if name not in self._unread:
                self._unread[name] = self._why_unread(name)
            if sentence := self._unread[name]:
                self._notes.add(sentence)

    def _why_unread(self, name: str) -> str:
        """Name what is to be said of a column that nothing reads; empty where that is as it should be."""
        said, singular = f"have a column {name!r}, which nothing reads", name.casefold().rstrip("s")
        if name in _FOREIGN:
            return f"{said}; {_FOREIGN[name]}"
        ours = sorted(used for used in self._used if used.casefold().rstrip("s") == singular)
        return f"{said}; {ours[0]!r} is the name that is read" if ours else ""

    # ----------------------------------------------------------------------- the prompt

    def _conversation(self, row: dict[str, Any]) -> tuple[str | list[Message], Message | None]:
        """Return what the model is to continue, and how the row itself continues it."""
        given, spoken = self._given(row), None
        if isinstance(given, list) and given[-1]["role"] == "assistant":
            spoken = given.pop()
            if not given:
                raise BadRow("the conversation has only an assistant message: there is nothing to answer.")
        if self._template is not None:
            given = self._filled(self._template, given, row)
        assert given is not None  # without a template a row has a prompt
        given = self._repeats.cut(given)
        if isinstance(given, str) and not given.strip():
            raise BadRow(f"column {self._source.columns.prompt!r} is empty.")
        return given, spoken

    def _given(self, row: dict[str, Any]) -> str | list[Message] | None:
        """Return the prompt column as it stands; None where a template does without."""
        names = self._source.columns
        prompt, messages = column_of(row, names.prompt), column_of(row, names.messages)
        if prompt is None:
            prompt = messages
        elif messages is not None and names.messages not in self._used_by_templates:
            self._notes.add(TWO_PROMPTS)
        if isinstance(prompt, str) and (spelled := _spelled(prompt)) is not None:
            self._notes.add(SPELLED)
            prompt = spelled
        if prompt is None and self._template is None:
            raise BadRow(
                f"has neither {names.prompt!r} nor {names.messages!r}, only {sorted(row)}. If the prompt is one of "
                "these, name it in data.columns.prompt."
            )
        if prompt is None or isinstance(prompt, str):
            return prompt
        if isinstance(prompt, list) and prompt and all(_is_message(message) for message in prompt):
            self._look_at_messages(prompt)
            return list(prompt)
        if self._template is not None:
            return str(prompt)
        raise BadRow(
            f"prompt holds {str(prompt)[:80]!r}, expected text or a list of messages with text 'role' and 'content'."
        )

    def _look_at_messages(self, messages: Sequence[Message]) -> None:
        """Note roles that templates do not know and fields that they do not write."""
        if any(message["role"] not in ROLES for message in messages):
            self._notes.add(ODD_ROLE)
        written = "" if self._tokenizer.chat is None else self._tokenizer.chat.source
        odd = {name for message in messages for name, value in message.items() if value not in (None, "", [], {})}
        for name in sorted(odd - _MESSAGE_FIELDS):
            if name not in written:
                self._notes.add(ODD_FIELD.format(name))

    def _filled(
        self, template: RowTemplate, given: str | list[Message] | None, row: dict[str, Any]
    ) -> str | list[Message]:
        """Put the template around a text, or around the last message of a conversation."""
        if not isinstance(given, list):
            return template.render(row if given is None else row | {"prompt": given})
        *before, last = given
        return [*before, {**last, "content": template.render(row | {"prompt": last["content"]})}]

    def _rendered(self, conversation: str | list[Message], tools: Tools | None, system: str | None) -> Rendered:
        chat = self._tokenizer.chat
        if isinstance(conversation, str) and self._repeats.is_rendered(conversation):
            if tools is not None:
                raise BadRow("is a whole rendered prompt already, into which its tools cannot be written.")
            return Rendered(ids=_encoded(self._tokenizer.encode, conversation), text=conversation)
        if isinstance(conversation, str) and chat is None and system is None:
            if tools is not None:
                raise BadRow("has tools, which only a chat template can write, and there is none.")
            ids = _encoded(self._tokenizer.render_prompt, conversation)
            if not ids.size:
                raise BadRow(f"column {self._source.columns.prompt!r} is empty: it has no token but an end token.")
            return Rendered(ids=ids, text=conversation)
        messages: list[Message] = (
            [{"role": "user", "content": conversation}] if isinstance(conversation, str) else conversation
        )
        if system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        if chat is None:  # the tokenizer says that it cannot
            return Rendered(ids=_encoded(self._tokenizer.render_prompt, messages), text="")
        try:
            text = chat.render(messages, tools=tools)
            self._look_for_system(chat, messages, tools, text)
            _refuse_unwritten(chat.render, messages, tools, text)
        except TokenizerError as error:
            raise BadRow(f"{error}") from error
        return Rendered(ids=_encoded(self._tokenizer.encode, text), text=text, messages=tuple(messages), tools=tools)

    def _look_for_system(self, chat: ChatTemplate, messages: Sequence[Message], tools: Tools | None, text: str) -> None:
        """Note a system message that the template leaves out; one that it writes shows that it writes them."""
        if self._system_is_written or messages[0]["role"] != "system" or len(messages) < 2:
            return
        self._system_is_written = chat.render(messages[1:], tools=tools) != text
        if not self._system_is_written:
            self._notes.add(SYSTEM_LEFT_OUT)

    # ----------------------------------------------------------------------- answer and response

    def _answer(self, row: dict[str, Any]) -> str | None:
        column = self._source.columns.answer
        answer = column_of(row, column)
        if self._answer_template is not None:
            text = self._answer_template.render(row if answer is None else row | {"answer": answer})
            return None if is_missing(answer) and not text else text
        if isinstance(answer, bool) or not isinstance(answer, str | int | float | Decimal | None):
            raise BadRow(f"column {column!r} holds {type(answer).__name__}, expected text or a number.")
        return None if is_missing(answer) else cell_text(answer)

    def _response(
        self, row: dict[str, Any], prompt: Rendered, spoken: Message | None
    ) -> tuple[Int64Array | None, bool]:
        """Return the response's ids, and whether it ended by itself."""
        column = self._source.columns.response
        response = column_of(row, column)
        if response is None and spoken is None:
            if self._required:
                raise BadRow(f"column {column!r} holds 'None', expected text that is not empty.")
            return None, True
        finished, kept = self._finished(row), column_of(row, self._source.columns.generated)
        if response is None:
            assert spoken is not None
            message = spoken
        elif isinstance(response, str):
            message = {"role": "assistant", "content": response}
            if spoken is not None:
                self._notes.add(TWO_RESPONSES)
            ids = None if kept is None else self._generated(kept, response, prompt, finished=finished)
            if ids is not None:
                return ids, finished
        else:
            message = {"content": response}
        content = message.get("content")
        spoken_beside = any(message.get(name) for name in SPOKEN_FIELDS)
        if not (isinstance(content, str) and content) and not (spoken_beside and content in (None, "")):
            raise BadRow(f"column {column!r} holds {str(content)[:80]!r}, expected text that is not empty.")
        ids = _encoded(lambda _: self._responses.ids(prompt, message, finished=finished), "")
        if not ids.size:
            raise BadRow(f"column {column!r} holds {str(content)[:80]!r}: nothing of it is left to learn from.")
        return ids, finished

    def _finished(self, row: dict[str, Any]) -> bool:
        """Say whether the row's response ended by itself; also from ``finish_reason``, as servers call it."""
        name = self._source.columns.finished
        finished = column_of(row, name)
        reason = next((str(row[name]) for name in _REASONS if row.get(name) is not None), "")
        if not isinstance(finished, bool | None):
            raise BadRow(f"column {name!r} holds {str(finished)[:80]!r}, expected true, or false for a cut response.")
        if finished is not None:
            return finished
        if reason.lower() not in (*_CUT, *_ENDED):
            self._notes.add(ODD_REASON.format(reason))
        return reason.lower() not in _CUT

    def _generated(self, kept: Any, response: str, prompt: Rendered, *, finished: bool) -> Int64Array | None:
        """Return the ids that ``tropd generate`` kept, where they still are what the row says."""
        ids = kept.get("ids") if isinstance(kept, Mapping) else None
        if not isinstance(ids, list) or not ids or not all(isinstance(i, int) and i >= 0 for i in ids):
            raise BadRow(
                f"column {self._source.columns.generated!r} holds {str(kept)[:80]!r}, expected what `tropd generate` "
                "writes there. Take the column out to have the text read."
            )
        if kept.get("tokenizer") != tokenizer_digest(self._tokenizer):
            self._notes.add(OTHER_TOKENIZER)
            return None
        if kept.get("prompt") != ids_digest(prompt.ids):
            self._notes.add(OTHER_PROMPT)
        body = ids[:-1] if finished else ids
        if self._tokenizer.response_text(body) != response:
            self._notes.add(EDITED)
            return None
        if finished and ids[-1] not in self._tokenizer.eos_ids:
            self._notes.add(OTHER_END)
            ids = [*body, self._tokenizer.turn_end]
        return np.array(ids, dtype=np.int64)


class _PromptRepeats:
    """The parts of what is written around a prompt that it already holds."""

    def __init__(self, tokenizer: Tokenizer, system: str | None, notes: Notes) -> None:
        self._system, self._notes = system, notes
        self._frame = Frame() if tokenizer.chat is None else tokenizer.chat.frame
        self._begin = "" if tokenizer.bos_id is None else tokenizer.token_text(tokenizer.bos_id)
        # a turn's own mark is the template's to write: <|im_start|>, [INST]
        self._mark = first_tag(self._frame.head.strip().removeprefix(self._begin))
        if self._mark is not None and self._mark not in tokenizer.vocab:
            self._mark = None
        self._ends = {tokenizer.token_text(i) for i in (*tokenizer.eos_ids, tokenizer.pad_id)} - {""}

    def is_rendered(self, text: str) -> bool:
        """Say whether a text is a prompt with the template around it already."""
        head, closing = self._frame.head.strip().removeprefix(self._begin).strip(), self._frame.closing.strip()
        body = text.strip().removeprefix(self._begin)
        begins = (self._mark is not None and body.startswith(self._mark)) or bool(head and head in body)
        return bool(closing) and begins and body.endswith(closing)

    def cut(self, given: str | list[Message]) -> str | list[Message]:
        """Return the conversation without them. Raises BadRow where they cannot be distinguished."""
        if not isinstance(given, str):
            return [m if m.get("content") is None else {**m, "content": self._cut(m["content"])} for m in given]
        if not self.is_rendered(given):
            return self._cut(given)
        if self._system is not None:
            raise BadRow("is a whole rendered prompt already, into which data.system cannot be written.")
        self._notes.add(RENDERED_ALREADY)
        body = given.lstrip().removeprefix(self._begin)
        closing = self._frame.closing
        trailing = closing[len(closing.rstrip()) :]
        begin = self._begin if self._begin and self._frame.head.startswith(self._begin) else ""
        return begin + body.rstrip() + trailing

    def _cut(self, text: str) -> str:
        if self._begin and text.startswith(self._begin):
            self._notes.add(BEGUN_TWICE)
            text = text.removeprefix(self._begin)
        bare = text
        while ending := next((end for end in self._ends if bare.rstrip().endswith(end)), None):
            bare = bare.rstrip().removesuffix(ending)
        if bare != text:
            self._notes.add(ENDED_PROMPT)
        if self._mark is not None and bare.startswith(self._mark):
            raise BadRow(
                f"begins with {self._mark!r}, which the chat template writes itself. Give the text alone, a whole "
                "rendered prompt with its generation prompt, or set data.chat_template=false."
            )
        return bare


# --------------------------------------------------------------------------- small things


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Return a short name of a tokenizer's vocabulary and merges."""
    return tokenizer.fingerprint()[:16]


def ids_digest(ids: Sequence[int] | Int64Array) -> str:
    """Return a short name of a sequence of ids."""
    return hashlib.sha256(np.asarray(ids, dtype="<i8").tobytes()).hexdigest()[:16]


def _compiled(template: str | None) -> RowTemplate | None:
    return None if template is None else row_template(template)


def _is_message(message: Any) -> bool:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    return isinstance(content, str) or (content is None and any(message.get(name) for name in SPOKEN_FIELDS))


def _spelled(text: str) -> list[Any] | None:
    """Return the messages that a text spells as JSON; None where it is anything else."""
    if not text.lstrip().startswith("[{"):
        return None
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return found if isinstance(found, list) and found and all(_is_message(message) for message in found) else None


def _tools(given: Any) -> Tools | None:
    if isinstance(given, str):
        try:
            given = json.loads(given) if given.strip() else None
        except ValueError:
            raise BadRow(f"tools holds {given[:80]!r}, which is not JSON. Give a list of tools.") from None
    if not given:
        return None
    if not isinstance(given, list) or not all(isinstance(tool, Mapping) for tool in given):
        raise BadRow(f"tools holds {str(given)[:80]!r}, expected a list of tools, each an object.")
    return given


def _refuse_unwritten(render: Callable[..., str], messages: Sequence[Message], tools: Tools | None, text: str) -> None:
    """Raise BadRow when the template does not write the tools, or the calls of an earlier message."""
    if tools is not None and render(messages) == text:
        raise BadRow("has tools, which the chat template does not write. Take them out, or use a template that does.")
    called = [m for m in messages if m.get("tool_calls")]
    if called and render([_without_calls(m) for m in messages], tools=tools) == text:
        raise BadRow("has an earlier message with tool_calls, which the chat template does not write.")


def _without_calls(message: Message) -> Message:
    return {
        "content": "",
        **{key: value for key, value in message.items() if key != "tool_calls" and value is not None},
    }


def _encoded(encode: Callable[[Any], Any], prompt: str | list[Message]) -> Int64Array:
    try:
        return np.asarray(encode(prompt), dtype=np.int64)
    except TokenizerError as error:
        raise BadRow(f"{error}") from error
