"""Measures again and writes the tables of docs/correctness.md: ``python tools/correctness.py [NAME ...]``.

Without names, all of them. About a minute of processor time for the losses' tables, and more for ``layouts``, whose
rows run on up to eight processes. What a table says is in ``parity_page.py`` and
``invariance.py`` of ``tests/support``.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> None:
    """Replaces what stands between the marks of each table."""
    from tests.support.invariance import HEADER, layouts
    from tests.support.parity_page import TABLES, rendered, table, with_table

    tables = {name: partial(table, name) for name in TABLES}
    tables["layouts"] = lambda: rendered(layouts(), HEADER)
    page = ROOT / "docs" / "correctness.md"
    text = page.read_text(encoding="utf-8")
    for name in sys.argv[1:] or tables:
        text = with_table(text, name, tables[name]())
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":  # the ranks import this file again
    main()
