"""Numbers of data files are the numbers they are, in JSON, Parquet and templates; NaN is a missing value."""

from __future__ import annotations

from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_tropd.data.cells import cell_text, is_missing
from megatron_tropd.data.files import read_rows
from megatron_tropd.data.templates import row_template


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.00001, "0.00001"), (1e22, "1" + "0" * 22), (1e16, "1" + "0" * 16), (-2.5e-7, "-0.00000025"), (3, "3"),
        (10**30, "1" + "0" * 30), (0.1, "0.1"), (3.0, "3.0"), (Decimal("1E+3"), "1000"), (Decimal("0.10"), "0.10"),
        ("1e-05", "1e-05"), (float("inf"), "inf"),
    ],
)  # fmt: skip
def test_a_number_is_written_with_all_its_digits(value, text):
    assert cell_text(value) == text


def answers(path: Path) -> list[object]:
    return [row.content.get("answer") for row in read_rows(path, columns=None) if isinstance(row.content, dict)]


def test_numbers_of_files_keep_their_digits_and_nan_is_none(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"answer": 0.00001}\n{"answer": NaN}\n{"answer": 10000000000000000000000}\n')
    assert answers(tmp_path / "a.jsonl") == [0.00001, None, 10**22]
    narrow = pa.array([0.1, None, float("nan"), 16777216.0], pa.float32())
    pq.write_table(pa.table({"answer": narrow}), tmp_path / "b.parquet")
    assert answers(tmp_path / "b.parquet") == [0.1, None, None, 16777216.0]
    wide = pa.array([1e16, float("nan"), 0.1], pa.float64())
    pq.write_table(pa.table({"answer": wide, "half": pa.array([0.1, 0.2, 0.3], pa.float16())}), tmp_path / "c.parquet")
    assert answers(tmp_path / "c.parquet") == [1e16, None, 0.1]
    halves = [row.content["half"] for row in read_rows(tmp_path / "c.parquet", columns=None)]
    assert halves == pytest.approx([0.1, 0.2, 0.3], abs=1e-4)
    exact = pa.array([Decimal("1.50"), None], pa.decimal128(10, 2))
    pq.write_table(pa.table({"answer": exact}), tmp_path / "d.parquet")
    assert answers(tmp_path / "d.parquet") == [Decimal("1.50"), None]


def test_templates_show_numbers_plainly_and_still_reckon_with_them():
    shown = row_template("{{ x }} {{ x + 1 }} {{ n }} {{ 'ABC'[n] }}").render({"x": 1e-5, "n": 2})
    assert shown == "0.00001 1.00001 2 C"


def test_missing_values_are_none_and_nan_alone():
    assert is_missing(None) and is_missing(float("nan")) and is_missing(Decimal("nan"))
    assert not is_missing(0) and not is_missing("") and not is_missing("nan") and not is_missing(float("inf"))
