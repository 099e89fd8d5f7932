"""Read the tests of a programming problem: which of the forms that data sets use a reference has, or why it has none.

A reference must be able to fail. Its form is recognized here, without running anything; ``probes`` are programs that
it must not let pass, which ``grader_pool`` tries in the sandbox.
"""

from __future__ import annotations

import ast
import json
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from megatron_tropd.errors import DataError
from megatron_tropd.evaluate.programs import BlockRule, defined_names, free_names, program_of, tree_of
from megatron_tropd.evaluate.runners import without_runners

# annotations of an answer may name what the prompt imported; more of it comes with code.prelude
TYPING_PRELUDE = "from typing import *\n"
_NOTHING = """\
class _Nothing:
    def __init__(self, *args, **options): pass
    def __call__(self, *args, **options): return _Nothing()
    def __getattr__(self, name):
        if name.startswith("__"): raise AttributeError(name)
        return _Nothing()
    def __iter__(self): return iter(())
    def __bool__(self): return %s
class _Name(_Nothing):
    def __bool__(self): return True
"""
_EXITS = ("exit", "quit", "sys.exit", "os._exit", "SystemExit")
_FORMS = (
    "assertions, HumanEval's check(candidate) with code.entry_point, pytest functions, unittest classes, a JSON list "
    "of assertions, or JSON of inputs and outputs"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeReference:
    """The tests of one problem. Either ``tests`` or ``cases``."""

    form: str
    tests: tuple[str, ...] = ()  # run in the program's module, one after the other, with ``__name__ == "__main__"``
    cases: tuple[tuple[str, str], ...] = ()  # standard input, and what must be printed
    prelude: str = ""  # run before the program, such as the imports and the signature of its prompt
    wanted: frozenset[str] = frozenset()  # names that the tests use

    @property
    def probes(self) -> tuple[str, ...]:
        """Return programs that must not pass: an empty one, and one of the two whose functions do nothing."""
        if self.cases:
            return ()
        names = "".join(f"{name} = _Name()\n" for name in sorted(self.wanted))
        return ("", *(_NOTHING % truth + names for truth in ("True", "False")))


@lru_cache(maxsize=256)
def read_code_reference(reference: str) -> CodeReference:
    """Recognize the form of a reference.

    Raises:
        DataError: it is none of the forms, or nothing in it could fail.
    """
    try:
        tree = json.loads(reference)
    except (ValueError, RecursionError):
        tree = None
    return _json_tests(tree, "") if isinstance(tree, dict | list) else _python_tests(reference, "")


def program_for(response: str, reference: CodeReference, *, rule: BlockRule = "definitions") -> str | None:
    """Return the program of a response, which may continue where the prelude ends; None where there is none."""
    if reference.prelude:
        continued = _continued(reference.prelude, response, reference.wanted)
        if continued is not None:
            return continued
    return program_of(response, rule=rule, wanted=reference.wanted)


def _continued(prelude: str, response: str, wanted: frozenset[str]) -> str | None:
    """Return prelude and response as one program where the response continues within a function of the prelude."""
    lines = response.lstrip("\n").split("\n")
    if not lines[0][:1].isspace():
        return None
    end = next((row for row, line in enumerate(lines) if line.lstrip().startswith(("```", "~~~"))), len(lines))
    inside = next((row for row, line in enumerate(lines[:end]) if line.strip() and not line[0].isspace()), end)
    for stop in (end, inside):
        code = prelude.rstrip() + "\n" + "\n".join(lines[:stop]) + "\n"
        tree = tree_of(code)
        if tree is not None and (not wanted or defined_names(tree) & wanted):
            return code
    return None


def prelude_alone(prelude: str) -> str:
    """Return as much of a prelude as compiles by itself: a signature without a body is left out."""
    lines = prelude.split("\n")
    while lines and tree_of("\n".join(lines)) is None:
        starts = [row for row, line in enumerate(lines) if line[:1].strip() and line[:1] not in "#)]}"]
        lines = lines[: starts[-1]] if starts else []
    return "\n".join(lines)


# --------------------------------------------------------------------------- JSON


def _json_tests(tree: Any, entry_point: str) -> CodeReference:
    if isinstance(tree, str):
        inner = _loaded(tree)
        return _python_tests(tree, entry_point) if inner is None else _json_tests(inner, entry_point)
    if isinstance(tree, Mapping):
        return _object_tests(tree, entry_point)
    if isinstance(tree, list) and tree and all(isinstance(row, str) for row in tree):
        return replace(_python_tests("\n".join(tree), entry_point), form="list of assertions")
    if isinstance(tree, list) and tree and all(isinstance(row, Mapping) for row in tree):
        return _case_tests(tree, entry_point)
    raise _refused(json.dumps(tree), "is JSON of another form")


def _loaded(text: str) -> Any:
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return tree if isinstance(tree, dict | list) else None


def _object_tests(tree: Mapping[str, Any], entry_point: str) -> CodeReference:
    name = tree.get("entry_point") or tree.get("fn_name") or entry_point
    if not isinstance(name, str):
        raise _refused(json.dumps(tree), f"has the entry point {name!r}, which is no name")
    if "tests" in tree:
        found = _json_tests(tree["tests"], name)
        return replace(found, prelude=str(tree.get("prelude") or found.prelude))
    if "inputs" in tree and "outputs" in tree:
        inputs, outputs = tree["inputs"], tree["outputs"]
        if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs) or not inputs:
            raise _refused(json.dumps(tree), "has inputs and outputs of different number, or none")
        if name:
            return _call_tests(name, [(_as_arguments(i), o) for i, o in zip(inputs, outputs, strict=True)])
        if any(isinstance(given, list) and not all(isinstance(line, str) for line in given) for given in inputs):
            raise _refused(
                json.dumps(tree),
                "has arguments as inputs, and no name of what to call: give its column as code.entry_point",
            )
        return _printing_tests(list(zip(inputs, outputs, strict=True)))
    if "input" in tree and "output" in tree:
        given, printed = tree["input"], tree["output"]
        if isinstance(given, list) and isinstance(printed, list) and len(given) == len(printed) and not name:
            return _object_tests({"inputs": given, "outputs": printed}, name)  # of CodeContests: a list of each
        return _case_tests([tree], name)
    raise _refused(json.dumps(tree), f"is a JSON object with {sorted(tree)}")


