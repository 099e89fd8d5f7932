"""The same training under any layout: what docs/correctness.md says of it, repeated for a row of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.invariance import HEADER, QUICK, ROWS, layouts
from tests.support.parity_page import Rows, differences, lines_of, read, rendered, with_table

PAGE = Path(__file__).resolve().parents[2] / "docs" / "correctness.md"


@pytest.fixture(scope="module")
def measured() -> Rows:
    return layouts(QUICK)


def test_gradients_losses_norms_and_weights_are_those_of_one_rank(measured):
    worst = {words: max(error for column in line.found for error in column) for words, line in measured.items()}
    assert {words: error for words, error in worst.items() if not error < 1e-5} == {}
    # the comparison sees something: sums are made in another order
    assert all(error > 0 for error in worst.values())


def test_the_page_says_what_is_measured(measured):
    page = PAGE.read_text(encoding="utf-8")
    lines = [line for line in lines_of(page, "layouts") if tuple(line[:2]) in measured]
    header = rendered({}, HEADER)
    shown = "\n".join([header, *(f"| {' | '.join(line)} |" for line in lines)])
    assert differences(with_table(page, "layouts", shown), "layouts", measured, HEADER) == []


def test_the_page_has_every_layout_and_none_is_off_by_more_than_1e_5():
    lines = lines_of(PAGE.read_text(encoding="utf-8"), "layouts")
    assert [tuple(line[:2]) for line in lines] == [row.words for row in ROWS]
    numbers = [number for line in lines for cell in line[2:] for number in read(cell.removeprefix("≤ "))]
    assert len(numbers) == sum(3 if row.distributed_optimizer else 4 for row in ROWS) * len(HEADER[2:])
    assert max(numbers) <= 1e-5
