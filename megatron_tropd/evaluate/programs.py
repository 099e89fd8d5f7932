"""Find the program in a response, as instruct and base models write it.

Nothing is run here, but texts are compiled, which may take for ever on one that asks for it: the grader pool does this
in a process that it can end.
"""

from __future__ import annotations

import ast
import builtins
import re
import textwrap
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

BlockRule = Literal["definitions", "last", "first", "all", "response"]
_PYTHON = ("python", "python3", "py", "py3", "python2", "pycon", "sage")
_FENCE = re.compile(r"^(?P<before>.*?)(?P<fence>`{3,}|~{3,})[ \t]*\{?[ \t]*\.?(?P<language>[\w+-]*)(?P<rest>[^\n`]*)$")
_STARTS = re.compile(r"^(?:def|class|import|from|@\w|async def|for|while|if|try|with)\b|^\w+ ?=|^print\(|^@")
_QUOTE = re.compile(r"^ {0,3}> ?")
_QUOTED_FENCE = re.compile(r"^ {0,3}> ?(?:`{3}|~{3})")
_INVISIBLE = {0xA0: " ", 0x202F: " ", 0xFEFF: None, 0x200B: None, ord("\r"): None}  # of pages that were copied
_MOST_TRIES = 8  # ends of a block, and places in a text, at which a program may end or begin
_LONGEST = 200_000  # characters; a longer response holds no program


@dataclass(frozen=True, slots=True)
class CodeBlock:
    """One block of code, its indentation taken off."""

    language: str
    code: str
    closed: bool = True


def program_of(response: str, *, rule: BlockRule = "definitions", wanted: Collection[str] = ()) -> str | None:
    """Return the program in a response; None where it holds none.

    Args:
        rule: which of several blocks of Python (without any, of blocks without a language) are the program.
            ``definitions``: the last one that defines a wanted name (without names: that defines a function or a
            class, or reads its input; else the last), and of the others those whose definitions it uses.
            ``last``, ``first``: that block.
            ``all``: all of them, one after the other. ``response``: the whole response as it stands.
        wanted: the names that the tests use.

    Blocks may be fenced by backquotes or tildes, indented in a list, opened by the prompt, or not closed. One that does
    not compile does not count where another one does. A response without fences is searched for bare code.
    """
    if len(response) > _LONGEST:
        return None
    if rule == "response":
        return response if response.strip() else None
    response = _plain(response)
    blocks = _candidates(blocks_of(response))
    if not blocks:
        return _bare_code(response)
    if rule in ("last", "first"):
        return blocks[-1 if rule == "last" else 0]
    return "\n".join(blocks) if rule == "all" else _that_define(blocks, wanted)


def _plain(response: str) -> str:
    """Return a response without what stands around all of it: invisible characters, a language that the prompt's fence
    awaited, a quotation's marks, an indentation."""
    text = response.translate(_INVISIBLE)
    first, _, rest = text.lstrip("\n").partition("\n")
    if first.strip().lower() in _PYTHON and not first[:1].isspace():
        return rest
    lines = text.split("\n")
    if any(_QUOTED_FENCE.match(line) for line in lines):
        return "\n".join(_QUOTE.sub("", line) for line in lines)
    return text


def blocks_of(response: str) -> list[CodeBlock]:
    """Return the fenced blocks of a response in their order; what the prompt's fence opened comes first."""
    lines = response.split("\n")
    blocks: list[CodeBlock] = []
    row, end = 0, len(lines)
    while row < end:
        fence = _opening(lines[row])
        if fence is None:
            row += 1
            continue
        if not blocks and not fence["language"] and _is_code("\n".join(lines[:row])):
            blocks.append(CodeBlock("python", "\n".join(lines[:row])))  # the prompt opened it: this fence closes it
            row += 1
            continue
        block, row = _read_block(lines, row, fence)
        blocks.append(block)
    return blocks


def _opening(line: str) -> re.Match[str] | None:
    match = _FENCE.match(line) if "```" in line or "~~~" in line else None
    # a fence behind text is one only when it says that Python follows
    return match if match and (not match["before"].strip(" \t>") or match["language"].lower() in _PYTHON) else None


def _read_block(lines: Sequence[str], row: int, fence: re.Match[str]) -> tuple[CodeBlock, int]:
    """Return the block that opens at ``row``, and the row behind it.

    A docstring may hold fences: of the first few closing ones that is taken behind which the block compiles.
    """
    ends = []
    for number in range(row + 1, len(lines)):
        if _closes(lines[number], fence["fence"]):
            ends.append(number)
            if len(ends) == _MOST_TRIES:
                break
    language = fence["language"].lower()
    for number in ends:
        code = _contents(lines, row, number, fence)
        if language not in (*_PYTHON, "") or _is_code(code):
            return CodeBlock(language, code), number + 1
        another = _opening(lines[number])
        if another is not None and another["language"]:
            break
    if ends:
        return CodeBlock(language, _contents(lines, row, ends[0], fence)), ends[0] + 1
    return CodeBlock(language, _contents(lines, row, len(lines), fence), closed=False), len(lines)


def _closes(line: str, fence: str) -> bool:
    text = line.rstrip()
    return (text.endswith(fence) and not text.endswith(fence + fence[0])) or text.lstrip().startswith(fence)


