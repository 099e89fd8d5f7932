"""Programs and tests may end in a call of their runner, under whatever name, and are graded all the same."""

from __future__ import annotations

import ast

import pytest

from megatron_tropd.evaluate.code_tests import read_code_reference
from megatron_tropd.evaluate.grader_pool import GraderPool, Item
from megatron_tropd.evaluate.rules import GradingRule
from megatron_tropd.evaluate.runners import source_without_runners

CASE = "class T({base}):\n    def test_f(self):\n        self.assertEqual(f(1), 2)\n"
ENDS = {
    "plain": ("import unittest", "unittest.TestCase", "unittest.main()"),
    "guarded": ("import unittest", "unittest.TestCase", "if __name__ == '__main__':\n    unittest.main()"),
    "renamed module": ("import unittest as ut", "ut.TestCase", "ut.main(verbosity=2)"),
    "imported function": ("from unittest import TestCase, main", "TestCase", "main()"),
    "renamed function": ("from unittest import TestCase, main as go", "TestCase", "go()"),
    "of its own module": ("import unittest\nfrom unittest.main import main", "unittest.TestCase", "main()"),
    "raised": ("import unittest", "unittest.TestCase", "raise SystemExit(unittest.main())"),
    "within exit": ("import sys, unittest", "unittest.TestCase", "sys.exit(unittest.main())"),
    "kept": ("import unittest", "unittest.TestCase", "result = unittest.main()"),
    "absl": ("from absl.testing import absltest", "absltest.TestCase", "absltest.main()"),
}


def ended_by(how: str) -> str:
    first, base, last = ENDS[how]
    return f"{first}\n{CASE.format(base=base)}{last}\n"


@pytest.mark.parametrize("how", ENDS)
def test_a_runner_is_taken_out_by_any_name(how: str):
    (tests, _), source = read_code_reference(ended_by(how)).tests, ended_by(how)
    calls = [ast.unparse(node) for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Call)]
    ending = [call for call in calls if "main" in call or "go()" in call]
    assert ending == (["unittest.main(exit=False)"] if how == "kept" else [])
    assert source_without_runners(source) != source


def test_a_main_of_its_own_stays():
    for program in ("def main():\n    return 3  # three\nmain()\n", "import other\nother.main()\n", "main = 3 +", ""):
        assert source_without_runners(program) == program


def test_right_programs_are_right_where_they_or_their_tests_end_in_a_runner():
    """The two ways that used to end the process before the last line, in the sandbox itself."""
    own = f"def f(x):\n    return x + 1\nimport unittest\n{CASE.format(base='unittest.TestCase')}unittest.main()\n"
    pool, rule = GraderPool(workers=2, allow_code=True), GradingRule(kind="code", seconds=60)
    items = [
        Item(rule=rule, response=f"```python\n{program}\n```", answer=ended_by("renamed module"))
        for program in (own, own.replace("x + 1", "x + 2"))
    ]
    try:
        assert [grade.correct for grade in pool.grade(items)] == [True, False]
    finally:
        pool.close()
