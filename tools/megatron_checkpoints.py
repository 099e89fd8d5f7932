"""Print the table of docs/conversion.md: checkpoints that plain megatron-core wrote, read under two other layouts.

    python tools/megatron_checkpoints.py            # two minutes; --update writes it into the page

The tests recheck some rows of it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "conversion.md"
BEGIN, END = "<!-- megatron checkpoints -->\n", "<!-- /megatron checkpoints -->\n"
HEADER = (
    "| written by | model | under | layers | experts | names | bits | logits, TP 2 + SP | logits, PP 2 |\n"
    "|---|---|---|---|---|---|---|---|---|\n"
)


def main() -> None:
    sys.path.insert(0, str(ROOT))
    from tests.support.distributed import run_on_ranks
    from tests.support.megatron_reader import LAYOUTS, different_tensors, logit_error, read_all, save_models
    from tests.support.megatron_writer import CASES, row_of, write_all

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        save_models(root, CASES)
        run_on_ranks(write_all, folder, world_size=2, timeout_s=900)
        ranks = run_on_ranks(read_all, [case.name for case in CASES], folder, world_size=2, timeout_s=900)
        rows = []
        for case in CASES:
            bits = "equal" if not different_tensors(case, root) else "DIFFERENT"
            errors = [
                f"{logit_error([rank[f'{case.name} {layout}'] for rank in ranks], root / 'hf' / case.name):.0e}"
                for layout in LAYOUTS
            ]
            rows.append(f"| {row_of(case)} | {bits} | {' | '.join(errors)} |\n")
    table = HEADER + "".join(rows)
    print(table, end="")
    if "--update" in sys.argv:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + table + END + rest.partition(END)[2])


if __name__ == "__main__":  # the ranks import this file again
    main()
