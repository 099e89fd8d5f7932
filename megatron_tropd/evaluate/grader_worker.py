"""Grade for ``evaluate.grader_pool``: one JSON object per line in, one per line out, until the input ends.

It exists to be killed: symbolic mathematics and regular expressions may take for ever on a text that asks for it, some
of it in C code that no signal interrupts. A watchdog ends the process by itself when its parent cannot.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import resource
import sys
from typing import IO, Any

from megatron_tropd.errors import DataError
from megatron_tropd.evaluate.code_tests import program_for, read_code_reference
from megatron_tropd.evaluate.rules import NO_PROGRAM, UNFINISHED, check_reference, grade, graded_part

_MEMORY_BYTES = 4 << 30


def main() -> None:
    # whatever a library prints must not be taken for an answer
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    logging.disable(logging.CRITICAL)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    most = _MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(_MEMORY_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    for line in sys.stdin:
        _answer(json.loads(line), replies)


def _answer(task: dict[str, Any], replies: IO[str]) -> None:
    if task["kind"] == "math":
        import math_verify  # noqa: F401  # its import is not the response's time

    faulthandler.dump_traceback_later(task["seconds"] + 1.0, exit=True)
    try:
        reply: dict[str, Any] = _DO[task["do"]](task)
    except DataError as error:
        reply = {"correct": False, "bad_reference": str(error)}
    except (MemoryError, RecursionError) as error:
        reply = {"correct": False, "note": f"too large to grade ({type(error).__name__})"}
    faulthandler.cancel_dump_traceback_later()
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


def _grade(task: dict[str, Any]) -> dict[str, Any]:
    part = graded_part(task["response"])
    correct = grade(task["kind"], task["response"], task["answer"], extract=task["extract"])
    return {"correct": correct, "note": UNFINISHED if part is None else ""}


def _check(task: dict[str, Any]) -> dict[str, Any]:
    check_reference(task["kind"], task["answer"])
    return {"correct": True}


def _find_program(task: dict[str, Any]) -> dict[str, Any]:
    reference = read_code_reference(task["answer"])
    part = graded_part(task["response"], task["extract"])
    if part is None:
        return {"correct": False, "note": UNFINISHED}
    program = program_for(part, reference, rule=task["blocks"])
    return {"correct": False, "note": NO_PROGRAM} if program is None else {"correct": True, "program": program}


_DO = {"grade": _grade, "check": _check, "program": _find_program}


if __name__ == "__main__":
    main()