def _case_tests(rows: Sequence[Mapping[str, Any]], entry_point: str) -> CodeReference:
    if not all("input" in row and "output" in row for row in rows):
        raise _refused(json.dumps(rows), "is a list of objects without 'input' and 'output'")
    name = next((str(row["fn_name"]) for row in rows if row.get("fn_name")), entry_point)
    functional = any(row.get("testtype") == "functional" or row.get("type") == "function_call" for row in rows)
    if functional and not name:
        raise _refused(json.dumps(rows), "calls a function that it does not name: give its column as code.entry_point")
    if not functional and not any(row.get("fn_name") for row in rows):
        return _printing_tests([(row["input"], row["output"]) for row in rows])
    return _call_tests(name, [(_as_arguments(row["input"]), _as_value(row["output"])) for row in rows])


def _as_arguments(given: Any) -> list[Any]:
    """Return a list of arguments: as given, or from text with the JSON of one per line (LiveCodeBench)."""
    if isinstance(given, list):
        return given
    return [_as_value(line) for line in given.split("\n")] if isinstance(given, str) else [given]


def _as_value(given: Any) -> Any:
    try:
        return json.loads(given) if isinstance(given, str) else given
    except ValueError:
        return given


def _printing_tests(pairs: Sequence[tuple[Any, Any]]) -> CodeReference:
    cases = tuple((_as_lines(given), _as_lines(printed)) for given, printed in pairs)
    if not any(printed.strip() for _, printed in cases):
        raise _refused(json.dumps(pairs), "expects no output of any case, so an empty program passes")
    return CodeReference(form="inputs and outputs", cases=cases)


def _as_lines(content: Any) -> str:
    """Join a list of lines; text stays as it is."""
    return "\n".join(map(_as_lines, content)) if isinstance(content, list) else str(content)


_CALLS = """\
def _check_calls(cases, name):
    import json
    def plain(value):
        if isinstance(value, (list, tuple)):
            return [plain(part) for part in value]
        if isinstance(value, dict):
            return {str(key): plain(part) for key, part in value.items()}
        return value
    for arguments, expected in json.loads(cases):
        target = globals().get(name)
        if target is None and "Solution" in globals():
            target = getattr(Solution(), name)
        if target is None:
            raise NameError(f"name {name!r} is not defined")
        found = plain(target(*arguments))
        assert found == expected or [found] == expected, f"{name}{tuple(arguments)!r:.60} is {found!r:.60}"
"""


