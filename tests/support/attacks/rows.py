"""A row of data, or an answer of a model, that is made to break or to delay whatever reads it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support.attacks import Attack, Hole

_HALF = "half \ud83d a character"
_CHAT = (  # rendered apart, for the product
    "{% for m in messages %}{{ m.role + ': ' + m.content }}{% if m.tool_calls %}{{ m.tool_calls|tojson }}{% endif %}"
    "{% endfor %}{% if tools %}{{ tools|tojson }}{% endif %}{{ 'answer: ' * 1 }}"
)
_COLUMNS: dict[str, Any] = {
    "prompt": _HALF,
    "answer": _HALF,
    "response": _HALF,
    "prompt, messages": [{"role": "user", "content": _HALF}],
    "prompt, role": [{"role": _HALF, "content": "x"}],
    "prompt, a tool": [{"role": "user", "content": "x", "tool_calls": [{"name": _HALF}]}],
    "tools": [{"type": "function", "function": {"name": _HALF}}],
    "a column that nothing reads": _HALF,
}
_MOST_S = 2.0  # of processor time, for what is graded in place


def _one_row(column: str) -> Callable[[Path], str]:
    """Read three rows, of which the second has half a character in one column."""

    def attempt(directory: Path) -> str:
        from megatron_tropd.data.prompts import read_sources
        from megatron_tropd.data.rows import Source
        from megatron_tropd.data.tokenizer import load_tokenizer
        from tests.support.chat_families import save_byte_tokenizer

        tokenizer = load_tokenizer(save_byte_tokenizer(directory / "model", template=_CHAT))
        rows = [{"prompt": f"question {number}", "answer": "3", "response": "so"} for number in range(3)]
        rows[1][column.partition(",")[0]] = _COLUMNS[column]
        (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        reading = read_sources([Source(paths=(directory / "rows.jsonl",))], tokenizer, on_bad_row="skip")
        found = [prompt.index for prompt in reading.prompts]
        if found not in ([0, 2], [0, 1, 2]):
            raise Hole(f"of the rows 0, 1, 2 there are {found}")
        return "that row was left out" if found == [0, 2] else "read as it is"

    return attempt


def _written(directory: Path) -> str:
    """Record answers and samples with half a character everywhere, and write the page of the run."""
    from megatron_tropd.report.html import write_report
    from megatron_tropd.report.records import AnswerRecord, Sample, SampleToken, record_answers, record_samples

    answer = AnswerRecord(
        problem=0,
        sample=0,
        prompt=_HALF,
        reference=_HALF,
        answer=_HALF,
        correct=False,
        note=_HALF,
        finished=True,
        tokens=1,
    )
    lines = record_answers(directory, model=_HALF, suite=_HALF, answers=[answer, answer]).read_text().splitlines()
    record_samples(directory, [Sample(when="before", prompt=_HALF, tokens=(SampleToken(text=_HALF),), answer=_HALF)])
    page = write_report(directory).read_text(encoding="utf-8")
    if [json.loads(line)["answer"] for line in lines] != [_HALF, _HALF] or "half \\ud83d a" not in page:
        raise Hole("it is not what was written")
    return "all is written, as escapes"


def _graded(kind: str, text: str, answer: str = "B") -> Callable[[Path], str]:
    def attempt(directory: Path) -> str:
        from megatron_tropd.evaluate.rules import grade

        began = time.process_time()
        right = grade(kind, text, answer)
        spent = time.process_time() - began
        if spent > _MOST_S:
            raise Hole(f"{spent:.1f} s")
        return f"graded {'right' if right else 'wrong'} in less than {_MOST_S:g} s"

    return attempt


def _limited(kind: str, text: str, answer: str) -> Callable[[Path], str]:
    """Grade what may take for ever, with a second to do it in, and then something else in the same pool."""

    def attempt(directory: Path) -> str:
        from megatron_tropd.evaluate.grader_pool import GraderPool, Item
        from megatron_tropd.evaluate.rules import GradingRule

        pool = GraderPool(workers=1)
        try:
            rule = GradingRule(kind=kind, seconds=1.0)
            fine = Item(rule=GradingRule(kind=kind, seconds=60.0), response="3", answer="3")
            pool.grade([fine])  # the worker has started
            began = time.monotonic()
            hostile, after = pool.grade([Item(rule=rule, response=text, answer=answer), fine])
            if not after.correct or hostile.correct:
                raise Hole(f"{hostile}, then {after}")
            return f"{hostile.note or 'wrong'}, after {time.monotonic() - began:.1f} s; the next one was graded"
        finally:
            pool.close()

    return attempt


ATTACKS = (
    *(Attack(name=f"half a character in {column}", attempt=_one_row(column)) for column in _COLUMNS),
    Attack(name="half a character in answers, samples and the names of models", attempt=_written),
    Attack(name="`choice` on 320,000 line breaks", attempt=_graded("choice", "answer" + "\n" * 320_000 + "!")),
    Attack(name="`choice` on `answer is` 32,000 times", attempt=_graded("choice", "answer is " * 32_000)),
    Attack(name="`final_number` on 320,000 marks", attempt=_graded("final_number", "#### " * 64_000, "3")),
    Attack(
        name="`final_number` on a number of 320,000 digits",
        attempt=_graded("final_number", "#### " + "1" * 320_000, "3"),
    ),
    Attack(name="`exact` on 10 MB of spaces", attempt=_graded("exact", " " * 10_000_000, "3")),
    Attack(
        name="`regex`, an expression that goes back", attempt=_limited("regex", "a" * 40 + "!", "(a+)+$"), quick=False
    ),
    Attack(name="`math`, a tower of powers", attempt=_limited("math", r"\boxed{9^{9^{9^{9^9}}}}", "3"), quick=False),
    Attack(name="`math`, 100,000 braces", attempt=_limited("math", r"\boxed{" + "{" * 100_000, "3"), quick=False),
)
