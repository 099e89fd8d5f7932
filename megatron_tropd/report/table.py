"""The result of a run as a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from megatron_tropd.report.records import AFTER, BEFORE, DURING, TEACHER, Evaluation, distance_closed
from megatron_tropd.report.terminal import literal


def print_titled(console: Console, title: str, table: Table) -> None:
    """Print a table under its title, which within it would be wrapped to the table's width."""
    console.print(literal(title), style="italic", soft_wrap=True)
    console.print(table)


def print_accuracies(console: Console, evaluations: Sequence[Evaluation]) -> None:
    """Print what ``accuracy_table`` holds."""
    print_titled(console, "Accuracy on held-out problems, % [95 % interval]", accuracy_table(evaluations))


def accuracy_table(evaluations: Sequence[Evaluation]) -> Table:
    """Tabulate student before, student after and teacher, one column per suite, in percent with 95 % intervals."""
    suites = list(dict.fromkeys(evaluation.suite for evaluation in evaluations))
    found = {(evaluation.model, evaluation.suite): evaluation for evaluation in evaluations}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    for suite in suites:
        table.add_column(literal(suite), justify="right", no_wrap=True)
    named = (BEFORE, AFTER, TEACHER)
    # the student in mid-training is not a row; a directory of the same name, graded by itself, is
    during = {evaluation.model for evaluation in evaluations if evaluation.step is not None} & {DURING}
    others = [model for model in dict.fromkeys(e.model for e in evaluations) if model not in {*named, *during}]
    for model in (*named, *others):
        if any((model, suite) in found for suite in suites):
            table.add_row(literal(model), *(_cell(found.get((model, suite))) for suite in suites))
    left_out = [max((e.left_out for e in evaluations if e.suite == suite), default=0) for suite in suites]
    if any(left_out):
        table.add_section()
        table.add_row("problems left out", *(str(count) for count in left_out))
    closed = [distance_closed(evaluations, suite) for suite in suites]
    if any(share is not None for share in closed):
        table.add_section()
        table.add_row("distance closed", *("-" if share is None else f"{share:.0%}" for share in closed), style="bold")
    return table


def _cell(evaluation: Evaluation | None) -> str:
    if evaluation is None:
        return "-"
    accuracy, low, high = (100 * value for value in (evaluation.accuracy, evaluation.low, evaluation.high))
    return f"{accuracy:.1f} \\[{low:.1f}, {high:.1f}]"
