"""What a layout does to a training: nothing. Measured for docs/correctness.md, against the same training on one rank.

Every row trains five steps under SGD, whose weights show what differs in a gradient and no more; under Adam where the
optimizer is distributed, which Megatron-Core has for Adam alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from tests.support.distributed import run_on_ranks
from tests.support.layout_cases import Case, run_cases
from tests.support.parity_page import Line, Rows, bound_of, roundings
from tests.support.run_inputs import save_nudged
from tests.support.tiny_families import save_family
from tests.support.tiny_models import STUDENT, TEACHER, Objective, relative_error, save_qwen3

METHODS: dict[str, tuple[Objective, dict[str, Any] | None]] = {
    "tropd": (Objective(), None),
    "rkl": (Objective(name="rkl"), None),
    "local_support": (Objective(name="local_support"), {"name": "local_support", "k": 7}),
}
# four key/value heads and four layers, to be cut into as many parts
DEEP = STUDENT | {"num_key_value_heads": 4, "num_hidden_layers": 4, "intermediate_size": 76}
DEEP_TEACHER = TEACHER | {
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "num_hidden_layers": 4,
    "intermediate_size": 92,
}
DENSE, EXPERTS, EXPERT_TEACHER = ("dense", "dense-teacher"), ("experts", "dense-teacher"), ("dense", "experts-teacher")
TP2, TP4, PP2, PP4, CP2, EP2 = (
    {"tensor": 2},
    {"tensor": 4},
    {"pipeline": 2},
    {"pipeline": 4},
    {"context": 2},
    {"expert": 2},
)
SP, VPP2 = {"sequence": True}, PP2 | {"virtual_pipeline": 2}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table: how student and teacher are laid out over how many ranks."""

    ranks: int
    student: dict[str, Any] = field(default_factory=dict)
    teacher: dict[str, Any] = field(default_factory=dict)
    models: tuple[str, str] = DENSE
    distributed_optimizer: bool = False
    adam: bool = False
    pack_tokens: int = 64

    @property
    def words(self) -> tuple[str, str]:
        student, teacher = (_said(axes, self.ranks) for axes in (self.student, self.teacher))
        kinds = [" (experts)" if name.startswith("experts") else "" for name in self.models]
        optimizer = ", distributed optimizer" if self.distributed_optimizer else ""
        packs = ", in one pack" * (self.pack_tokens > 1000)
        return f"{student}{optimizer}{kinds[0]}{packs}", f"{teacher}{kinds[1]}"

    def case(self, method: str) -> Case:
        objective, options = METHODS[method]
        return Case(
            name=f"{method}: {self.ranks} ranks, {self}",
            ranks=self.ranks,
            student=self.student,
            teacher=self.teacher,
            objective=objective,
            method=options,
            models=self.models,
            sgd=not (self.distributed_optimizer or self.adam),
            adam_eps=1e-5,  # see the page
            distributed_optimizer=self.distributed_optimizer,
            pack_tokens=self.pack_tokens,
            steps=5,
        )


def _said(axes: dict[str, Any], ranks: int) -> str:
    """Such as ``TP 2, SP, DP 2``."""
    names = {"tensor": "TP", "pipeline": "PP", "virtual_pipeline": "VPP", "context": "CP", "expert": "EP"}
    parts = [f"{short} {axes[name]}" for name, short in names.items() if name in axes]
    parts[1:1] = ["SP"] * axes.get("sequence", False)
    cut = axes.get("tensor", 1) * axes.get("pipeline", 1) * axes.get("context", 1)
    return ", ".join(parts + [f"DP {ranks // cut}"] * (ranks > cut)) or "one rank"


ROWS = (
    Row(ranks=1),  # the batch in many packs instead of one
    Row(ranks=2, student=TP2, teacher=TP2),
    Row(ranks=4, student=TP4, teacher=TP4),
    Row(ranks=2, student=TP2 | SP, teacher=TP2 | SP),
    Row(ranks=4, student=TP4 | SP, teacher=TP4 | SP),
    Row(ranks=2, student=PP2, teacher=PP2),
    Row(ranks=4, student=PP4, teacher=PP4),
    Row(ranks=2, student=VPP2, teacher=VPP2),
    Row(ranks=2, student=CP2, teacher=CP2),
    Row(ranks=2),
    Row(ranks=2, distributed_optimizer=True),
    Row(ranks=4, student=TP2 | SP, teacher=TP2, distributed_optimizer=True),
    Row(ranks=4, student=TP2 | PP2, teacher=TP2 | PP2),
    Row(ranks=4, student=TP2 | SP | CP2, teacher=TP2 | CP2),
    Row(ranks=4, student=VPP2, teacher=VPP2, distributed_optimizer=True),
    Row(ranks=2, models=EXPERTS),
    Row(ranks=2, student=EP2, models=EXPERTS),
    Row(ranks=2, student=EP2 | CP2, models=EXPERTS),
    Row(ranks=4, student=EP2 | TP2 | SP, models=EXPERTS, distributed_optimizer=True),
    Row(ranks=4, student=EP2 | PP2, models=EXPERTS),
    # the teacher's layout another in every axis
    Row(ranks=2, student=TP2 | SP, teacher=PP2),
    Row(ranks=2, student=PP2, teacher=TP2 | SP),
    Row(ranks=2, student=CP2),
    Row(ranks=4, student=TP2 | SP | PP2, teacher=CP2),
    Row(ranks=4, student=CP2, teacher=TP2 | SP | PP2),
    Row(ranks=4, student=TP2 | SP | VPP2, teacher=EP2 | CP2, models=EXPERT_TEACHER),
    Row(ranks=8, student=TP2 | SP | CP2 | VPP2, teacher=EP2, models=EXPERT_TEACHER),
)
# what the test suite repeats; the others run when the table is written
QUICK = (ROWS[25],)
HEADER = ("student", "teacher", *METHODS, "checked")
NUDGES = 2
ROUNDED = math.ceil(roundings(131))  # the longest sums: over the teacher's ids


