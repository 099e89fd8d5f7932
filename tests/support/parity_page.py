"""The tables of docs/correctness.md: made from what ``parity`` measures, and read back to be checked against it.

A number on the page is a measured error rounded up to 1, 2 or 5 times a power of ten. Another machine rounds elsewhere,
so a page still holds when nothing measured is more than SLACK times what it says.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

from tests.support.parity import CELLS, COINCIDENCES, MASSES, WORLDS, low_precision_ratios, measured, plain_errors
from tests.support.parity_problems import LOW_PRECISION, PROBLEMS, REPLICATED

SLACK = 3.0
Rows = dict[tuple[str, ...], list[list[float]]]  # the words of a row -> the numbers of its columns


def objectives() -> Rows:
    """By objective: (hidden, weight) errors at each tensor-parallel size, then the bf16 ratios at each."""
    rows: Rows = {}
    ratios = {world: low_precision_ratios(world) for world in WORLDS}
    for cell in CELLS:
        columns = [worst(tensor, lambda row, _, cell=cell: row == cell.row) for tensor in WORLDS]
        rows[tuple(cell.row.split(" | "))] = [*columns, [ratios[world].get(cell.row, 0.0) for world in WORLDS]]
    return rows


def cases() -> Rows:
    """By case: (hidden, weight) errors at each tensor-parallel size, then those of plain autograd in fp32."""
    rows: Rows = {}
    for problem in (*PROBLEMS, *REPLICATED):
        columns = [worst(tensor, lambda _, name, problem=problem: name == problem.name) for tensor in WORLDS]
        plain = plain_errors(problem).values()
        rows[(problem.name,)] = [*columns, [max(pair[i] for pair in plain) for i in (0, 1)]]
    return rows


def worst(tensor: int, wanted: Callable[[str, str], bool]) -> list[float]:
    """Over every measurement at that tensor-parallel size, bf16 aside; [] when there is none."""
    replicas = {problem.name: problem.replicas for problem in (*PROBLEMS, *REPLICATED)}
    pairs = [
        pair
        for world in WORLDS
        for (row, name), pair in measured(world).gradients.items()
        if name in replicas and world == tensor * replicas[name] and wanted(row, name)
    ]
    return [max(pair[i] for pair in pairs) for i in (0, 1)] if pairs else []


def tails() -> Rows:
    """By mass outside the support: worst errors over all sizes of the mass, its two gradients, and of 1 - sum."""
    return {
        (f"{mass:.0e}",): [[max(measured(world).tails[mass][i] for world in WORLDS)] for i in range(4)]
        for mass in MASSES
    }


def coincidences() -> Rows:
    return {(f"`{name}`",): [[measured(world).coincidences[name]] for world in WORLDS] for name in COINCIDENCES}


TABLES: dict[str, tuple[Callable[[], Rows], Sequence[str]]] = {
    "objectives": (objectives, ("term", "support", "tail", "TP 1", "TP 2", "TP 4", "bf16 / plain bf16, TP 1, 2, 4")),
    "cases": (cases, ("case", "TP 1", "TP 2", "TP 4", "plain fp32")),
    "tails": (tails, ("mass outside", "the mass", "hidden gradient", "weight gradient", "the mass as `1 - sum`")),
    "coincidences": (coincidences, ("methods", "TP 1", "TP 2", "TP 4")),
}

# --------------------------------------------------------------------------- writing


def rounded_up(value: float) -> str:
    """To 1, 2 or 5 times a power of ten; ratios near 1 to the next tenth."""
    if value == 0.0:
        return "0"
    if 0.1 <= value < 10.0:
        return f"{math.ceil(value * 10 - 1e-9) / 10:.1f}"
    power = 10.0 ** math.floor(math.log10(value))
    digit = next(d for d in (1, 2, 5, 10) if value <= d * power * (1 + 1e-9))
    return f"{digit * power:.0e}".replace("e-0", "e-").replace("e+0", "e")


def table(name: str) -> str:
    make, header = TABLES[name]
    return rendered(make(), header)


def rendered(rows: Rows, header: Sequence[str]) -> str:
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for words, columns in rows.items():
        numbers = [", ".join(rounded_up(x) for x in column) or "-" for column in columns]
        lines.append(f"| {' | '.join([*words, *numbers])} |")
    return "\n".join(lines)


def with_table(text: str, name: str, content: str) -> str:
    """The page with what stands between its marks of that name replaced."""
    pattern = re.compile(rf"(<!-- table: {name} -->\n).*?(\n<!-- end -->)", re.DOTALL)
    text, count = pattern.subn(lambda match: match[1] + content + match[2], text)
    assert count == 1, f"the page has {count} places for the table {name}"
    return text


# --------------------------------------------------------------------------- reading


def lines_of(text: str, name: str) -> list[list[str]]:
    """The cells of every row of a table on the page, its header left out."""
    found = re.search(rf"<!-- table: {name} -->\n(.*?)\n<!-- end -->", text, re.DOTALL)
    assert found, f"the page has no table {name}"
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in found[1].splitlines()[2:]]


def stale(text: str, name: str) -> list[str]:
    """What the table says that is not so any more."""
    make, header = TABLES[name]
    return differences(text, name, make(), header)


def differences(text: str, name: str, measured_rows: Rows, header: Sequence[str]) -> list[str]:
    """What the table of that name says other than what was measured."""
    words = len(next(iter(measured_rows)))
    page = {tuple(line[:words]): line[words:] for line in lines_of(text, name)}
    if page.keys() != measured_rows.keys():
        return [f"rows {page.keys() ^ measured_rows.keys()} are not on both"]
    return [
        f"{name}, {' '.join(row)}, {header[words + i]}: measured {column}, the page says {page[row][i]}"
        for row, columns in measured_rows.items()
        for i, column in enumerate(columns)
        if not holds(page[row][i], column)
    ]


def holds(cell: str, numbers: Sequence[float]) -> bool:
    claimed = [] if cell == "-" else [float(part) for part in cell.split(",")]
    return len(claimed) == len(numbers) and all(x <= SLACK * y for x, y in zip(numbers, claimed, strict=True))


assert {p.name for p in LOW_PRECISION}.isdisjoint(p.name for p in (*PROBLEMS, *REPLICATED))
