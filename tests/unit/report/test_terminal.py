"""What names, models and servers say reaches terminal, log and page as characters, never as commands."""

from __future__ import annotations

import io
import logging
import warnings

import pytest
from rich.console import Console

from megatron_tropd import cli
from megatron_tropd.errors import ConfigError, DataError, printable
from megatron_tropd.report.html import write_report
from megatron_tropd.report.records import (
    AnswerRecord,
    Evaluation,
    Sample,
    SampleToken,
    read_samples,
    record_answers,
    record_samples,
)
from megatron_tropd.report.sinks import read_jsonl
from megatron_tropd.report.table import accuracy_table
from megatron_tropd.report.terminal import say

HOSTILE = "a\x1b[2J\x9b31m\x07\r\u202eb\ud800[lr=0.1][/]:bomb:\u200b\x00"
SHOWN = "a\\x1b[2J\\x9b31m\\x07\\r\\u202eb\\ud800[lr=0.1][/]:bomb:\\u200b\\x00"


def test_control_characters_are_written_as_escapes_and_all_other_text_as_it_is():
    assert printable(HOSTILE) == SHOWN
    for text in ("two\nlines\tof text", "\u00fcber 5\u00a0\u20ac \u6f22\u5b57\u3000 \U0001f600", ""):
        assert printable(text) == text


@pytest.mark.parametrize("kind", [ConfigError, DataError])
def test_an_error_quotes_nothing_raw(kind):
    assert str(kind(f"{HOSTILE} is wrong.\nMend it.")) == f"{SHOWN} is wrong.\nMend it."


def test_a_line_for_the_terminal_is_neither_markup_nor_a_picture():
    out = io.StringIO()
    say(f"run {HOSTILE} has ended", console=Console(file=out, width=300, force_terminal=False))
    assert out.getvalue() == f"run {SHOWN} has ended\n"


def test_a_suite_with_brackets_in_its_name_has_a_column():
    result = Evaluation(
        model="m[red]", suite="T [lr=0.1]", accuracy=0.5, low=0.4, high=0.6, problems=2, samples=1, mean_length=3.0
    )
    out = io.StringIO()
    Console(file=out, width=300).print(accuracy_table([result]))
    assert "T [lr=0.1]" in out.getvalue() and "m[red]" in out.getvalue() and "50.0 [40.0, 60.0]" in out.getvalue()


def test_logs_and_warnings_are_printable(monkeypatch, capsys):
    record = logging.LogRecord("x", logging.WARNING, "f", 1, "lost a server: %s", (HOSTILE,), None)
    assert cli._PrintableFormatter("%(levelname)s: %(message)s").format(record) == f"WARNING: lost a server: {SHOWN}"
    monkeypatch.setattr(warnings, "showwarning", cli._show_warning)
    warnings.showwarning(UserWarning(HOSTILE), UserWarning, cli.__file__, 1)
    assert capsys.readouterr().err == f"WARNING: {SHOWN}\n"


def test_a_page_shows_the_escapes_of_what_a_model_wrote(tmp_path):
    sample = Sample(when="before", prompt="p\x1b[0m<b>", tokens=(SampleToken(text="t\x9b\ud800\n<i>"),), answer="\x07")
    record_samples(tmp_path, [sample])
    page = write_report(tmp_path).read_text(encoding="utf-8")
    assert "p\\x1b[0m&lt;b&gt;" in page and "t\\x9b\\ud800\n&lt;i&gt;" in page
    assert not [c for c in page if (ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160]


def test_half_a_character_in_any_column_loses_nothing_that_is_written(tmp_path):
    half = "x\ud83dy"
    answer = AnswerRecord(
        problem=0, sample=0, prompt=half, reference=half, answer=half, correct=True, note=half, finished=True, tokens=1
    )
    path = record_answers(tmp_path, model=half, suite=half, answers=[answer])
    (row,), torn = read_jsonl(path)
    assert (row["prompt"], row["reference"], row["answer"], row["note"], torn) == (half, half, half, half, False)
    sample = Sample(when="before", prompt=half, tokens=(SampleToken(text=half),), answer=half)
    record_samples(tmp_path, [sample])
    assert read_samples(tmp_path) == [sample]
    assert write_report(tmp_path).read_text(encoding="utf-8").count("x\\ud83dy") >= 3
