"""Programs are found in the forms that instruct and base models write every day, and run as real modules."""

from __future__ import annotations

import json

import pytest

from megatron_tropd.evaluate.grader_pool import Grade, GraderPool, Item
from megatron_tropd.evaluate.programs import blocks_of, program_of
from megatron_tropd.evaluate.rules import NO_PROGRAM, GradingRule

CODE, FENCE = "def add(a, b):\n    return a + b\n", "```python\n"
TEST = "assert add(1, 2) == 3"
# each holds a right program
FORMS = {
    "one block": f"{FENCE}{CODE}```",
    "the prompt opened the fence": f"{CODE}```\n",
    "the same, prose behind it": f"{CODE}```\nThis adds.",
    "the same, then an example": f"{CODE}```\nExample:\n{FENCE}print(add(1, 2))\n```",
    "solution, then usage example": f"{FENCE}{CODE}```\nUsage:\n{FENCE}print(add(1, 2))\n```",
    "usage that reads input": f"{FENCE}{CODE}```\nUsage:\n{FENCE}print(add(int(input()), 2))\n```",
    "block without language, then output": f"```\n{CODE}```\nOutput:\n```\n3\n```",
    "block in a numbered list": "1. So:\n   ```python\n   def add(a, b):\n       return a + b\n   ```",
    "tildes": f"~~~python\n{CODE}~~~",
    "four backquotes": f"````python\n{CODE}````",
    "fence in a docstring": (
        "```python\ndef add(a, b):\n    '''\n    ```\n    add(1, 2)\n    ```\n    '''\n    return a + b\n```"
    ),
    "blocks that belong together": (
        f"{FENCE}def one(): return 1\n```\nand\n{FENCE}def add(a, b):\n    return a + b * one()\n```"
    ),
    "the helper comes last": (
        f"{FENCE}def add(a, b):\n    return a + b * one()\n```\nand\n{FENCE}def one(): return 1\n```"
    ),
    "block cut behind a whole one": f"{FENCE}{CODE}```\nBetter:\n{FENCE}def add(a, b",
    "block that is not closed": f"{FENCE}{CODE}",
    "text, then bare code": f"The function:\n\n{CODE}",
    "bare code, then text": f"{CODE}\nThis function adds its arguments.",
    "bare code": CODE,
    "fence behind text on its line": f"Here: {FENCE}{CODE}```",
    "fence behind code on its line": f"{FENCE}{CODE.rstrip()}```",
    "{.python}, then output": f"```{{.python}}\n{CODE}```\n```\n3\n```",
    "py3": f"```py3\n{CODE}```",
    "an interactive session": "```python\n>>> def add(a, b):\n...     return a + b\n>>> add(1, 2)\n3\n```",
    "List without its import": f"{FENCE}def add(a: List[int], b) -> Optional[int]:\n    return a + b\n```",
    "a second attempt": f"{FENCE}def add(a, b):\n    return a\n```\nThat is wrong:\n{FENCE}{CODE}```",
    "a shell block behind it": f"{FENCE}{CODE}```\nRun it:\n```bash\npython add.py\n```",
    "the prompt opened the fence, and the language is the response's": f"python\n{CODE}```\nThis adds.",
    "a quotation": "> ```python\n> def add(a, b):\n>     return a + b\n> ```\n> It adds.",
    "an indented block": "So:\n\n    def add(a, b):\n        return a + b\n\nIt adds.",
    "bare code, all of it indented": "    def add(a, b):\n        return a + b\n",
    "lines as another system ends them": f"{FENCE}{CODE}```\n".replace("\n", "\r\n"),
    "spaces that do not break, a mark of byte order": f"\ufeff{FENCE}\ufeff{CODE}```".replace("    ", "\u00a0" * 4),
    "a demonstration at its end": f"{FENCE}{CODE}if __name__ == '__main__':\n    print(add(input(), input()))\n```",
}
MODULES = {
    "dataclasses": (
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: 'int'\ndef add(a, b): return P(a + b).x"
    ),
    "pickle": (
        "import pickle\nclass P:\n    def __init__(self, x): self.x = x\n"
        "def add(a, b): return pickle.loads(pickle.dumps(P(a + b))).x"
    ),
    "__main__": "import __main__\ndef one(a, b): return a + b\ndef add(a, b): return __main__.one(a, b)",
    "its own module": "import sys\nX = 0\ndef add(a, b): return a + b + sys.modules['program'].X",
    "its source": "import inspect\ndef add(a, b): return a + b if 'return a' in inspect.getsource(add) else 0",
    "get_type_hints": (
        "import typing\nclass P:\n    x: 'Q'\nclass Q: pass\ndef add(a, b): return typing.get_type_hints(P) and a + b"
    ),
}


