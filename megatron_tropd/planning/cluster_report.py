"""Prints what ``planning.cluster`` finds: the layouts of the configuration first, then the best ones."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from megatron_tropd.parallel.groups import Layout
from megatron_tropd.planning.cluster import ClusterJob, Estimate, room

_GIB = 2**30


def print_asked(console: Console, job: ClusterJob, asked: Estimate) -> None:
    """Prints what the layouts of the configuration take."""
    console.print(
        f"{job.sequences} sequences of at most {job.length:,} tokens per step on {job.cluster.gpus} GPUs. "
        f"Student {said(asked.student)}, recompute {asked.recompute}; teacher {said(asked.teacher)}"
        f"{f', on {job.teacher_section.ranks} GPUs of its own' if job.teacher_section.ranks else ''}.",
        highlight=False,
        soft_wrap=True,
    )
    whose = "student's " if asked.teacher_memory else ""
    _print_columns(console, f"Memory of the {whose}fullest rank, GiB", asked.memory, _GIB, total=False)
    _print_columns(console, "of which at the same time, GiB", asked.phases, _GIB, total=False)
    if asked.teacher_memory:
        _print_columns(console, "Memory of the teacher's fullest rank, GiB", asked.teacher_memory, _GIB)
    if asked.total_memory > room(job.cluster):
        console.print(
            f"[bold red]does not fit[/]: {asked.total_memory / _GIB:.1f} GiB of {room(job.cluster) / _GIB:.1f} GiB",
            highlight=False,
        )
    _print_columns(console, "What leaves a rank of the last stage in a step, GB", asked.sent, 1e9)
    if asked.hidden:
        hidden = asked.seconds | {"teacher, meanwhile": -asked.hidden}
        _print_columns(console, "Seconds of a step, the teacher a batch ahead, nothing else overlapped", hidden, 1.0)
    else:
        _print_columns(console, "Seconds of a step, nothing overlapped", asked.seconds, 1.0)


def said(layout: Layout) -> str:
    """Such as ``TP 8 SP PP 2``."""
    sizes = {
        "TP": layout.tensor,
        "PP": layout.pipeline,
        "VPP": layout.virtual_pipeline,
        "CP": layout.context,
        "EP": layout.expert,
    }
    parts = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    return " ".join(parts + ["SP"] * layout.sequence) or "TP 1"


def _print_columns(console: Console, title: str, values: dict[str, float], unit: float, *, total: bool = True) -> None:
    table = Table(box=None, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    for name, value in values.items():
        if value:
            table.add_row(name, f"{value / unit:,.2f}")
    if total:
        table.add_row("total", f"{sum(values.values()) / unit:,.2f}")
    console.print(title, highlight=False)
    console.print(table)


def ranking(found: list[Estimate]) -> Table:
    """A row for every layout, in their order."""
    table = Table(title="Layouts that fit, fastest first", title_justify="left", box=None)
    for column in ("student", "recompute", "teacher", "GiB", "seconds", "of which rollout"):
        table.add_column(column, justify="left" if column in ("student", "recompute", "teacher") else "right")
    for x in found:
        table.add_row(
            said(x.student),
            x.recompute,
            said(x.teacher),
            f"{x.total_memory / _GIB:.1f}",
            f"{x.step_seconds:.0f}",
            f"{x.seconds['rollout']:.0f}",
        )
    return table
