"""Sampled answers on a terminal, colored by region and gate; where there are no colors, in brackets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.console import Console
from rich.text import Text

from megatron_tropd.errors import printable
from megatron_tropd.progress.phases import heard
from megatron_tropd.report.records import Sample, SampleToken
from megatron_tropd.report.terminal import literal

MOST_TOKENS = 400  # shown of one answer
_MOST_OF_PROMPT = 600  # characters, of its end
# style, and the brackets that stand for it in a log file
STYLES = {
    "prefix": ("italic magenta", "{}"),
    "trusted": ("green", ""),
    "outlier": ("bold red underline", "[]"),
    "observation": ("dim", "()"),
    "plain": ("", ""),
}


def kind_of(token: SampleToken) -> str:
    """Name the style of a token: its region, and of the student's own what the gate says."""
    if token.region != "continuation":
        return token.region
    return "plain" if token.trusted is None else "trusted" if token.trusted else "outlier"


def sample_text(sample: Sample, *, colored: bool) -> Text:
    """Write out an answer; runs of tokens of one kind have one style, or one pair of brackets."""
    text = Text()
    for kind, run in groupby(sample.tokens[:MOST_TOKENS], key=kind_of):
        style, brackets = STYLES[kind]
        words = printable("".join(token.text for token in run))
        if not colored and brackets:
            words = f"{brackets[0]}{words}{brackets[1]}"
        text.append(words, style=style if colored else "")
    left = len(sample.tokens) - MOST_TOKENS
    if left > 0:
        text.append(f" ... {left:,} more tokens")
    return text


def print_samples(samples: Sequence[Sample], *, step: int, console: Console | None = None) -> None:
    """Print answers that a step learns from, under their prompt and a line that says what the colors mean."""
    console = console or Console()
    colored = console.is_terminal and not console.no_color
    heard()
    for sample in samples[:1]:
        console.print(_heading(step, samples, colored=colored), soft_wrap=True)
        start = "... " if len(sample.prompt) > _MOST_OF_PROMPT else ""
        console.print(literal(f"prompt: {start}{sample.prompt[-_MOST_OF_PROMPT:]}"), soft_wrap=True)
    for sample in samples:
        graded = "" if sample.correct is None else ", correct" if sample.correct else ", wrong"
        guided = any(token.region == "prefix" for token in sample.tokens)
        name = literal(f"{'guided' if guided else 'on its own'}{graded}: ")
        console.print(name + sample_text(sample, colored=colored), soft_wrap=True)


def _heading(step: int, samples: Sequence[Sample], *, colored: bool) -> Text:
    """Name the step, and the kinds that occur."""
    return Text(f"step {step}, ") + Text(", ").join(_kinds(samples, colored=colored))


def _kinds(samples: Sequence[Sample], *, colored: bool) -> Iterator[Text]:
    there = {kind_of(token) for sample in samples for token in sample.tokens}
    for kind, (style, brackets) in STYLES.items():
        if kind in there:
            yield Text(kind, style=style) if colored else Text(brackets[:1] + kind + brackets[1:])
