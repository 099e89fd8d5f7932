"""One training step of a tiny model per case, what its ranks sent each other, and what planning says they should."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_tropd.data.packing import pack
from megatron_tropd.engine.context import own_valid_positions
from megatron_tropd.losses.vocab_parallel import linear_logprobs
from megatron_tropd.parallel.groups import GroupBuilder, Groups
from megatron_tropd.planning.traffic import (
    Load,
    RankTransfer,
    backward_transfers,
    forward_transfers,
    gradient_transfers,
    loss_transfers,
)
from megatron_tropd.report.stopwatch import Stopwatch
from megatron_tropd.teacher import sharded as dealt
from megatron_tropd.teacher.transfer import carry
from megatron_tropd.train.loop import score_and_pack
from megatron_tropd.train.rollout_queue import score_rollouts
from tests.support.counting import SMALL, Counting, Counts, as_on_gpus, ranks_of
from tests.support.layout_cases import VOCAB, Case, assemble, config_of
from tests.support.tiny_models import random_rollouts

# Megatron's names
_GROUPS = {
    "tensor": "tp",
    "context": "cp",
    "pipeline": "pp",
    "expert": "ep",
    "data": "dp_cp",
    "expert_data": "expt_dp",
    "ends": "embd",
}


def run_cases(cases: Sequence[Case], models: str) -> list[dict[str, Any]]:
    """On the ranks: of every case, bytes by (operation, ranks), counted and planned."""
    builder = GroupBuilder()
    with as_on_gpus():
        return [_step(case, assemble(config_of(case, Path(models)), builder)) for case in cases]


def _step(case: Case, run: Any) -> dict[str, Any]:
    groups, student = run.student.groups, run.student
    rollouts = random_rollouts(0, vocab_size=VOCAB, count=case.sequences)
    scored = score_rollouts(run, rollouts, watch=Stopwatch())
    [packs] = score_and_pack(run, scored, step=0, watch=Stopwatch())
    with Counting() as counting:
        run.trainer.step(packs, update=0)
    loads = [
        Load(tokens=len(item.pack.token_T) // groups.layout.context, valid=len(own_valid_positions(item.pack, groups)))
        for item in packs
    ]
    if groups.layout.virtual_pipeline > 1:  # filled up to the pipeline's round
        loads += [Load(tokens=groups.layout.tensor * 2, valid=0)] * (-len(loads) % groups.layout.pipeline)
    a, layout = student.architecture, groups.layout
    sizes = {"stage": groups.stage, "itemsize": student.dtype.itemsize}
    planned = forward_transfers(a, layout, loads, **sizes)
    planned += backward_transfers(a, layout, loads, **sizes, recompute=case.recompute)
    ranks = dist.get_world_size(groups.pg.dp_cp)
    planned += gradient_transfers(a, layout, **sizes, data_ranks=ranks, distributed=case.distributed_optimizer)
    if groups.is_last_stage:
        candidates, kind = 1 + run.method.needs.top_k, "kl" if run.teacher_request.hidden_states else ""
        for load in loads:
            planned += loss_transfers(layout, valid=load.valid, candidates=candidates, divergence=kind)
    return {"counted": dict(counting.bytes), "planned": _by_ranks(planned, groups)}


def _by_ranks(transfers: Sequence[RankTransfer], groups: Groups) -> Counts:
    """As they are counted: axes may have the same ranks, and pipelines of two speak over the world as well."""
    found: Counter[tuple[str, str]] = Counter()
    for transfer in transfers:
        operation, group = transfer.operation, getattr(groups.pg, _GROUPS[transfer.axis])
        if transfer.axis == "tensor" and transfer.what == "experts":
            operation = (
                "all_to_all"  # unequal shares, which gloo neither gathers nor scatters (engine/patches/cuda_calls.py)
            )
        if transfer.size > SMALL:
            found[operation, ranks_of(operation, group)] += transfer.size
    return dict(found)


# --------------------------------------------------------------------------- the loss and the teacher alone


def loss_traffic(candidates: int, tokens: int) -> dict[str, list[tuple[str, int]]]:
    """On the ranks of one vocabulary: (operation, bytes) of every collective of the loss, forward and backward."""
    generator = torch.Generator().manual_seed(3)
    hidden_TD = torch.randn(tokens, 8, generator=generator).requires_grad_()
    weight_vD = torch.randn(128, 8, generator=generator).requires_grad_()
    ids_TK = torch.randint(0, 200, (tokens, candidates), generator=generator)
    with Counting() as forward:
        out = linear_logprobs(hidden_TD, weight_vD, ids_TK, group=dist.group.WORLD, vocab_size=200)
    with Counting() as backward:
        (out.logprob_TK.sum() + out.entropy_T.sum()).backward()
    return {"forward": forward.calls, "backward": backward.calls}


def signal_traffic(cases: Sequence[Case], models: str) -> list[dict[str, Any]]:
    """On the ranks: bytes that the teacher's room sends from layout to layout, and the bytes planned per prediction."""
    builder = GroupBuilder()
    return [_signals(case, assemble(config_of(case, Path(models)), builder)) for case in cases]


def _signals(case: Case, run: Any) -> dict[str, Any]:
    groups = run.student.groups
    rollouts = random_rollouts(0, vocab_size=VOCAB, count=case.sequences)
    packs = pack(rollouts, max_tokens=case.pack_tokens, multiple_of=8, num_replicas=groups.num_replicas)
    asked = None
    if run.teacher_request.queries and groups.is_last_stage:
        asked = [
            torch.zeros(len(own_valid_positions(p, groups)), run.teacher_request.queries, dtype=torch.int64)
            for p in packs[groups.replica]
        ]
    counting = Counting()

    def carried(*args: Any, **kwargs: Any) -> Any:  # and not what the teacher's own stages send
        with counting:
            return carry(*args, **kwargs)

    dealt.carry = carried  # type: ignore[assignment]
    try:
        run.teacher.score(packs, run.teacher_request, asked)
    finally:
        dealt.carry = carry
    hidden = run.teacher_model.architecture.hidden_size * run.teacher_model.dtype.itemsize
    return {
        "sent": counting.bytes["send", ""],
        "valid": sum(p.num_valid for replica in packs for p in replica),
        "told": run.teacher_request.bytes_per_row(hidden_bytes=hidden),
        "asked": run.teacher_request.query_bytes_per_row,
    }
