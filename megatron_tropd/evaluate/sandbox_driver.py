"""Run a program and its tests, and say the word when all of them passed. Given to ``python -c``, never imported.

Only the standard library: nothing else is to be seen in a sandbox. Arguments: the file descriptor to answer on, and
the one that the word is read from. What the program ends with cannot be distinguished from what its tests end with,
so this answers for them: it sends the word back, and only after the last line has run; or else what was raised. Output
would not do for that: processes that the program has forked write to it as well. They come through these lines, too,
and do not answer.
"""

from __future__ import annotations

import ast
import atexit
import contextlib
import decimal
import importlib.util
import json
import os
import signal
import sys
import tempfile
import threading
import traceback
import types
from collections.abc import Callable, Iterator
from typing import Any

REPLY, WORD, DRIVER = int(sys.argv[1]), int(sys.argv[2]), os.getpid()
OWN = sys.modules["__main__"]  # kept: it is replaced below, and must outlive that


def main() -> None:
    sys.excepthook = say_why
    with open("task.json", encoding="utf-8") as file:
        task = json.load(file)
    os.remove("task.json")  # the tests are not the program's to read
    with open("program.py", "w", encoding="utf-8", errors="surrogatepass") as file:
        file.write(task["program"])
    sys.argv = ["program.py"]
    if task["probes"]:
        check_probes(task)
    elif task["cases"]:
        for number, (given, expected) in enumerate(task["cases"], start=1):
            check_case(task, number, given, expected)
    else:
        run_module(task, task["program"])
    sys.stdout.flush()
    if os.getpid() == DRIVER:
        os.write(REPLY, os.read(WORD, 64))
    os._exit(0)


def say_why(kind: type[BaseException], error: BaseException, trace: types.TracebackType | None) -> None:
    sys.__excepthook__(kind, error, trace)
    if os.getpid() == DRIVER:
        os.write(REPLY, traceback.format_exception_only(kind, error)[-1].encode("utf-8", "replace")[:1000])


def run_module(task: dict[str, Any], program: str, name: str = "program") -> None:
    """Run prelude, program and tests in one real module: ``program``, and ``__main__`` for its tests."""
    module = types.ModuleType(name)
    module.__file__ = "program.py"
    sys.modules.update({"program": module, "solution": module, "__main__": module})
    run(task["prelude"], "prelude.py", module)
    run(program, "program.py", module)
    module.__name__ = "__main__"
    for tests in task["tests"]:
        for root in imported(tests):
            if root not in sys.modules and not is_there(root):
                sys.modules[root] = module  # whatever the tests call it, they mean the program
        run(tests, "tests.py", module)


def run(source: str, file: str, module: types.ModuleType) -> None:
    exec(compile(source, file, "exec", dont_inherit=True), module.__dict__)


def imported(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]


def is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def check_probes(task: dict[str, Any]) -> None:
    """Raise when the tests let a program pass that must not: the first, or both of the others."""
    passed = [not in_child(probe, task, program) for program in task["probes"]]
    assert not passed[0], "an empty program passes"
    assert not all(passed[1:]), "a program whose functions do nothing passes"


def probe(task: dict[str, Any], program: str) -> None:
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    signal.setitimer(signal.ITIMER_REAL, task["probe_seconds"])  # ends the process: it did not pass
    run_module(task, program)


def check_case(task: dict[str, Any], number: int, given: str, expected: str) -> None:
    """Run the program as a script on one standard input, and compare its output."""
    with tempfile.TemporaryFile(dir=".") as stdin, tempfile.TemporaryFile(dir=".") as stdout:
        stdin.write(given.encode("utf-8", "surrogatepass"))
        stdin.seek(0)
        status = in_child(script, task, stdin.fileno(), stdout.fileno())
        stdout.seek(0)
        printed = stdout.read().decode("utf-8", "replace")
    assert status == 0, f"case {number}: the program failed"
    if not same_output(printed, expected):
        raise AssertionError(f"case {number}: printed {printed.strip()[-60:]!r}, not {expected.strip()[-60:]!r}")


def script(task: dict[str, Any], stdin: int, stdout: int) -> None:
    os.close(REPLY)  # the answer is its parent's alone
    os.close(WORD)
    os.dup2(stdin, 0)
    os.dup2(stdout, 1)
    try:
        run_module({**task, "tests": ()}, task["program"], name="__main__")
        threading._shutdown()  # type: ignore[attr-defined,unused-ignore]  # a program may solve its problem in a thread with a larger stack
        atexit._run_exitfuncs()
    finally:
        sys.stdout.flush()


def in_child(function: Callable[..., None], *arguments: Any) -> int:
    """Run a function in a process of its own; return its exit status, 0 when it returned."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    status = 1
    try:
        function(*arguments)
        status = 0
    except SystemExit as end:
        status = 0 if function is script and not end.code else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def same_output(printed: str, expected: str) -> bool:
    """Say whether lines are the same, white space at their ends aside; or words are, numbers by their value."""
    lines = [[line.strip() for line in text.strip().splitlines()] for text in (printed, expected)]
    if lines[0] == lines[1]:
        return True
    words = [text.split() for text in (printed, expected)]
    return len(words[0]) == len(words[1]) and all(map(same_word, *words))


def same_word(one: str, other: str) -> bool:
    if one == other:
        return True
    with contextlib.suppress(decimal.InvalidOperation):
        return decimal.Decimal(one) == decimal.Decimal(other)
    return False


if __name__ == "__main__":
    main()
