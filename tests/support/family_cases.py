"""Runs tiny models of every family under any layout and hands back what can be compared with `transformers`.

``run_cases`` runs on every rank of ``run_on_ranks``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_tropd.config.sections import Layout, OptimizerConfig
from megatron_tropd.convert.hf import HFWeights, read_architecture
from megatron_tropd.convert.writer import HFWriter
from megatron_tropd.data.packing import pack
from megatron_tropd.engine.batch import BatchFacts, batch_weights, train_packs
from megatron_tropd.engine.context import valid_positions
from megatron_tropd.engine.forward import run_packs
from megatron_tropd.engine.model import Model
from megatron_tropd.engine.optimizer import optimize
from megatron_tropd.engine.step import Trainer
from megatron_tropd.engine.weights import hf_rows, hf_tensors, load_stream, load_weights
from megatron_tropd.methods import build_method
from megatron_tropd.models.name_table import hf_shapes
from megatron_tropd.parallel.groups import GroupBuilder, Groups, initialize_distributed
from megatron_tropd.rollout.engines.megatron import MegatronSampler
from megatron_tropd.setup.build import load_model
from megatron_tropd.types import Pack, Rollout, RolloutRequest, SamplingParams, single_turn
from tests.support.layout_cases import whole_gradients
from tests.support.tiny_families import SIZES

LEARNING_RATE = 3e-2
NEW_TOKENS = 9
FILE_BYTES = 20_000


def _rollout(number: int, length: int) -> Rollout:
    """Random tokens; after the first, all of them are learned from."""
    rng = np.random.default_rng(700 + number)
    return Rollout(
        sequence_id=number,
        prompt_index=number,
        token_ids=rng.integers(0, SIZES["vocab_size"], length),
        region_L=single_turn(prompt=1, prefix=length - 1),
        sampling_logprob=np.empty(0, np.float32),
        model_logprob=np.empty(0, np.float32),
        finished=True,
    )


ROLLOUTS = [_rollout(number, length) for number, length in enumerate([23, 7, 41, 2, 15, 30, 11])]


@dataclass(frozen=True, kw_only=True)
class Case:
    family: str
    layout: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1
    balance: float = 0.0

    @property
    def name(self) -> str:
        axes = "-".join(f"{axis[:2]}{size:d}" for axis, size in self.layout.items())
        return f"{self.family}-{axes or 'alone'}-{self.ranks}" + ("-balanced" if self.balance else "")

    @property
    def decodes(self) -> bool:
        """Whether its greedy answers are asked for: those of one rank, and of tensor-parallel ones."""
        return not self.balance and {*self.layout} <= {"tensor", "sequence"}

    @property
    def replicas(self) -> int:
        return self.ranks // (self.layout.get("tensor", 1) * self.layout.get("pipeline", 1))


def run_cases(cases: Sequence[Case], root: str) -> dict[str, dict[str, Any]]:
    """Every case: logits, greedy answers, gradient, and logits after a step; the model is exported before and after."""
    device, builder = initialize_distributed(), GroupBuilder()
    found = {case.name: _run(case, Path(root), builder.build(Layout(**case.layout)), device) for case in cases}
    for case in cases:
        if case.decodes:
            sampler = builder.build(Layout(tensor=case.layout.get("tensor", 1)))
            found[case.name]["answers"] = _greedy_answers(Path(root) / case.family, sampler, device)
    return found


def _run(case: Case, root: Path, groups: Groups, device: torch.device) -> dict[str, Any]:
    source, target = root / case.family, root / "exported" / case.name
    model = load_model(source, groups, dtype=torch.float32, device=device, balance=case.balance)
    found: dict[str, Any] = {
        "logits": local_logits(model),
        "shard": groups.tensor_rank if groups.is_last_stage else -1,
        "restored": _survives_a_stream(model),
    }
    export(model, source, target / "before")
    optimization = optimize(
        model, OptimizerConfig(name="sgd", lr=LEARNING_RATE, clip_grad=0.0, weight_decay=0.0), steps=1
    )
    trainer = Trainer(model, optimization, build_method("sft"))
    items = items_of(model)
    found["loss"] = trainer.probe(items).loss
    gradients = whole_gradients(model)
    found["gradients"] = gradients if dist.get_rank() == 0 else {}
    found["grad_norm"] = trainer.step(items, update=0).grad_norm
    found["trained"] = local_logits(model)
    export(model, source, target / "after")
    return found


def _packs(model: Model) -> list[list[Pack]]:
    return pack(ROLLOUTS, max_tokens=64, multiple_of=4, num_replicas=model.groups.num_replicas)


def items_of(model: Model, rollouts: Sequence[Rollout] = ROLLOUTS, *, share: bool = False) -> list[Any]:
    method, facts = build_method("sft"), BatchFacts(seed=0, step=0, progress=0.0)
    replicas = model.groups.num_replicas
    packs = pack(rollouts, max_tokens=64, multiple_of=4, num_replicas=replicas, share_prefixes=share)
    replica = model.groups.replica
    nothing = [None] * len(packs[replica])
    return train_packs(
        packs[replica],
        batch_weights(packs, method, facts, model.groups),
        nothing,
        nothing,
        rollouts={rollout.sequence_id: rollout for rollout in rollouts},
        method=method,
        facts=facts,
        model=model,
    )


def logits_of(model: Any) -> dict[str, Tensor]:
    """What a model of `transformers` or `peft` says, ``"sequence"`` -> ``[L - 1, V]``."""
    with torch.no_grad():
        return {str(r.sequence_id): model(torch.from_numpy(r.token_ids)[None]).logits[0, :-1] for r in ROLLOUTS}


def furthest(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """The largest difference of a sequence's logits, of its largest logit."""
    assert found.keys() == truth.keys()
    return max(float((found[s] - logits).abs().max() / logits.abs().max()) for s, logits in truth.items())


