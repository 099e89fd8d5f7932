"""Tests of programs are recognized in the forms data sets have, or refused: no reference lets every program pass."""

from __future__ import annotations

import json

import pytest

from megatron_tropd.errors import DataError
from megatron_tropd.evaluate.code_tests import read_code_reference
from megatron_tropd.evaluate.grader_pool import GraderPool, Item
from megatron_tropd.evaluate.rules import GradingRule, check_reference

WRONG, RIGHT = (f"```python\ndef add(a, b):\n    return {body}\n```" for body in ("0", "a + b"))
EMPTY = "```python\npass\n```"
READS = "```python\na, b = map(int, input().split())\nprint(a + b)\n```"
PRINTS = "```python\nprint(0)\n```"
TEST = "assert add(1, 2) == 3"
UNIT = "import unittest\nclass T(unittest.TestCase):\n    def test_add(self):\n        self.assertEqual(add(1, 2), 3)\n"
CHECK = "def check(f):\n    assert f(1, 2) == 3\n"
FORMS = {
    "an assert": TEST,
    "under if __name__ == '__main__'": f"if __name__ == '__main__':\n    {TEST}",
    "check with its entry point": json.dumps({"tests": CHECK, "entry_point": "add"}),
    "check, called": f"{CHECK}check(add)",
    "pytest functions": f"def test_add():\n    {TEST}",
    "async pytest functions": f"async def test_add():\n    {TEST}",
    "pytest class": (
        "class TestAdd:\n    def setup_method(self):\n        self.x = 3\n"
        "    def test_it(self):\n        assert add(1, 2) == self.x"
    ),
    "unittest class": UNIT,
    "unittest.main(exit=False)": UNIT + "unittest.main(exit=False)",
    "unittest.main()": UNIT + "unittest.main()",
    "guarded unittest.main()": UNIT + "if __name__ == '__main__':\n    unittest.main()",
    "async unittest class": UNIT.replace("TestCase", "IsolatedAsyncioTestCase").replace("    def", "    async def"),
    "JSON list of asserts": json.dumps([TEST, "assert add(2, 2) == 4"]),
    "calls of APPS": json.dumps({"fn_name": "add", "inputs": [[1, 2], [2, 2]], "outputs": [3, [4]]}),
    "calls of LiveCodeBench": json.dumps(
        {"tests": [{"input": "1\n2", "output": "3", "testtype": "functional"}], "entry_point": "add"}
    ),
    "from solution import": f"from solution import add\n{TEST}",
    "from a module of another name": f"from my_answer import add\n{TEST}",
    "from __future__ first": f"from __future__ import annotations\n{TEST}",
    "raises": "if add(1, 2) != 3:\n    raise ValueError('wrong')",
    "a function that is called": f"def run():\n    {TEST}\nrun()",
    "exit at the end": f"import sys\n{TEST}\nsys.exit(0)",
    "guarded exit": f"def main():\n    {TEST}\nif __name__ == '__main__':\n    main()\n    exit()",
    "exit where it is wrong": "import sys\nif add(1, 2) != 3:\n    sys.exit('wrong')",
    "a class of which one test is skipped": UNIT + "    @unittest.skip('no')\n    def test_b(self):\n        pass\n",
    "a loop": "for a in range(3):\n    assert add(a, 1) == a + 1",
}
PRINTED = {
    "JSON of inputs and outputs": {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7"]},
    "lines in lists": {"inputs": [["1 2", ""]], "outputs": [["3"]]},
    "JSON list of stdin cases": [{"input": "1 2", "output": "3"}],
    "stdin cases with a type": [{"type": "stdin_stdout", "input": "1 2", "output": " 3.0 \n\n"}],
    "lists of CodeContests": {"input": ["1 2\n", "3 4\n"], "output": ["3\n", "7\n"]},
    "JSON in the tests": {"tests": json.dumps({"inputs": ["1 2"], "outputs": ["3"]})},
}
REFUSED = {
    "check, not called": (
        CHECK,
        "never calls it: name the column that holds the function's name",
    ),
    "expression without assert": ("add(1, 2) == 3", "asserts nothing that is run"),
    "a number": ("3", "asserts nothing that is run"),
    "comment": ("# tests", "asserts nothing that is run"),
    "nothing": ("", "asserts nothing that is run"),
    "async function that is not called": (f"async def t():\n    {TEST}", "asserts nothing that is run"),
    "function that is not called": (f"def t():\n    {TEST}", "asserts nothing that is run"),
    "assert of a pair": ("assert (add(1, 2) == 3, 'sum')", "asserts nothing that is run"),
    "assert True": ("assert True", "asserts nothing that is run"),
    "prints": ("print(add(1, 2) == 3)", "asserts nothing that is run"),
    "pytest function that returns": ("def test_add():\n    return add(1, 2) == 3", "asserts nothing that is run"),
    "pytest fixture": (f"def test_add(numbers):\n    {TEST}", "which only pytest fills in"),
    "doctest.testmod()": ("import doctest\nassert doctest.testmod().failed == 0", "without any it passes"),
    "not Python": ("assert add(1, 2) = 3", "is not a Python program of tests"),
    "outputs without inputs": (json.dumps({"outputs": ["3"]}), "is a JSON object with ['outputs']"),
    "lists of different length": (json.dumps({"inputs": ["1"], "outputs": []}), "of different number, or none"),
    "no output at all": (json.dumps({"inputs": ["1 2"], "outputs": [" \n"]}), "an empty program passes"),
    "JSON of numbers": ("[1, 2]", "is JSON of another form"),
    "functional without a name": (
        json.dumps([{"input": "1", "output": "3", "testtype": "functional"}]),
        "give its column as code.entry_point",
    ),
}
REFUSED |= {
    "arguments without a name": (json.dumps({"inputs": [[1, 2]], "outputs": [3]}), "no name of what to call"),
    "a computed status": ("exit(add(1, 2) != 3)", "so that no program passes"),
    "an early exit": ("import sys\nif add(1, 2) == 3:\n    sys.exit(0)\nassert False", "so that no program passes"),
    "always exit 1": (f"{TEST}\nraise SystemExit(1)", "so that no program passes"),
    "every test is skipped": (
        UNIT.replace("    def", "    @unittest.skip('no')\n    def"),
        "asserts nothing that is run",
    ),
    "the class is skipped": (UNIT.replace("class", "@unittest.skip('no')\nclass"), "asserts nothing that is run"),
}
# found by running them only
USELESS = {
    "caught": f"try:\n    {TEST}\nexcept Exception:\n    pass",
    "about itself": "x = 3\nassert x == 3",
    "only that it is there": "assert add",
    "result unused": "add(1, 2)\nassert 1 + 1 == 2",
}


@pytest.fixture(scope="module")
def pool():
    pool = GraderPool(workers=2, allow_code=True)
    yield pool
    pool.close()


RULE = GradingRule(kind="code", seconds=60)


def correct(pool: GraderPool, reference: str, *responses: str) -> list[bool]:
    return [one.correct for one in pool.grade([Item(rule=RULE, response=r, answer=reference) for r in responses])]


@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_a_form_that_is_accepted_tells_wrong_from_right(pool, name):
    assert pool.check(RULE, [FORMS[name]]) == [""]
    assert correct(pool, FORMS[name], EMPTY, WRONG, RIGHT) == [False, False, True]


@pytest.mark.parametrize("name", PRINTED)
def test_cases_of_input_and_output_tell_wrong_from_right(pool, name):
    reference = json.dumps(PRINTED[name])
    assert pool.check(RULE, [reference]) == [""]
    guarded = "```python\nimport sys\ndef main():\n    print(sum(map(int, sys.stdin.read().split())))\n"
    guarded += "if __name__ == '__main__':\n    import threading\n    threading.Thread(target=main).start()\n```"
    assert correct(pool, reference, EMPTY, PRINTS, READS, guarded) == [False, False, True, True]


@pytest.mark.parametrize("name", REFUSED)
def test_what_could_not_fail_or_is_no_form_is_refused_without_running_it(pool, name):
    reference, reason = REFUSED[name]
    with pytest.raises(DataError) as refusal:
        check_reference("code", reference)
    assert reason in str(refusal.value)
    (grade,) = pool.grade([Item(rule=RULE, response=RIGHT, answer=reference)])
    assert not grade.correct and grade.bad_reference


@pytest.mark.parametrize("name", USELESS)
def test_tests_that_let_a_program_pass_that_does_nothing_are_refused(pool, name):
    (reason,) = pool.check(RULE, [USELESS[name]])
    assert "would let every program pass" in reason
    fresh = GraderPool(workers=1, allow_code=True)  # also where nobody checked before
    (grade,) = fresh.grade([Item(rule=RULE, response=RIGHT, answer=USELESS[name])])
    fresh.close()
    assert not grade.correct and grade.bad_reference


def test_tests_that_expect_nothing_are_tests():
    for reference in ("assert add(1, 2) is None", "assert not add(1, 2)"):
        assert read_code_reference(reference).form == "assertions"


def test_a_case_says_what_was_printed_instead(pool):
    reference = json.dumps(PRINTED["JSON of inputs and outputs"])
    responses = (PRINTS, "```python\n1 / 0\n```")
    found = pool.grade([Item(rule=RULE, response=response, answer=reference) for response in responses])
    assert [one.note for one in found] == [
        "AssertionError: case 1: printed '0', not '3'",
        "AssertionError: case 1: the program failed",
    ]
