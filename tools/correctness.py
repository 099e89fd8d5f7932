"""Measures every gradient again and writes the tables of docs/correctness.md: ``python tools/correctness.py``.

About a minute of processor time. What a table says is in ``tests/parity_page.py``.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))


def main() -> None:
    """Replaces what stands between the marks of each table."""
    from parity_page import TABLES, table, with_table

    page = ROOT / "docs" / "correctness.md"
    text = page.read_text(encoding="utf-8")
    for name in TABLES:
        text = with_table(text, name, table(name))
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":  # the ranks import this file again
    main()