@pytest.fixture(scope="module")
def pool():
    pool = GraderPool(workers=2, allow_code=True)
    yield pool
    pool.close()


def graded(pool: GraderPool, response: str, answer: str, **options: object) -> Grade:
    return pool.grade([Item(rule=GradingRule(kind="code", seconds=60, **options), response=response, answer=answer)])[0]


@pytest.mark.parametrize("name", FORMS)
def test_a_right_program_is_found_in_every_form(pool, name):
    assert graded(pool, FORMS[name], TEST) == Grade(True)


@pytest.mark.parametrize("name", MODULES)
def test_a_program_is_a_real_module(pool, name):
    assert graded(pool, f"{FENCE}{MODULES[name]}\n```", TEST) == Grade(True)


@pytest.mark.parametrize("text", ["I do not know.", "yes", "", "3", "The sum, a + b.", "'add'", "add"])
def test_text_without_code_is_no_program(pool, text):
    assert program_of(text) is None
    assert graded(pool, text, TEST) == Grade(False, NO_PROGRAM)


def test_a_suite_chooses_which_blocks_are_the_program():
    first, second = "def f():\n    return 1\n", "def f():\n    return 2\n"
    response = f"Try\n{FENCE}{first}```\nor\n```py\n{second}```\nrun\n```bash\nls\n```\n{FENCE}print(f())\n```"
    expected = {"definitions": second, "first": first, "last": "print(f())\n", "response": response}
    for rule, program in expected.items():
        assert program_of(response, rule=rule, wanted={"f"}) == program
    assert program_of(response, rule="all") == f"{first}\n{second}\nprint(f())\n"


def test_of_several_blocks_the_last_that_defines_what_the_tests_use_counts_with_what_it_needs():
    f, g, h = "def f():\n    return g()\n", "def g():\n    return 1\n", "def h():\n    return 2\n"
    response = f"{FENCE}{g}```{FENCE}{h}```\n{FENCE}{f}```\n{FENCE}{h}```\n"
    response = response.replace("``````", "```\n```")
    assert program_of(response, wanted={"f"}) == f"{g}\n{f}"
    assert program_of(response, wanted={"h"}) == h
    # without names: the last that defines anything, or reads its input
    reads = "n = int(input())\nprint(n)\n"
    assert program_of(f"{FENCE}{reads}```\nThen:\n{FENCE}print('done')\n```") == reads


def test_blocks_keep_their_language_and_lose_their_indentation():
    blocks = blocks_of("- a\n  ```Python title='x'\n  if x:\n      y()\n  ```\n- b\n  ~~~ bash\n  ls\n  ~~~\n")
    assert [(block.language, block.code) for block in blocks] == [("python", "if x:\n    y()\n"), ("bash", "ls\n")]


def test_a_response_goes_on_where_its_prelude_ends_or_stands_behind_it(pool):
    prompt = 'from typing import List\nimport math\n\ndef add(a: List, b):\n    """Add."""\n'
    reference = json.dumps({"tests": "def check(f):\n    assert f(1, 2) == 3", "entry_point": "add", "prelude": prompt})
    assert graded(pool, "    return a + b\n", reference).correct
    assert graded(pool, "    return a + b\n```\nThat is all.", reference).correct
    assert graded(pool, "    return a + b\n\nprint(add(input(), 2)", reference).correct  # what follows is cut off
    assert graded(pool, f"{FENCE}def add(a, b):\n    return math.floor(a + b)\n```", reference).correct
    assert not graded(pool, "    return a\n", reference).correct
    assert graded(pool, "It adds.", reference) == Grade(False, NO_PROGRAM)
    bare = json.dumps({"tests": TEST, "prelude": "import math\ndef add(a, b):"})  # a signature is no module by itself
    assert graded(pool, f"{FENCE}def add(a, b):\n    return math.floor(a + b)\n```", bare).correct
    assert graded(pool, "    return a + b", bare).correct
