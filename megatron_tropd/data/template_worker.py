"""Render chat templates for ``data.template_renderer``: one JSON object per line in, one per line out, until the end.

It exists to be killed: a template may loop or grow for ever. Memory is limited here, time by whoever asks, and by a
timer that ends this process where nobody is left to. Rendering is ``transformers``' own.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from typing import IO, Any

_OWN_BYTES = 1 << 30  # of memory, beyond what the libraries take


def main() -> None:
    # whatever a library prints must not be taken for an answer
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    make = _maker()
    _limit_memory()
    known: dict[str, Any] = {}
    _answer(replies, {"ready": True})
    for line in sys.stdin:
        task = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, task["seconds"] + 5.0)  # ends the process
        if "define" in task:
            known[task["template"]] = make(task["define"])
        _answer(replies, _rendered(known[task["template"]], task))
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def _maker() -> Any:
    """Return what makes a tokenizer of which only the chat template is there."""
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    class TemplateOnly:
        apply_chat_template = PreTrainedTokenizerBase.apply_chat_template
        get_chat_template = PreTrainedTokenizerBase.get_chat_template

        def __init__(self, definition: dict[str, Any]) -> None:
            self.chat_template = definition["chat_template"]
            self.special_tokens_map = definition["special_tokens_map"]

    return TemplateOnly


def _limit_memory() -> None:
    try:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # another system than Linux: time alone is limited
        return
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = used + _OWN_BYTES if hard == resource.RLIM_INFINITY else min(used + _OWN_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _rendered(tokenizer: Any, task: dict[str, Any]) -> dict[str, str]:
    try:
        text = tokenizer.apply_chat_template(
            task["messages"], add_generation_prompt=task["generate"], tokenize=False, **task["options"]
        )
    except MemoryError:
        return {"exceeded": "more than 1 GiB of memory"}
    except Exception as error:  # templates are programs: they raise whatever their author chose
        return {"error": str(error)[:2000]}
    if len(text) > task["longest"]:
        return {"exceeded": f"more than {task['longest']:,} characters"}
    return {"text": text}


def _answer(replies: IO[str], reply: dict[str, Any]) -> None:
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
