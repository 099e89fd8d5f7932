"""A row of data, or an answer of a model, that is made to break or to delay whatever reads it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from tests.support.attacks import Attack, Hole


def _choice(text: str) -> Callable[[Path], str]:
    def attempt(directory: Path) -> str:
        from megatron_tropd.evaluate.rules import grade

        began = time.process_time()
        right = grade("choice", text, "B")
        spent = time.process_time() - began
        if spent > 2.0:
            raise Hole(f"{spent:.1f} s")
        return f"graded {'right' if right else 'wrong'} within 2 s"

    return attempt


ATTACKS = (
    Attack(name="the grader `choice` on 320,000 line breaks", attempt=_choice("answer" + "\n" * 320_000 + "!")),
    Attack(name="the same on `answer is` 32,000 times", attempt=_choice("answer is " * 32_000)),
)
