"""Print what ``planning.cluster`` finds: the layouts of the configuration first, then the best ones."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from megatron_tropd.config.sections import Layout
from megatron_tropd.planning.cluster import ClusterJob, Estimate, checkpoint_bytes, room

_GIB = 2**30


def print_requested(console: Console, job: ClusterJob, requested: Estimate) -> None:
    """Print what the layouts of the configuration take."""
    console.print(
        f"{job.sequences} sequences of at most {job.length:,} tokens per step on {job.cluster.gpus} GPUs. "
        f"Student {describe(requested.student)}, recompute {requested.recompute}; teacher {describe(requested.teacher)}"
        f"{f', on {job.teacher_section.ranks} GPUs of its own' if job.teacher_section.ranks else ''}.",
        highlight=False,
        soft_wrap=True,
    )
    whose = "student's " if requested.teacher_memory else ""
    _print_columns(console, f"Memory of the {whose}fullest rank, GiB", requested.memory, _GIB, total=False)
    _print_columns(console, "of which at the same time, GiB", requested.phases, _GIB, total=False)
    if requested.teacher_memory:
        _print_columns(console, "Memory of the teacher's fullest rank, GiB", requested.teacher_memory, _GIB)
    if saving := checkpoint_bytes(job, requested.student):
        console.print(
            f"While a checkpoint is written, the first data rank of each part of the model fills {saving / _GIB:.1f} "
            "GiB of host memory.",
            highlight=False,
            soft_wrap=True,
        )
    if requested.total_memory > room(job.cluster):
        console.print(
            f"[bold red]does not fit[/]: {requested.total_memory / _GIB:.1f} GiB of {room(job.cluster) / _GIB:.1f} GiB",
            highlight=False,
        )
    _print_columns(console, "What leaves a rank of the last stage in a step, GB", requested.sent, 1e9)
    if requested.hidden:
        hidden = requested.seconds | {"teacher, meanwhile": -requested.hidden}
        _print_columns(console, "Seconds of a step, the teacher a batch ahead, nothing else overlapped", hidden, 1.0)
    else:
        _print_columns(console, "Seconds of a step, nothing overlapped", requested.seconds, 1.0)


def describe(layout: Layout) -> str:
    """Describe a layout, such as ``TP 8 SP PP 2``."""
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
    """Tabulate the layouts, a row for each, in their order."""
    table = Table(title="Layouts that fit, fastest first", title_justify="left", box=None)
    for column in ("student", "recompute", "teacher", "GiB", "seconds", "of which rollout"):
        table.add_column(column, justify="left" if column in ("student", "recompute", "teacher") else "right")
    for x in found:
        table.add_row(
            describe(x.student),
            x.recompute,
            describe(x.teacher),
            f"{x.total_memory / _GIB:.1f}",
            f"{x.step_seconds:.0f}",
            f"{x.seconds['rollout']:.0f}",
        )
    return table
