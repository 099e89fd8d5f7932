"""Speed and tightness of the packer: ``python -m megatron_tropd.benchmarks.packing [--sequences N] [--json PATH]``.

Compared on seeded long-tail lengths, for the assignment of sequences to packs (the part that is a bin-packing
problem): the compiled packer, its plain twin, and two pure-Python first-fit-decreasing packers: the classic scan over
all open packs, and a fair fast one with a tournament tree. Every figure is measured, none extrapolated. The time to
build the per-token arrays is given separately, for the compiled packer and its twin. Last, the whole of packing forests
(groups of 8 that share a prompt) beside that of packing the same sequences as if they shared nothing.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from megatron_tropd.data.packing import LINEAR_WORK, FlatSequences, backend, pack_flat, pack_work, shared_lengths
from megatron_tropd.data.packing import reference as packing_reference
from megatron_tropd.types import Int64Array, Region

try:
    from megatron_tropd import _C
except ImportError:  # no compiler at install time: its rows are left out
    _C = None  # type: ignore[assignment]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackingRow:
    """One measured packer."""

    name: str
    seconds: float  # median over the repetitions
    repetitions: int
    packs: int
    fill_of_bound: float  # lower bound / packs; 1 is provably optimal
    replica_imbalance: float | None = None  # heaviest replica's work / mean - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ForestRow:
    """Packs of sequences that share prompts, beside plain ones of the same sequences."""

    tokens: int
    rows: int  # that are computed
    plain_seconds: float  # of processor time, arrays included; least of the repetitions
    seconds: float
    packs: int
    fill: float  # rows / (packs * budget)
    imbalance: float  # heaviest replica's work / mean - 1

    @property
    def ratio(self) -> float:
        """Return how many times the processor time of plain packs it takes."""
        return self.seconds / self.plain_seconds


# --------------------------------------------------------------------------- the problem and its bound


def long_tail_lengths(count: int, *, max_tokens: int, seed: int = 0) -> Int64Array:
    """Draw lognormal lengths (median ``max_tokens / 32``, sigma 1), clipped to [2, max_tokens]: [count]."""
    draws = np.random.default_rng(seed).lognormal(math.log(max_tokens / 32), 1.0, count)
    return np.clip(draws, 2, max_tokens).astype(np.int64)


def grouped_sequences(count: int, *, group: int, max_tokens: int, seed: int = 0) -> FlatSequences:
    """Draw ``count`` sequences in groups that share a prompt: prompts and answers lognormal, half of the median each.

    A group's rows fit a pack, or nearly always do.
    """
    rng = np.random.default_rng(seed)
    prompts = np.clip(rng.lognormal(math.log(max_tokens / 64), 1.0, count // group), 1, max_tokens // 2)
    answers = np.clip(rng.lognormal(math.log(max_tokens / 64), 1.0, count), 1, max_tokens // 2).astype(np.int64)
    prompt_S = np.repeat(prompts.astype(np.int64), group)
    lengths = prompt_S + answers
    start_S = np.cumsum(lengths) - lengths
    at = np.arange(int(lengths.sum())) - np.repeat(start_S, lengths)
    in_prompt = at < np.repeat(prompt_S, lengths)
    tokens = rng.integers(0, 50_000, len(at))
    first_of_group = np.repeat(start_S[::group], group)
    tokens[in_prompt] = tokens[(np.repeat(first_of_group, lengths) + at)[in_prompt]]
    regions = np.where(in_prompt, Region.PROMPT, Region.CONTINUATION).astype(np.uint8)
    return FlatSequences(tokens=tokens, regions=regions, lengths=lengths, sequence_ids=np.arange(count))


def fewest_packs(lengths: Int64Array, capacity: int) -> int:
    """Lower bound L2 of Martello and Toth (1990): no packing has fewer packs.

    For a threshold a, sequences above C - a share a pack with none of length >= a, and those above C / 2 not with each
    other; those left of length >= a fits at best the room that the latter leave. The bound is the largest over a.
    """
    ascending = np.sort(lengths)
    sums = np.concatenate([[0], np.cumsum(ascending)])
    thresholds = np.concatenate([[0], np.unique(ascending[2 * ascending <= capacity])])
    above_half = np.searchsorted(ascending, capacity // 2, side="right")
    alone = np.searchsorted(ascending, capacity - thresholds, side="right")
    from_threshold = np.minimum(np.searchsorted(ascending, thresholds, side="left"), above_half)
    room = (alone - above_half) * capacity - (sums[alone] - sums[above_half])
    spill = sums[above_half] - sums[from_threshold] - room
    packs = (len(ascending) - above_half) + np.maximum(-(-spill // capacity), 0)
    return int(packs.max())


# --------------------------------------------------------------------------- pure-Python first-fit decreasing


def first_fit_scan(lengths: list[int], capacity: int) -> list[list[int]]:
    """Pack in the textbook form: every sequence, longest first, looks at the packs from the first on. O(n * packs)."""
    free: list[int] = []
    packs: list[list[int]] = []
    for sequence in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[sequence]
        for pack, room in enumerate(free):
            if room >= length:
                free[pack] = room - length
                packs[pack].append(sequence)
                break
        else:
            free.append(capacity - length)
            packs.append([sequence])
    return packs


def first_fit_tree(lengths: list[int], capacity: int) -> list[list[int]]:
    """Make the same packs through a tournament tree over the packs' room. O(n log n)."""
    size = 1 << (len(lengths) - 1).bit_length()
    room = [capacity] * (2 * size)  # room[i] = max of its two children; leaves are packs
    packs: list[list[int]] = [[] for _ in lengths]
    for sequence in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length, node = lengths[sequence], 1
        while node < size:
            node *= 2
            node += room[node] < length
        packs[node - size].append(sequence)
        room[node] -= length
        while node > 1:
            node //= 2
            largest = max(room[2 * node], room[2 * node + 1])
            if room[node] == largest:
                break
            room[node] = largest
    return [pack for pack in packs if pack]


