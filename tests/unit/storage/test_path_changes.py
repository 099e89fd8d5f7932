"""Every place that removes, replaces, renames or writes a path stands in a table, with what keeps it from a user's."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support.path_changes import GUARDS, HEADING, PAGE, changes, places, section

ROOT = Path(__file__).resolve().parents[3]


def test_every_place_that_changes_a_path_has_its_guard():
    found = {(place.module, place.function): place.calls for place in places()}
    new = {
        f"{module}: {function} calls {', '.join(found[module, function])}" for module, function in found.keys() - GUARDS
    }
    assert new == set(), "give it a row of GUARDS (tests/support/path_changes.py), or let storage/ do it"
    assert GUARDS.keys() - found.keys() == set(), "rows of what is gone"


def test_every_proof_is_a_test():
    for guard in GUARDS.values():
        if guard.proof:
            file, _, name = guard.proof.partition("::")
            tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
            assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}, guard.proof


def test_the_page_lists_them():
    written = "".join(PAGE.read_text(encoding="utf-8").partition(HEADING)[1:])
    assert written == section(), "run `python -m tests.support.path_changes`"


@pytest.mark.parametrize(
    ("line", "call"),
    [
        ("shutil.rmtree(path)", "rmtree"),
        ("path.unlink(missing_ok=True)", "unlink"),
        ("(a / b).replace(c)", "replace"),
        ("os.replace(a, b)", "replace"),
        ("os.remove(a)", "remove"),
        ("shutil.move(a, b)", "move"),
        ("path.open('w')", "open w"),
        ("open(path, mode='r+b')", "open r+b"),
        ("open(path, 'a' if more else 'x')", "open a"),
        ("os.open(path, os.O_CREAT | os.O_RDWR)", "open O_CREAT"),
        ("save_file(tensors, path)", "save_file"),
        ("text.replace('a', 'b')", None),
        ("replace(config, a=1)", None),
        ("names.remove(a)", None),
        ("path.open('rb')", None),
        ("open(path, encoding='utf-8')", None),
        ("os.open(path, os.O_RDONLY)", None),
    ],
)
def test_the_scan_sees_changes_in_every_disguise_and_nothing_else(line: str, call: str | None):
    source = f"class A:\n    def f(self):\n        if True:\n            {line}\n"
    assert list(changes(source)) == ([("A.f", call)] if call else [])
