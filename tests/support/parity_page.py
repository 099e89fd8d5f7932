"""The tables of docs/correctness.md: made from what ``parity`` measures, and read back to be checked against it.

Digits on the page are those of the machine that wrote it: measured errors, rounded up to 1, 2 or 5 times a power of 10.
Another machine adds up in another order, so they are compared with nothing. What is checked is the bound beside them,
which is computed from the inputs: how much the true gradient moves when every number of the inputs moves by a step of
fp32, times the steps that rounding may add up to (``roundings``), and never more than CONTRACT.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tests.support import estimators, precision
from tests.support.parity import (
    COINCIDENCES,
    MASSES,
    WORLDS,
    low_precision_ratios,
    measured,
    plain_errors,
    sensitivities,
    tail_sensitivities,
)
from tests.support.parity_cells import CELLS
from tests.support.parity_problems import LOW_PRECISION, PROBLEMS, REPLICATED, Problem

UNBIASED = 1e-12  # fp64: a few operations on seven numbers
CONTRACT = 1e-5  # no gradient errs by more, whatever its conditioning


@dataclass(frozen=True, kw_only=True)
class Line:
    """The numbers of a row: measured errors by column, one bound for all of these columns, and what is noted only."""

    found: list[list[float]]
    bound: list[float]
    noted: list[list[float]] = field(default_factory=list)


Rows = Mapping[tuple[str, ...], Line]  # by the words of a row


def roundings(terms: int) -> float:
    """Steps that the sum of so many terms is off by: each addition rounds by half a step at most, up or down."""
    return math.sqrt(terms) / 2


# the longest way of a number here: a logit over 9 columns, a row over 37 ids, the weights' gradient over 17 tokens
ROUNDED = math.ceil(roundings(9 + 37 + 17))
PEAKED = math.ceil(roundings(41 + 37 + 17))  # the same of the problems of the log tail


def bound_of(sensitivity: float, steps: float = ROUNDED) -> float:
    return min(steps * sensitivity, CONTRACT)


def objectives() -> Rows:
    """By objective: (hidden, weight) errors at each tensor-parallel size, then the bf16 ratios at each."""
    rows: dict[tuple[str, ...], Line] = {}
    ratios = {world: low_precision_ratios(world) for world in WORLDS}
    for cell in CELLS:
        columns = [worst(tensor, lambda row, _, cell=cell: row == cell.row) for tensor in WORLDS]
        moved = [sensitivities(problem)[cell.row] for problem in (*PROBLEMS, *REPLICATED)]
        rows[tuple(cell.row.split(" | "))] = Line(
            found=columns,
            bound=[bound_of(max(pair[i] for pair in moved)) for i in (0, 1)],
            noted=[[ratios[world].get(cell.row, 0.0) for world in WORLDS]],
        )
    return rows


def cases() -> Rows:
    """By case: (hidden, weight) errors at each tensor-parallel size, then those of plain autograd in fp32."""
    rows: dict[tuple[str, ...], Line] = {}
    for problem in (*PROBLEMS, *REPLICATED):
        columns = [worst(tensor, lambda _, name, problem=problem: name == problem.name) for tensor in WORLDS]
        plain, moved = plain_errors(problem).values(), sensitivities(problem).values()
        rows[(problem.name,)] = Line(
            found=columns,
            bound=[bound_of(max(pair[i] for pair in moved)) for i in (0, 1)],
            noted=[[max(pair[i] for pair in plain) for i in (0, 1)]],
        )
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
    """By mass outside the support: worst errors over all sizes of the mass and its two gradients, and of 1 - sum."""
    rows: dict[tuple[str, ...], Line] = {}
    for mass in MASSES:
        found = [max(measured(world).tails[mass][i] for world in WORLDS) for i in range(4)]
        rows[(f"{mass:.0e}",)] = Line(found=[found[:3]], bound=tail_bounds(mass), noted=[found[3:]])
    return rows


def tail_bounds(mass: float) -> list[float]:
    """Of the mass, its hidden and weight gradient.

    The mass is told by its log, whose rounding is relative to the log: where that is large, more than CONTRACT.
    """
    step = 2.0**-23 * abs(math.log(mass))
    return [max(PEAKED * step, CONTRACT), *(bound_of(moved, PEAKED) for moved in tail_sensitivities(mass))]


# what errs where two ways of computing differ; the others make the same steps in the same order
OBJECTIVE = {
    "local_support(k=V) = rkl": "rkl_full | - | -",
    "fkl(form=topk, tail=bucket, k=V) = fkl": "fkl_full | - | -",
    "rkl(form=topk, tail=bucket, k=V) = rkl": "rkl_full | - | -",
    "exopd(lam=1) = opd": "k1_pg | - | -",
}
# a gate drawn at 1001 points even: each token's share is off by half a draw at most, 5e-4 of the difference between its
# two losses, which is at most twice as large as the larger
DRAWN = "tropd_soft = mean of tropd over 1001 draws of the gate"


def coincidence_bound(name: str) -> float:
    if name == DRAWN:
        return 1e-3
    if name not in OBJECTIVE:
        return 0.0
    moved = max(sensitivities(Problem(name="coincidence"))[OBJECTIVE[name]])
    return bound_of(2 * moved)  # both sides err


def coincidences() -> Rows:
    return {
        (f"`{name}`",): Line(
            found=[[measured(world).coincidences[name]] for world in WORLDS], bound=[coincidence_bound(name)]
        )
        for name in COINCIDENCES
    }


def precisions() -> Rows:
    """By KL, in bf16: errors of log q(y) and of three divergences' gradients at each size, then plain autograd's."""
    ours, plain = [precision.measured(world) for world in precision.WORLDS], precision.of_plain_bf16()
    return {
        (f"{kl:.0e}" if kl < 1.0 else "1",): Line(
            found=[budget[kl].numbers for budget in ours],
            bound=[precision.LOGPROB_LIMIT, *(precision.GRADIENT_LIMIT for _ in precision.KINDS)],
            noted=[plain[kl].numbers],
        )
        for kl in precision.KLS
    }


def estimators_of_reverse_kl() -> Rows:
    """By estimator and preset: its error where it is unbiased, its bias either way, its covariance beside k1_pg's.

    Errors and biases are on policy, then on reused rollouts.
    """
    rows: dict[tuple[str, ...], Line] = {}
    sampled = estimators.judged("`k1_pg` | `opd`").covariance
    for name in estimators.ESTIMATORS:
        judged = estimators.judged(name)
        biases = [judged.bias, judged.reused_bias]
        exact = [bias for bias in biases if bias < UNBIASED]
        noise = judged.covariance / sampled
        rows[tuple(name.split(" | "))] = Line(
            found=[exact],
            bound=[UNBIASED] * len(exact),
            noted=[[bias if bias >= UNBIASED else 0.0 for bias in biases], [noise if noise > UNBIASED else 0.0]],
        )
    return rows


TABLES: dict[str, tuple[Callable[[], Rows], Sequence[str]]] = {
    "objectives": (
        objectives,
        ("term", "support", "tail", "TP 1", "TP 2", "TP 4", "checked", "bf16 / plain bf16, TP 1, 2, 4"),
    ),
    "cases": (cases, ("case", "TP 1", "TP 2", "TP 4", "checked", "plain fp32")),
    "tails": (tails, ("mass outside", "the mass, hidden, weight gradient", "checked", "the mass as `1 - sum`")),
    "estimators": (
        estimators_of_reverse_kl,
        ("term", "preset", "error where unbiased", "checked", "bias on policy, reused", "covariance / `k1_pg`'s"),
    ),
    "precision": (precisions, ("KL, nats", "TP 1", "TP 2", "checked", "plain bf16")),
    "coincidences": (coincidences, ("methods", "TP 1", "TP 2", "TP 4", "checked")),
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
    lines += [f"| {' | '.join([*words, *cells(line)])} |" for words, line in rows.items()]
    return "\n".join(lines)


def cells(line: Line) -> list[str]:
    """The measured, the bound, the noted."""
    found, noted = ([numbers(column) for column in columns] for columns in (line.found, line.noted))
    return [*found, "≤ " + numbers(line.bound), *noted]


def numbers(column: Sequence[float]) -> str:
    return ", ".join(rounded_up(x) for x in column) or "-"


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


def differences(text: str, name: str, rows: Rows, header: Sequence[str]) -> list[str]:
    """Where the table of that name lacks something, has another bound than is computed, or one that is not kept."""
    words = len(next(iter(rows)))
    page = {tuple(line[:words]): line[words:] for line in lines_of(text, name)}
    if page.keys() != rows.keys():
        return [f"rows {page.keys() ^ rows.keys()} are not on both"]
    return [
        f"{name}, {' '.join(row)}, {header[words + i]}: {complaint}"
        for row, line in rows.items()
        for i, complaint in complaints(page[row], line)
    ]


def complaints(on_page: Sequence[str], line: Line) -> list[tuple[int, str]]:
    """By column: digits missing, or above the row's bound, here or on the page; a bound other than the computed one."""
    columns, place_of_bound = [*line.found, line.bound, *line.noted], len(line.found)
    on_page = [cell.removeprefix("≤ ") for cell in on_page]
    claims = [read(cell) for cell in on_page]
    if [len(claim) for claim in claims] != [len(column) for column in columns]:
        return [(place_of_bound, f"measured {columns}, the page says {on_page}")]
    bound = claims[place_of_bound]
    answer = [
        (i, f"measured {column}, the page says {on_page[i]} and at most {on_page[place_of_bound]}")
        for i, column in enumerate(line.found)
        if not (within(column, bound) and within(claims[i], bound))
    ]
    if not all(neighbors(x, y) for x, y in zip(bound, line.bound, strict=True)):
        answer.append((place_of_bound, f"computed {numbers(line.bound)}, the page says {on_page[place_of_bound]}"))
    return answer


def within(column: Sequence[float], bound: Sequence[float]) -> bool:
    return not column or all(x <= y for x, y in zip(column, bound, strict=True))


def read(cell: str) -> list[float]:
    return [] if cell == "-" else [float(part) for part in cell.split(",")]


def neighbors(claimed: float, computed: float) -> bool:
    """A bound is written as 1, 2 or 5 times a power of ten, and its last digit may be another elsewhere."""
    if computed == 0.0 or claimed == 0.0:
        return claimed == computed
    return abs(place(claimed) - place(float(rounded_up(computed)))) <= 1


def place(value: float) -> int:
    """In the series ..., 1, 2, 5, 10, 20, ..."""
    power = math.floor(math.log10(value) + 1e-9)
    return 3 * power + (1, 2, 5).index(round(value / 10.0**power))


assert {p.name for p in LOW_PRECISION}.isdisjoint(p.name for p in (*PROBLEMS, *REPLICATED))