# --------------------------------------------------------------------------- measurement


def _timed(run: Callable[[], Any], repetitions: int) -> tuple[float, Any]:
    """Return the median seconds and the last result."""
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        result = run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def _imbalance(lengths: Int64Array, order: Int64Array, pack_offsets: Int64Array, replicas: int) -> float:
    work = (lengths * (LINEAR_WORK + lengths))[order]
    per_pack = np.diff(np.concatenate([[0], np.cumsum(work)])[pack_offsets])
    per_replica = per_pack.reshape(replicas, -1).sum(axis=1)
    return float(per_replica.max() / per_replica.mean() - 1)


def measure_assignment(lengths: Int64Array, *, max_tokens: int, replicas: int, scan: bool) -> list[PackingRow]:
    """Time every packer on the same lengths; the first row is the one that ``pack`` runs."""
    bound = fewest_packs(lengths, max_tokens)
    ids = np.arange(len(lengths))
    rows = []
    for name, core, repetitions in (("compiled", _C, 15), ("plain twin", packing_reference, 5)):
        if core is None:
            continue
        assign: Callable[..., Any] = core.assign_packs
        seconds, (order, pack_offsets) = _timed(
            lambda assign=assign: assign(  # type: ignore[misc]
                lengths, ids, capacity=max_tokens, num_replicas=replicas, linear_work=LINEAR_WORK
            ),
            repetitions,
        )
        packs = len(pack_offsets) - 1
        rows.append(
            PackingRow(
                name=name,
                seconds=seconds,
                repetitions=repetitions,
                packs=packs,
                fill_of_bound=bound / packs,
                replica_imbalance=_imbalance(lengths, order, pack_offsets, replicas),
            )
        )
    listed = lengths.tolist()
    rivals = [("Python FFD, tree", first_fit_tree, 3)] + [("Python FFD, scan", first_fit_scan, 1)] * scan
    for name, first_fit, repetitions in rivals:
        seconds, result = _timed(lambda first_fit=first_fit: first_fit(listed, max_tokens), repetitions)  # type: ignore[misc]
        packs = len(result)
        rows.append(
            PackingRow(name=name, seconds=seconds, repetitions=repetitions, packs=packs, fill_of_bound=bound / packs)
        )
    return rows