def local_logits(model: Model) -> dict[str, Tensor]:
    """``"sequence"`` -> ``[L - 1, v]`` of this replica's sequences, on the last stage."""
    packs = _packs(model)[model.groups.replica]

    def last_stage(number: int, hidden_ND: Tensor, weight_vD: Tensor) -> tuple[Pack, Tensor]:
        return packs[number], F.linear(hidden_ND, weight_vD)

    found = {}
    for one, logits_Nv in run_packs(model, packs, last_stage):
        sequence_N = one.sequence_T[valid_positions(one)]
        for sequence in one.sequence_ids.tolist():
            found[str(sequence)] = logits_Nv[torch.from_numpy(sequence_N == sequence)]
    return found


def whole_logits(ranks: Sequence[dict[str, Any]], key: str, vocab_size: int) -> dict[str, Tensor]:
    """The same of all sequences, over the whole vocabulary, from what every rank found."""
    shards: dict[str, dict[int, Tensor]] = {}
    for rank in ranks:
        for sequence, logits in rank[key].items():
            shards.setdefault(sequence, {})[rank["shard"]] = logits
    return {
        sequence: torch.cat([by_rank[rank] for rank in sorted(by_rank)], dim=-1)[:, :vocab_size]
        for sequence, by_rank in shards.items()
    }


def _survives_a_stream(model: Model) -> bool:
    """Published into the emptied model, in another order than its own, the weights are what they were."""
    published = [(name, tensor.clone()) for name, tensor in hf_tensors(model)]
    before = [parameter.detach().clone() for chunk in model.chunks for parameter in chunk.parameters()]
    for chunk in model.chunks:
        for parameter in chunk.parameters():
            parameter.data.fill_(7.0)
    load_stream(model, [("an.unknown.name", torch.ones(1)), *reversed(published)])
    after = [parameter for chunk in model.chunks for parameter in chunk.parameters()]
    return all(a.equal(b) for a, b in zip(after, before, strict=True))


def export(model: Model, source: Path, target: Path, *, max_file_bytes: int = FILE_BYTES) -> None:
    writer = None
    if dist.get_rank() == 0:
        target.parent.mkdir(parents=True, exist_ok=True)
        writer = HFWriter(
            target,
            companions_from=source,
            tensors=hf_shapes(model.architecture),
            dtype=model.dtype,
            max_file_bytes=max_file_bytes,
        )
    for name, first, rows in hf_rows(model):
        if writer is not None:
            writer.write_rows(name, first, rows)
    if writer is not None:
        writer.finish()
    dist.barrier()


def _greedy_answers(source: Path, groups: Groups, device: torch.device) -> list[list[int]]:
    """What the family's sampler writes after the first half of every rollout."""
    requests = [
        RolloutRequest(
            sequence_id=rollout.sequence_id,
            prompt_index=rollout.sequence_id,
            prompt_ids=rollout.token_ids[: (len(rollout.token_ids) + 1) // 2],
            prefix_ids=np.empty(0, np.int64),
            max_new_tokens=NEW_TOKENS,
        )
        for rollout in ROLLOUTS
    ]
    sampler = MegatronSampler(read_architecture(source), groups, dtype=torch.float32, device=device, batch_size=4)
    load_weights(sampler.model, HFWeights(source))
    params = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0)
    rollouts = sampler.generate(requests, params, seed=0, step=0)
    return [r.token_ids[r.prompt_length :].tolist() for r in rollouts]
