"""Render chat templates that may loop or grow for ever: in a process of their own, within limits of time and memory."""

from __future__ import annotations

import atexit
import hashlib
import json
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tropd.data.line_process import LineProcess
from megatron_tropd.errors import ModelFileError, TokenizerError

SECONDS = 10.0  # for one conversation; a long one takes milliseconds
_START_S = 120.0  # importing the library takes seconds, on a busy machine many
_LONGEST = 1 << 24  # characters of a text, or ten times those of the conversation


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A conversation to be written by the template of a model directory."""

    path: Path
    chat_template: str | Mapping[str, str]
    special_tokens_map: Mapping[str, Any]
    messages: Sequence[Mapping[str, Any]]
    options: Mapping[str, Any]  # variables of the template, and ``tools``
    generate: bool

    @property
    def definition(self) -> str:
        """Return what is sent once per template, as JSON."""
        return json.dumps(
            {"chat_template": self.chat_template, "special_tokens_map": dict(self.special_tokens_map)}, default=str
        )


class TemplateRenderer:
    """Hold the process, started when first needed and replaced when it had to be ended. One per process is enough."""

    def __init__(self, *, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._process = LineProcess("megatron_tropd.data.template_worker", environment={"HF_HUB_OFFLINE": "1"})
        self._known: set[str] = set()

    def render(self, request: ChatRequest) -> str:
        """Write a conversation.

        Raises:
            TokenizerError: the template refuses the conversation.
            ModelFileError: it took too long or too much.
        """
        with self._lock:
            began = time.monotonic()
            reply = self._ask(request)
            if reply is None and time.monotonic() - began < self._seconds:
                reply = self._ask(request)  # it did not take long: the process had died of something else
        if reply is not None and "text" in reply:
            return str(reply["text"])
        if reply is not None and "error" in reply:
            raise TokenizerError(
                f"the chat template of {request.path} refuses {str(request.messages)[:300]}: {reply['error']}"
            )
        took = f"more than {self._seconds:g} s" if reply is None else reply["exceeded"]
        raise ModelFileError(
            f"the chat template of {request.path} took {took} to write {str(request.messages)[:300]}: it loops, or "
            "grows, without end. Do not use this model directory, or set data.chat_template=false."
        )

    def _ask(self, request: ChatRequest) -> dict[str, Any] | None:
        """Return the reply; None when there is none in time, and no process either then."""
        if self._process.start():
            self._known = set()
            if self._process.exchange(b"", _START_S) is None:
                raise TokenizerError(
                    "the process that renders chat templates did not start. Try again, or see ulimit -a."
                )
        definition = request.definition
        name = hashlib.sha256(definition.encode()).hexdigest()
        task = {
            "template": name,
            "messages": list(request.messages),
            "options": dict(request.options),
            "generate": request.generate,
            "seconds": self._seconds,
            "longest": max(_LONGEST, 10 * sum(len(str(message)) for message in request.messages)),
            **({} if name in self._known else {"define": json.loads(definition)}),
        }
        reply = self._process.exchange(json.dumps(task, default=str).encode() + b"\n", self._seconds)
        if reply is not None:
            self._known.add(name)
        return reply

    def close(self) -> None:
        """End the process, if there is one and it is ours: a forked process shares it with its parent."""
        self._process.end()


RENDERER = TemplateRenderer()
atexit.register(RENDERER.close)