def _call_tests(name: str, cases: Sequence[tuple[list[Any], Any]]) -> CodeReference:
    if not name.isidentifier():
        raise _refused(name, "is no name of a function")
    source = f"{_CALLS}_check_calls({json.dumps(cases)!r}, {name!r})\n"
    return CodeReference(form="calls and results", tests=(source,), wanted=frozenset({name, "Solution"}))


# --------------------------------------------------------------------------- Python


def _python_tests(source: str, entry_point: str) -> CodeReference:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            compile(source, "tests", "exec", dont_inherit=True)
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise DataError(f"reference answer {source[:80]!r} is not a Python program of tests: {error}.") from None
    if any(_called(node) == "testmod" for node in ast.walk(tree)):
        raise _refused(
            source, "runs doctest.testmod(), the examples of the answer's own docstrings: without any it passes"
        )
    removed = without_runners(tree) | _without_exits(tree, source)
    forms, calls = _calls(tree, source, entry_point)
    called = ast.parse("\n".join(calls))
    if not any(_can_fail(node) for node in _reached([*tree.body, *called.body], tree)):
        raise _refused(source, "asserts nothing that is run: write `assert f(1) == 2`, not `f(1) == 2`")
    wanted = (free_names(tree) | _imported(tree) | {entry_point}) - {""}
    return CodeReference(
        form=", ".join(forms) or "assertions",
        tests=(ast.unparse(tree) if removed else source, "\n".join(calls)),
        wanted=frozenset(wanted - _harness(tree)),
    )


def _without_exits(tree: ast.Module, source: str) -> bool:
    """Take an exit of status 0 off the end of tests, in place; say whether there was one.

    Raises:
        DataError: they end the process elsewhere than where they fail: what ends early never passes.
    """
    bodies = [
        tree.body,
        *(node.body for node in tree.body if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)),
    ]
    found = False
    for body in bodies:
        if body and _succeeds(body[-1]):
            body[-1], found = ast.copy_location(ast.Pass(), body[-1]), True
    always = [node for body in bodies for node in body if _exit_arguments(node) is not None]
    early = [node for node in ast.walk(tree) if _succeeds(node)]
    for node in (*always, *early):
        raise _refused(source, f"ends the process by {ast.unparse(node)[:40]!r}, so that no program passes: use assert")
    return found


def _succeeds(node: ast.AST) -> bool:
    arguments = _exit_arguments(node)
    return arguments is not None and all(isinstance(one, ast.Constant) and not one.value for one in arguments)


def _exit_arguments(node: ast.AST) -> list[ast.expr] | None:
    """Return what a statement that ends the process gives as its status; None for other nodes."""
    call = node.value if isinstance(node, ast.Expr) else node.exc if isinstance(node, ast.Raise) else None
    if isinstance(call, ast.Call) and ast.unparse(call.func) in _EXITS:
        return call.args
    return [] if isinstance(node, ast.Raise) and isinstance(call, ast.Name) and call.id == "SystemExit" else None


def _calls(tree: ast.Module, source: str, entry_point: str) -> tuple[list[str], list[str]]:
    """Return the forms of a reference, and the lines that run what it defines and does not run by itself."""
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    forms: list[str] = []
    lines: list[str] = []
    for node in tree.body:
        found: tuple[str, list[str]] | None = None
        if isinstance(node, ast.ClassDef):
            found = _class_calls(node, tree)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name not in called:
            found = _function_calls(node, source, entry_point)
        if found is not None:
            forms.append(found[0])
            lines += found[1]
    return list(dict.fromkeys(forms)), lines


def _function_calls(
    node: ast.FunctionDef | ast.AsyncFunctionDef, source: str, entry_point: str
) -> tuple[str, list[str]] | None:
    arguments = _required(node)
    if node.name == "check" and arguments == 1:
        if not entry_point:
            raise _refused(
                source,
                "defines check(...) and never calls it: name the column that holds the function's name with "
                "code.entry_point, or call it in answer_template",
            )
        return "check(entry_point)", [f"check({entry_point})"]
    if not node.name.startswith("test"):
        return None
    if arguments:
        raise _refused(
            source, f"has the test {node.name} with arguments (fixtures, parameters), which only pytest fills in"
        )
    call = f"{node.name}()"
    return "pytest functions", [
        f"__import__('asyncio').run({call})" if isinstance(node, ast.AsyncFunctionDef) else call
    ]