def _contents(lines: Sequence[str], row: int, end: int, fence: re.Match[str]) -> str:
    inside = list(lines[row + 1 : end])
    if end < len(lines):
        last = lines[end].rstrip().removesuffix(fence["fence"])
        inside += [last] if last.strip() and not last.lstrip().startswith(fence["fence"]) else []
    return textwrap.dedent("\n".join(inside)).rstrip("\n") + "\n"


# --------------------------------------------------------------------------- which blocks


def _candidates(blocks: Sequence[CodeBlock]) -> list[str]:
    """Return the blocks that may be the program: of Python, else without a language; compiling ones if there are."""
    for languages in (_PYTHON, ("",)):
        found = [_without_prompts(block) for block in blocks if block.language in languages]
        compiling = [code for code in found if _is_code(code)]
        if compiling or (found and languages is _PYTHON):
            return compiling or found
    return []


def _without_prompts(block: CodeBlock) -> str:
    """Take the prompts of an interactive session off, and its output."""
    if not block.code.lstrip().startswith(">>> "):
        return block.code
    typed = [line for line in block.code.split("\n") if line.startswith((">>> ", "... ", "..."))]
    return "\n".join(line[4:] for line in typed) + "\n"


def _that_define(blocks: Sequence[str], wanted: Collection[str]) -> str:
    trees = [tree_of(code) for code in blocks]
    defined = [defined_names(tree) if tree else set() for tree in trees]
    fitting = [i for i, names in enumerate(defined) if names & set(wanted)] if wanted else []
    if not fitting:
        fitting = [i for i, tree in enumerate(trees) if tree and (_defines(tree) or _reads_input(tree))]
    chosen = {fitting[-1] if fitting else len(blocks) - 1}
    missing = list(chosen)
    while missing:
        used = free_names(trees[missing.pop()])
        for name in used - set().union(*(defined[i] for i in chosen)):
            others = [i for i, names in enumerate(defined) if name in names and i not in chosen]
            if others:
                chosen.add(others[-1])
                missing.append(others[-1])
    return "\n".join(blocks[i] for i in sorted(chosen))


def _defines(tree: ast.Module) -> bool:
    return any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) for node in tree.body)


def _reads_input(tree: ast.Module) -> bool:
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return "input" in names or any(isinstance(node, ast.Attribute) and node.attr == "stdin" for node in ast.walk(tree))


def _bare_code(response: str) -> str | None:
    """Return the code in a text without fences: the first stretch of lines that compiles, as long as it can be."""
    text = response.replace("```", "").replace("~~~", "") if len(response.splitlines()) == 1 else response
    for whole in (text, textwrap.dedent(text)):
        if _is_code(whole):
            return whole
    lines = _indented_block(text.split("\n"))
    starts = [row for row, line in enumerate(lines) if _STARTS.match(line)][:_MOST_TRIES]
    for start in starts:
        end = len(lines)
        for _ in range(_MOST_TRIES):
            error = _syntax_error("\n".join(lines[start:end]))
            if error is None:
                break
            end = min(end - 1, start + max((error.lineno or 1) - 1, 0))
        code = "\n".join(lines[start:end])
        if end > start and _is_code(code):
            return code + "\n"
    return None


def _indented_block(lines: list[str]) -> list[str]:
    """Return the lines of a text, with those that four spaces or a tab make a block of Markdown set off by as many.

    Only where no line without them begins like code: there the indentation is Python's.
    """
    if any(_STARTS.match(line) for line in lines):
        return lines
    return [line.removeprefix("\t") if line.startswith("\t") else line.removeprefix("    ") for line in lines]


# --------------------------------------------------------------------------- looking at code


def tree_of(code: str) -> ast.Module | None:
    """Return the syntax tree of a program; None where it does not compile."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(code)
            compile(tree, "program", "exec", dont_inherit=True)
        return tree
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return None


def _syntax_error(code: str) -> SyntaxError | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(code)
    except SyntaxError as error:
        return error
    except (ValueError, MemoryError, RecursionError):
        return SyntaxError("too large", ("", 1, 1, ""))
    return None


def _is_code(text: str) -> bool:
    """Say whether a text is a program that does something: prose of one word compiles, too."""
    tree = tree_of(text)
    return tree is not None and any(
        not isinstance(node, ast.Expr) or any(isinstance(part, ast.Call | ast.Await) for part in ast.walk(node))
        for node in tree.body
    )


def defined_names(tree: ast.Module) -> set[str]:
    """Return the global names that a program binds."""
    return set(_bound(tree.body))


def _bound(body: Sequence[ast.stmt]) -> Iterator[str]:
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.asname or alias.name).split(".")[0] for alias in node.names)
        else:
            yield from (
                part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
            )
            for inner in ast.iter_child_nodes(node):
                if isinstance(inner, ast.stmt):
                    yield from _bound([inner])


def free_names(tree: ast.Module | None) -> set[str]:
    """Return the names that a program uses without binding them anywhere, builtins aside."""
    if tree is None:
        return set()
    used: set[str] = set()
    bound = set(defined_names(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            (used if isinstance(node.ctx, ast.Load) else bound).add(node.id)
        elif isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.ExceptHandler):
            bound.add(node.name or "")
        elif isinstance(node, ast.Import | ast.ImportFrom):
            bound.update((alias.asname or alias.name).split(".")[0] for alias in node.names)
    return {name for name in used - bound if not hasattr(builtins, name)}
