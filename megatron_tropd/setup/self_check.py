"""The launch-time self check: a student that is its own teacher has nothing to learn.

Engines that disagree about log-probs (another dtype, kernel, vocabulary or mask on one side) show here as a loss or a
gradient where there must be none, before a run is spent on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_tropd.data.packing import pack
from megatron_tropd.engine.batch import BatchFacts, batch_entropy_threshold, batch_weights, train_packs
from megatron_tropd.engine.experts import without_balancing
from megatron_tropd.engine.model import Model
from megatron_tropd.engine.optimizer import Optimization
from megatron_tropd.engine.score import query_ids, score_packs
from megatron_tropd.engine.step import Trainer
from megatron_tropd.engine.views import TrainPack, views_of
from megatron_tropd.errors import SelfCheckError
from megatron_tropd.losses import gates, terms
from megatron_tropd.methods import Method
from megatron_tropd.teacher.engines.megatron import MegatronTeacher
from megatron_tropd.teacher.protocol import TeacherRequest
from megatron_tropd.teacher.routing import TeacherWithBase
from megatron_tropd.types import Pack, Rollout, single_turn

# share of the gradient of plain likelihood on the same tokens that rounding may leave
_TOLERANCE = {"torch.float32": 1e-4, "torch.bfloat16": 2e-2}


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfCheck:
    """The check's measurements: everything relative to maximum likelihood on the same tokens."""

    loss: float
    gradient: float
    tolerance: float
    applies: bool  # False for objectives that are not meant to vanish when student and teacher agree


def check_self(
    model: Model,
    optimization: Optimization,
    method: Method,
    *,
    vocab_size: int,
    seed: int = 0,
    share_prefixes: bool = False,
) -> SelfCheck:
    """Take the gradient of a few random sequences with the model as its own teacher; no update. Collective.

    ``share_prefixes``: as the run packs; some of the sequences begin alike.

    Raises:
        SelfCheckError: the loss or the gradient is not zero.
    """
    rollouts = _random_rollouts(vocab_size, seed, model.architecture.max_positions)
    packs = pack(
        rollouts,
        max_tokens=256,
        multiple_of=2 * model.groups.layout.tensor * model.groups.layout.context,
        num_replicas=model.groups.num_replicas,
        share_prefixes=share_prefixes,
    )
    likelihood = Method(gate=gates.ALL, trusted=terms.nll())
    results, trusts_equals = [], True
    for objective in (method, likelihood):
        trainer = Trainer(
            model, optimization, objective, vocab_size=vocab_size, teacher_weight_vE=_own_output_weight(model)
        )
        items = _items(model, objective, packs, rollouts, vocab_size)
        trusts_equals = trusts_equals and _trusts_an_equal(objective, items, model)
        with without_balancing(model.config):
            results.append(trainer.probe(items))
    found, scale = results
    # where the gate does not trust even an equal teacher, the outlier term must vanish too
    outliers_vanish = method.outlier.vanishes or trusts_equals
    applies = method.trusted.vanishes and method.extra.vanishes and outliers_vanish
    check = SelfCheck(
        loss=abs(found.loss) / max(abs(scale.loss), 1e-6),
        gradient=found.grad_norm / max(scale.grad_norm, 1e-6),
        tolerance=_TOLERANCE[str(model.dtype)],
        applies=applies,
    )
    if applies and not (check.loss <= check.tolerance and check.gradient <= check.tolerance):
        raise SelfCheckError(
            f"the student as its own teacher leaves a loss of {check.loss:.1e} and a gradient of {check.gradient:.1e} "
            f"(relative to maximum likelihood; at most {check.tolerance:.0e} is rounding). Student and teacher paths "
            "disagree about log-probs: check dtype, vocabulary sizes and the attention kernel."
        )
    return check


def _own_output_weight(model: Model) -> Tensor | None:
    return model.chunks[-1].output_weight().detach() if model.groups.is_last_stage else None


def _random_rollouts(vocab_size: int, seed: int, max_positions: int) -> list[Rollout]:
    """Draw a few sequences of random tokens, all CONTINUATION after a short prompt; every third begins like the one
    before it."""
    rng = np.random.default_rng(seed)
    token_ids = np.empty(0, np.int64)
    longest = min(40, max_positions)
    rollouts = []
    for number in range(6):
        length = int(rng.integers(longest // 2, longest + 1))
        written = length - 4
        before, token_ids = token_ids, rng.integers(0, vocab_size, length)
        if number % 3 == 2:
            alike = min(len(before), length) // 2
            token_ids[:alike] = before[:alike]
        rollouts.append(
            Rollout(
                sequence_id=number,
                prompt_index=number,
                token_ids=token_ids,
                region_L=single_turn(prompt=4, continuation=written),
                sampling_logprob=np.full(written, np.nan, np.float32),
                model_logprob=np.full(written, np.nan, np.float32),
                finished=True,
            )
        )
    return rollouts


def _items(
    model: Model, method: Method, packs: Sequence[Sequence[Pack]], rollouts: Sequence[Rollout], vocab_size: int
) -> list[TrainPack]:
    """Make this replica's packs ready, scored by the model itself."""
    groups = model.groups
    spec = TeacherRequest.of(method.needs)
    own = MegatronTeacher(model, groups, vocab_size=vocab_size, temperature=method.temperature)
    teacher = TeacherWithBase(own, own)
    mine = packs[groups.replica]
    scores = score_packs(
        model,
        mine,
        vocab_size=vocab_size,
        temperature=method.temperature,
        top_k=spec.queries,
        end_ids=method.end_ids,
    )
    threshold = batch_entropy_threshold(scores, method, groups)
    # answers that fare alike: all are right, and there is nothing to learn from their rewards either
    rewards = {rollout.sequence_id: 1.0 for rollout in rollouts}
    facts = BatchFacts(seed=0, step=0, progress=0.0, entropy_threshold=threshold, rewards=rewards)
    return train_packs(
        mine,
        batch_weights(packs, method, facts, groups),
        teacher.score(packs, spec, query_ids(scores)),
        scores,
        rollouts={rollout.sequence_id: rollout for rollout in rollouts},
        method=method,
        facts=facts,
        model=model,
    )


def _trusts_an_equal(method: Method, items: Sequence[TrainPack], model: Model) -> bool:
    """Say whether the gate trusts every token of a teacher whose log-probs are the student's own. Collective."""
    trusted = True
    for item in items if model.groups.is_last_stage else ():
        assert item.old is not None and item.outputs is not None  # both were scored above
        equal = replace(item.outputs, logprob_N=item.old.logprob_N, entropy_N=item.old.entropy_N)
        gate = method.gate_weight(*views_of(replace(item, outputs=equal)))
        trusted = trusted and bool((gate == 1.0).all())
    everywhere = torch.tensor(float(trusted), device=model.device)
    dist.all_reduce(everywhere, op=dist.ReduceOp.MIN)
    return bool(everywhere)