def measure_build(lengths: Int64Array, *, max_tokens: int) -> dict[str, float]:
    """Return the median seconds to write all per-token arrays, per twin."""
    ids = np.arange(len(lengths))
    order, pack_offsets = packing_reference.assign_packs(
        lengths, ids, capacity=max_tokens, num_replicas=1, linear_work=LINEAR_WORK
    )
    starts = np.cumsum(lengths) - lengths
    prompt = np.maximum(lengths // 4, 1)
    regions = np.full(int(lengths.sum()), Region.CONTINUATION, np.uint8)
    regions[np.arange(len(regions)) - np.repeat(starts, lengths) < np.repeat(prompt, lengths)] = Region.PROMPT
    rows = np.stack([column[order] for column in (starts, lengths, ids)], axis=1)
    tokens = np.random.default_rng(0).integers(0, 150_000, int(lengths.sum()))
    twins: dict[str, Callable[..., Any]] = {"plain twin": packing_reference.build_stream}
    if _C is not None:
        twins = {"compiled": _C.build_stream, **twins}
    return {
        name: _timed(lambda build=build: build(tokens, regions, rows, pack_offsets, multiple_of=64), 5)[0]  # type: ignore[misc]
        for name, build in twins.items()
    }


def measure_forest(flat: FlatSequences, *, max_tokens: int, replicas: int, repetitions: int = 3) -> ForestRow:
    """Pack the same sequences with and without sharing, in turns."""
    seconds: dict[bool, float] = {False: math.inf, True: math.inf}
    for _ in range(repetitions):
        for share in seconds:
            start = time.process_time()
            found = pack_flat(flat, max_tokens=max_tokens, num_replicas=replicas, share_prefixes=share)
            seconds[share] = min(seconds[share], time.process_time() - start)
    packs = [one for own in found for one in own]
    rows = sum(int(one.cu_seqlens[len(one.sequence_ids)]) - int(shared_lengths(one).sum()) for one in packs)
    work = np.array([sum(pack_work(one) for one in own) for own in found])
    return ForestRow(
        tokens=len(flat.tokens),
        rows=rows,
        plain_seconds=seconds[False],
        seconds=seconds[True],
        packs=len(packs),
        fill=rows / (len(packs) * max_tokens),
        imbalance=float(work.max() / work.mean() - 1),
    )


def _print(console: Console, rows: list[PackingRow], *, title: str) -> None:
    table = Table(title=title, caption="FFD: first-fit decreasing in pure Python, assignment to packs only")
    for heading in ("packer", "runs", "time", "ratio", "packs", "bound/packs", "imbalance"):
        table.add_column(heading, justify="left" if heading == "packer" else "right")
    for row in rows:
        imbalance = "-" if row.replica_imbalance is None else f"{row.replica_imbalance:.4%}"
        table.add_row(
            row.name,
            str(row.repetitions),
            f"{row.seconds * 1e3:,.2f} ms",
            f"{row.seconds / rows[0].seconds:,.1f}",
            f"{row.packs:,}",
            f"{row.fill_of_bound:.4f}",
            imbalance,
        )
    console.print(table)


def main(
    sequences: Annotated[int, typer.Option(help="number of sequences to pack", min=1)] = 100_000,
    max_tokens: Annotated[int, typer.Option(help="budget of a pack", min=64)] = 8192,
    replicas: Annotated[int, typer.Option(help="replicas to balance", min=1)] = 8,
    build_sequences: Annotated[int, typer.Option(help="sequences whose arrays are built", min=1)] = 20_000,
    scan: Annotated[bool, typer.Option(help="time the classic O(n * packs) scan (10 s at 100k)")] = True,
    json_path: Annotated[Path | None, typer.Option("--json", help="write the figures to this file")] = None,
) -> None:
    """Measure the packer against its plain twin and pure-Python first-fit decreasing."""
    console = Console()
    lengths = long_tail_lengths(sequences, max_tokens=max_tokens)
    rows = measure_assignment(lengths, max_tokens=max_tokens, replicas=replicas, scan=scan)
    _print(
        console,
        rows,
        title=f"{sequences:,} sequences, {int(lengths.sum()):,} tokens, packs of {max_tokens:,}, {replicas} replicas; "
        f"at least {fewest_packs(lengths, max_tokens):,} packs",
    )
    built = lengths[:build_sequences]
    build = measure_build(built, max_tokens=max_tokens)
    tokens = int(built.sum())
    for name, seconds in build.items():
        console.print(
            f"arrays of {tokens:,} tokens, {name}: {seconds * 1e3:,.1f} ms ({tokens / seconds / 1e6:,.0f} M/s)"
        )
    forest = measure_forest(
        grouped_sequences(sequences, group=8, max_tokens=max_tokens), max_tokens=max_tokens, replicas=replicas
    )
    console.print(
        f"forests of {forest.tokens:,} tokens in groups of 8: {forest.rows:,} rows in {forest.packs:,} packs, fill "
        f"{forest.fill:.4f}, imbalance {forest.imbalance:.4%}; {forest.seconds * 1e3:,.0f} ms, {forest.ratio:.2f} x "
        f"plain packs of the same"
    )
    if json_path is not None:
        figures = {
            "forest": asdict(forest),
            "backend": backend(),
            "sequences": sequences,
            "max_tokens": max_tokens,
            "replicas": replicas,
            "lower_bound": fewest_packs(lengths, max_tokens),
            "assignment": [asdict(row) for row in rows],
            "build_tokens": tokens,
            "build_seconds": build,
        }
        json_path.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