def save_models(directory: Path) -> None:
    """Tiny checkpoints of the three pairs."""
    save_qwen3(directory / "dense", DEEP, seed=11)
    save_qwen3(directory / "dense-teacher", DEEP_TEACHER, seed=12)
    sizes = {"num_hidden_layers": 4, "max_position_embeddings": 96}
    for name, own, seed in (("experts", STUDENT, 13), ("experts-teacher", TEACHER, 14)):
        save_family(directory / name, "qwen3-moe", seed=seed, sizes=sizes | {"vocab_size": own["vocab_size"]})
    for name in ("dense", "experts"):
        for seed in range(NUDGES):
            save_nudged(directory / f"{name}-{seed}", directory / name, seed=seed)


def alone(row: Row) -> Row:
    """What a row is compared with: one rank, one pack."""
    return Row(ranks=1, models=row.models, adam=row.distributed_optimizer, pack_tokens=4096)


def trained(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """What the first rank reports of each row's training by each method, and of those on one rank, by case name."""
    every = [row.case(method) for row in (*map(alone, rows), *rows) for method in METHODS]
    wanted = {case.name: case for case in every}
    found: dict[str, dict[str, Any]] = {}
    with TemporaryDirectory() as folder:
        save_models(Path(folder))
        for ranks in sorted({case.ranks for case in wanted.values()}):
            cases = [case for case in wanted.values() if case.ranks == ranks]
            limit = 60 + 5 * ranks * len(cases)
            found |= run_on_ranks(run_cases, cases, folder, world_size=ranks, timeout_s=limit)[0]
    return found


def nudged(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Of each row's training on one rank: the same from weights a step of fp32 away, by case name and draw."""
    cases = {}
    for case in (alone(row).case(method) for row in rows for method in METHODS):
        for draw in range(NUDGES):
            student, teacher = case.models or DENSE
            name = moved_name(case.name, draw)
            cases[name] = replace(case, name=name, models=(f"{student}-{draw}", teacher))
    with TemporaryDirectory() as folder:
        save_models(Path(folder))
        return run_on_ranks(run_cases, list(cases.values()), folder, world_size=1, timeout_s=120 + 15 * len(cases))[0]


def moved_name(name: str, draw: int) -> str:
    return f"{name}, draw {draw}"


def bound(row: Row, found: dict[str, dict[str, Any]], moved: dict[str, dict[str, Any]]) -> list[float]:
    """What each of a row's errors may be, whatever the method."""
    every = []
    for method in METHODS:
        name = alone(row).case(method).name
        every += [
            between(found[name], moved[moved_name(name, draw)], weights=not row.distributed_optimizer)
            for draw in range(NUDGES)
        ]
    return [bound_of(max(column), ROUNDED) for column in zip(*every, strict=True)]


def errors(row: Row, method: str, found: dict[str, dict[str, Any]]) -> list[float]:
    """Of a layout against one rank."""
    one, many = found[alone(row).case(method).name], found[row.case(method).name]
    return between(one, many, weights=not row.distributed_optimizer)


def between(one: dict[str, Any], many: dict[str, Any], *, weights: bool) -> list[float]:
    """Of one training against another: worst gradient, loss, gradient norm and the weights after the last step."""
    assert one["gradients"].keys() == many["gradients"].keys()
    gradients = [relative_error(many["gradients"][name], gradient) for name, gradient in one["gradients"].items()]
    # a loss is a mean of terms of either sign: where they cancel, so do the digits
    largest = max(abs(loss) for loss in one["loss"])
    losses = [abs(a - b) / largest for a, b in zip(many["loss"], one["loss"], strict=True)]
    norms = [abs(a / b - 1) for a, b in zip(many["grad_norm"], one["grad_norm"], strict=True)]
    answer = [max(gradients), max(losses), max(norms)]
    if not weights:
        return answer
    last = [torch.cat([run["weights"][name].flatten() for name in one["weights"]]) for run in (many, one)]
    return [*answer, relative_error(*last)]


def layouts(rows: Sequence[Row] = ROWS) -> Rows:
    """By layout: the errors under each method, and their bound."""
    found, moved = trained(rows), nudged(rows)
    return {
        row.words: Line(found=[errors(row, method, found) for method in METHODS], bound=bound(row, found, moved))
        for row in rows
    }
