"""Losses and gradients of one batch of samples with what they share computed once, and with every sequence by itself.

``run_pairs`` runs on every rank of ``run_on_ranks``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_tropd.engine.rows import computed_rows, is_forest
from megatron_tropd.parallel.groups import GroupBuilder
from megatron_tropd.report.stopwatch import Stopwatch
from megatron_tropd.setup.build import DTYPES
from megatron_tropd.train.loop import score_and_pack
from megatron_tropd.train.rollout_queue import packs_of, scored_rollouts, student_scores
from megatron_tropd.types import Pack
from tests.support.layout_cases import Case, assemble, batch_of, config_of, gather_gradients, whole_gradients

Packs = list[list[list[Pack]]]  # by minibatch and replica
# "on": rows of forests; "off": packs of whole sequences; "tokens": the packs of "on", computed token by token
Way = Literal["on", "off", "tokens"]


def run_pairs(cases: Sequence[Case], models: str, ways: Sequence[Way] = ("on", "off")) -> dict[str, dict[str, Any]]:
    """Every case's loss, gradient norm, statistics and gradients, ``NAME/WAY``; and its rows and tokens."""
    builder = GroupBuilder()
    found = {}
    for case in cases:
        with computed_in_fp64(case.dtype == "fp64"):
            for way in ways:
                found[f"{case.name}/{way}"] = _probe(case, way, Path(models), builder)
    return found


@contextmanager
def computed_in_fp64(double: bool) -> Iterator[None]:
    """Let "fp32" in a configuration mean fp64: no run has it, and proofs want its digits."""
    before = DTYPES["fp32"]
    if double:
        DTYPES["fp32"] = torch.float64
    try:
        yield
    finally:
        DTYPES["fp32"] = before


def _probe(case: Case, way: Way, models: Path, builder: GroupBuilder) -> dict[str, Any]:
    dtype = "fp32" if case.dtype == "fp64" else case.dtype
    run = assemble(config_of(replace(case, share=way != "off", dtype=dtype), models), builder)
    rollouts = batch_of(case, 0)
    packs: Packs = packs_of(run, rollouts)
    if way == "tokens":
        packs = [[[replace(one, row_T=None, num_rows=0) for one in own] for own in part] for part in packs]
    scores = [student_scores(run, part) for part in packs]
    [items] = score_and_pack(run, scored_rollouts(run, rollouts, packs, scores), step=0, watch=Stopwatch())
    result = run.trainer.probe(items)
    if case.distributed_optimizer:
        gather_gradients(run.trainer.optimization)
    gradients = whole_gradients(run.student)
    every = [one for part in packs for own in part for one in own]
    return {
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "stats": dict(result.stats),
        "gradients": gradients if dist.get_rank() == 0 else {},
        "rows": [computed_rows(one) for one in every],
        "tokens": [len(one.token_T) for one in every],
        "forests": sum(map(is_forest, every)),
    }
