"""Attack the program and print what became of it: ``python tools/attack.py [--quick] [KIND ...]``.

Kinds are the modules of ``tests/support/attacks``; without names, all of them. Ends with status 1 when an attack got
through. ``--quick`` takes those that the suite tries as well.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def main() -> int:
    """Print one table per kind."""
    from tests.support.attacks import KINDS, attacks_of, attempt, table

    given = sys.argv[1:]
    quick, kinds = "--quick" in given, [name for name in given if name != "--quick"]
    unknown = sorted(set(kinds) - set(KINDS))
    if unknown:
        print(f"no attacks of the kind {', '.join(unknown)}: there are {', '.join(KINDS)}.", file=sys.stderr)
        return 2
    held = True
    for kind in kinds or KINDS:
        attempts = [attempt(attack) for attack in attacks_of(kind, quick=quick)]
        print(table(kind, attempts), flush=True)
        held = held and all(one.held for one in attempts)
    return 0 if held else 1


if __name__ == "__main__":
    raise SystemExit(main())