_RUN_UNITTEST = """\
def _run_unittest(*classes):
    import unittest
    load = unittest.defaultTestLoader.loadTestsFromTestCase
    result = unittest.TestResult()
    unittest.TestSuite(load(each) for each in classes).run(result)
    for _, trace in result.failures + result.errors:
        raise AssertionError(trace.strip().splitlines()[-1])
    assert result.wasSuccessful() and result.testsRun > len(result.skipped), "no test was run"
"""


def _class_calls(node: ast.ClassDef, tree: ast.Module) -> tuple[str, list[str]] | None:
    tests = [part for part in node.body if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef)]
    tests = [part for part in tests if part.name.startswith("test") and not _is_skipped(part)]
    if _is_skipped(node):
        return None
    if _is_test_case(node, tree):
        if not tests and not any(_is_test_case(other, tree) for other in _bases(node, tree)):
            return None
        return "unittest classes", [_RUN_UNITTEST + f"_run_unittest({node.name})"]
    if not (node.name.startswith("Test") and tests) or any(_required(part) != 1 for part in tests):
        return None
    setup = next(
        (part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "setup_method"), None
    )
    lines = []
    for part in tests:
        lines.append(f"_instance = {node.name}()")
        if setup is not None:
            lines.append(f"_instance.setup_method({', '.join(['None'] * (_required(setup) - 1))})")
        call = f"_instance.{part.name}()"
        lines.append(f"__import__('asyncio').run({call})" if isinstance(part, ast.AsyncFunctionDef) else call)
    return "pytest classes", lines


def _is_skipped(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(_called(one) == "skip" for one in node.decorator_list)


def _is_test_case(node: ast.ClassDef, tree: ast.Module) -> bool:
    named = any(ast.unparse(base).split(".")[-1].endswith("TestCase") for base in node.bases)
    return named or any(_is_test_case(other, tree) for other in _bases(node, tree))


def _bases(node: ast.ClassDef, tree: ast.Module) -> list[ast.ClassDef]:
    names = {base.id for base in node.bases if isinstance(base, ast.Name)} - {node.name}
    return [other for other in tree.body if isinstance(other, ast.ClassDef) and other.name in names]


def _required(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = node.args
    return len(arguments.posonlyargs) + len(arguments.args) - len(arguments.defaults)


def _reached(statements: Sequence[ast.AST], tree: ast.Module) -> Iterator[ast.AST]:
    """Yield the nodes that may run: what statements hold, and the functions and classes that these name."""
    defined = {
        node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
    }
    waiting: list[ast.AST] = [node for node in statements if node not in defined.values()]
    seen: set[str] = set()
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.Name) and node.id in defined and node.id not in seen:
            seen.add(node.id)
            waiting += ast.iter_child_nodes(defined[node.id])
        waiting += ast.iter_child_nodes(node)


def _can_fail(node: ast.AST) -> bool:
    if isinstance(node, ast.Assert):
        # a tuple is true whatever it holds
        return not (isinstance(node.test, ast.Tuple) and node.test.elts) and not isinstance(node.test, ast.Constant)
    name = _called(node)
    return (
        isinstance(node, ast.Raise)
        or name.startswith(("assert", "expect"))
        or name in ("fail", "raises", "exit", "_exit")
    )


def _called(node: ast.AST) -> str:
    """Return the last name of what a call calls; empty for other nodes."""
    if not isinstance(node, ast.Call):
        return ""
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def _imported(tree: ast.Module) -> set[str]:
    """Return the names imported from modules that are not Python's: one of them may stand for the answer."""
    nodes = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module and not n.level]
    own = [n for n in nodes if (n.module or "").split(".")[0] not in sys.stdlib_module_names]
    return {alias.name for node in own for alias in node.names if alias.name != "*"}


def _harness(tree: ast.Module) -> set[str]:
    return {"__name__", "__file__"} & free_names(tree)


def _refused(reference: str, reason: str) -> DataError:
    return DataError(f"reference answer {reference[:80]!r} {reason}. The grader 'code' takes {_FORMS}.")
