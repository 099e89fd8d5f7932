"""Docstrings of functions start with a verb in the imperative; spelling is American; words are the field's."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import megatron_tropd

PACKAGE = Path(megatron_tropd.__file__).parent
ROOT = PACKAGE.parent

MODULES = sorted(PACKAGE.rglob("*.py"))
# first words, besides plurals and verbs in the third person, of what is no command
_WRONG = (
    "a about accuracy after all an and another any anything as at attention base because before beside "
    "between both but by causal consecutive content context data each either elementwise every everything "
    "expert fewer for forward fresh from has here how if in instead it its kl largest last least length "
    "log-prob loss maximum mean median memory minimum more most neither newest no none norm nothing "
    "of off on once one only other our over own part per probability random rank same seconds "
    "shape share since smallest so some student such teacher text that the their them there these they "
    "this those to token true false under until we weight what when where whether which while who whole "
    "whose why with within without"
)
WRONG = frozenset(_WRONG.split())
ENDS_IN_S = frozenset({"pass", "process", "address", "compress", "express", "cross", "press", "guess", "miss", "focus"})
TAKES_OF = frozenset({"warn", "dispose", "think", "speak"})  # others before "of" are nouns: "Number of ranks"
BRITISH = re.compile(
    r"\b(?:\w*(?:colour|behaviour|neighbour|favour|honour|labour|flavour)\w*"
    r"|[a-z]+is(?:ation|ations|ing|e|ed|es|er|ers)"
    r"|(?:per|re)?cent(?:re|red|res)|metres?|defence|licence|grey|learnt|spelt|towards|whilst|judgement|artefacts?"
    r"|per cent|(?:un)?(?:model|label|travel|signal|level)l(?:ed|ing|er)|(?:anal|catal)ys(?:e|ed|es|ing)"
    r"|programmes?)\b",
    re.IGNORECASE,
)
# words on -ise and its like that Americans write so too
AMERICAN = re.compile(
    r"^(?:\w*wise|\w*(?:raise|promise|noise|revise|supervise)[ds]?|(?:a|sun)?ris(?:e|es|ing)|(?:re)?raising"
    r"|(?:un|im)?precise|concise|exercis\w+|advis\w+|devis\w+|(?:un)?supervis\w+|revising|promising|compris\w+"
    r"|surpris\w+|premises?|expertise|compromis\w+|disguise[ds]?|enterprise|(?:dis|ex)?advertis\w+|improvis\w+"
    r"|noised|noising|denois\w+|paradise|vise|poise|praise)$",
    re.IGNORECASE,
)
PRIVATE = re.compile(
    r"\b(?:asked[- ]for|asked ids|dealt|at rest|whole vocabulary|goes on|go on|went on|(?:is|are) gone|lets? go of"
    r"|begun|seen to|told apart)\b",
    re.IGNORECASE,
)


def is_imperative(docstring: str) -> bool:
    """Judge by the first word, strictly on what is known to be wrong: plurals and third persons end in one s."""
    match = re.match(r"[A-Z][a-z-]*\b", docstring)
    if match is None:
        return False
    word = match[0].lower()
    if docstring.startswith(f"{match[0]} of ") and word not in TAKES_OF:
        return False
    return word not in WRONG and (not word.endswith("s") or word in ENDS_IN_S)


def docstrings(source: str) -> Iterator[tuple[int, bool, str]]:
    """Yield line, whether it is a function's, and text of every docstring."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
            text = ast.get_docstring(node)
            if text is not None:
                yield node.body[0].lineno, isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef), text


def prose(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and text of every line that holds a comment or part of a text constant."""
    spoken: set[int] = {number for number, line in enumerate(source.splitlines(), 1) if "#" in line}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            spoken.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = source.splitlines()
    yield from ((number, lines[number - 1]) for number in sorted(spoken))


def british(text: str) -> list[str]:
    return [found for found in BRITISH.findall(text) if not AMERICAN.match(found)]


def place(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT).as_posix()}:{line}"


def test_every_docstring_of_a_function_starts_with_a_verb_in_the_imperative():
    wrong = [
        f"{place(path, line)}: {text.splitlines()[0]}"
        for path in MODULES
        for line, of_function, text in docstrings(path.read_text(encoding="utf-8"))
        if of_function and not is_imperative(text)
    ]
    assert wrong == []


def test_no_docstring_starts_with_what_or_how():
    wrong = [
        place(path, line)
        for path in MODULES
        for line, _, text in docstrings(path.read_text(encoding="utf-8"))
        if re.match(r"(?:What|How|Whether)\b", text)
    ]
    assert wrong == []


def test_the_words_are_the_fields():
    """The dictionary is docs/glossary.md: requested, assigned, idle, full vocabulary, resumes, lost, releases."""
    wrong = [
        f"{place(path, number)}: {PRIVATE.findall(text)}"
        for path in MODULES
        for number, text in prose(path.read_text(encoding="utf-8"))
        if PRIVATE.search(text)
    ]
    assert wrong == []


def test_package_and_pages_are_spelled_the_american_way():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    scripts = [path for folder in ("examples", "tools") for path in (ROOT / folder).rglob("*.py")]
    wrong = [
        f"{place(path, number)}: {found}"
        for path in (*MODULES, *(page for page in sorted(pages + scripts) if page.exists()))
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if (found := british(line))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    "docstring",
    [
        "The loss.",
        "Returns the loss.",
        "What is lost.",
        "Whether it is.",
        "``[T]`` nats.",
        "Log-probs at ids.",
        "1 or 0.",
    ],
)
def test_the_heuristic_rejects_what_is_no_command(docstring: str):
    assert not is_imperative(docstring)


@pytest.mark.parametrize("docstring", ["Return the loss.", "Pass it on.", "No-op.", "Number the steps."])
def test_the_heuristic_accepts_commands(docstring: str):
    assert is_imperative(docstring)


def test_spelling_is_judged_by_the_word():
    assert british("normalised, neighbours, Initialisation, modelling") != []
    assert british("otherwise precise noise; raised promises exercise, supervised elementwise") == []
