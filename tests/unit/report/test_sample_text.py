"""Answers on a terminal: each kind of token has its color, or its brackets, and no text moves the cursor."""

from __future__ import annotations

import io

from rich.console import Console

from megatron_tropd.report.records import Sample, SampleToken
from megatron_tropd.report.sample_text import MOST_TOKENS, print_samples, sample_text

TOKENS = (
    SampleToken(text="So ", region="prefix"),
    SampleToken(text="2+2", trusted=True, trust=0.9, log_ratio=0.1),
    SampleToken(text="=", trusted=True, trust=0.8, log_ratio=0.1),
    SampleToken(text="5", trusted=False, trust=0.0, log_ratio=-7.0),
    SampleToken(text=" ok", region="observation"),
)
SAMPLE = Sample(when="during", prompt="2+2?", tokens=TOKENS, correct=False)


def printed(*, terminal: bool) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal, width=40, color_system="standard")
    print_samples([SAMPLE], step=7, console=console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_log_file_has_brackets_and_no_escapes():
    lines = printed(terminal=False).splitlines()
    assert lines[0] == "step 7, {prefix}, trusted, [outlier], (observation)"
    assert lines[1:] == ["prompt: 2+2?", "guided, wrong: {So }2+2=[5]( ok)"]


def test_a_terminal_has_colors():
    text = printed(terminal=True)
    # SGR 3 and 35: italic magenta; 32: green; 1, 4 and 31: bold, underlined, red
    assert "\x1b[3;35mSo " in text and "\x1b[32m2+2=" in text and "\x1b[1;4;31m5" in text


def test_words_of_a_model_cannot_move_the_cursor_or_name_styles():
    nasty = Sample(when="during", prompt="", tokens=(SampleToken(text="\x1b[2J[red]:x:"),))
    assert sample_text(nasty, colored=True).plain == "\\x1b[2J[red]:x:"


def test_long_answers_are_cut_and_the_count_said():
    long = Sample(when="during", prompt="", tokens=(SampleToken(text="a"),) * (MOST_TOKENS + 3))
    assert sample_text(long, colored=False).plain == "a" * MOST_TOKENS + " ... 3 more tokens"
