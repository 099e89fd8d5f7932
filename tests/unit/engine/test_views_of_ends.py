"""What a method sees with the ends of responses for one token is what it sees of logits whose columns are merged."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from megatron_tropd.engine.views import (
    StudentScores,
    TrainPack,
    Views,
    ends_as_one,
    picked_ids,
    student_rows,
    support_of,
    views_of,
)
from megatron_tropd.losses.end_class import at_ids, class_entropy
from megatron_tropd.losses.support import first_of_each
from megatron_tropd.losses.vocab_parallel.logprobs import LogProbs
from megatron_tropd.methods import Method, build_method
from megatron_tropd.types import Pack, TeacherOutputs, TokenView
from tests.support.method_views import Rows, T, V, divergence, entropy, gradient, log_outside, rows, views

ENDS = (7, 2, 11)
KEPT = [i for i in range(V) if i not in ENDS]
OPTIONS: dict[str, dict[str, Any]] = {
    "opd": {},
    "tropd": {"k": 5, "prefix_schedule": "none"},
    "tropd_soft": {"k": 5, "tail": "bucket", "support": "teacher_and_sampled", "prefix_schedule": "none"},
    "tropd_rkl": {"prefix_schedule": "none", "k": 4},
    "tropd_aopd": {"gate": ["teacher_topk", "bernoulli"], "k": 5, "gate_k": 3, "prefix_schedule": "none"},
    "eopd": {"k": 4},
    "entropy_opd": {},
    "exopd": {},
    "gkd": {"temperature": 1.0},
    "fkl": {"form": "topk", "tail": "renorm", "k": 3},
}


def merged(logits_TV: Tensor) -> Tensor:
    return torch.cat([logits_TV[:, KEPT], logits_TV[:, list(ENDS)].logsumexp(-1, keepdim=True)], dim=1)


def column_of(ids: Tensor) -> Tensor:
    table = torch.full((V,), len(KEPT))
    table[KEPT] = torch.arange(len(KEPT))
    return table[ids]


def whole(logits_TV: Tensor) -> tuple[Tensor, Tensor]:
    logprob_TV = logits_TV.log_softmax(-1)
    return logprob_TV, logprob_TV[:, list(ENDS)]


def ends_of_the_class(data: Rows, target_T: Tensor) -> StudentScores:
    """What ``score_packs`` says of the student at the rollout."""
    old_TV, old_TX = whole(data.old_TV)
    raw_T = old_TV.gather(1, target_T[:, None])[:, 0]
    return StudentScores(at_ids(raw_T, target_T, ENDS, old_TX), class_entropy(entropy(old_TV), old_TX), raw_T)


def seen(data: Rows, method: Method, tokens: TokenView) -> Views:
    """The views, from whole rows of logits in place of an output layer."""
    target_T1 = data.target_T[:, None]
    (p_TV, p_TX), (b_TV, b_TX), (q_TV, _) = whole(data.teacher_TV), whole(data.base_TV), whole(data.student_TV)
    topk_TK = p_TV.topk(method.needs.top_k or 1).indices
    listed_TK = torch.cat([target_T1, topk_TK, torch.tensor(ENDS).expand(T, -1)], dim=1)
    outputs = TeacherOutputs(
        logprob_N=p_TV.gather(1, target_T1)[:, 0],
        topk_ids_NK=topk_TK,
        topk_logprob_NK=p_TV.gather(1, topk_TK),
        logtail_N=log_outside(p_TV, listed_TK),
        entropy_N=entropy(p_TV),
        base_logprob_N=b_TV.gather(1, target_T1)[:, 0],
        end_logprob_NX=p_TX,
        base_end_logprob_NX=b_TX,
    )
    item = TrainPack(
        pack=cast(Pack, None),
        tokens=tokens,
        weight_N=torch.ones(T),
        outputs=ends_as_one(outputs, data.target_T, ENDS),
        support=support_of(outputs, data.target_T, method),
        old=ends_of_the_class(data, data.target_T),
        end_ids=ENDS,
    )
    picked_TK = picked_ids(item)
    out = LogProbs(
        logprob_TK=q_TV.gather(1, picked_TK),
        entropy_T=entropy(q_TV),
        logsumexp_T=torch.zeros(T),
        logtail_T=log_outside(q_TV, picked_TK) if method.needs.tail_mass else None,
    )
    both = [merged(logits_TV).log_softmax(-1) for logits_TV in (data.student_TV, data.teacher_TV)]
    return views_of(item, student_rows(out, item, divergence=lambda kind, beta: divergence(*both, kind, beta)))


def problem(seed: int) -> tuple[Rows, TokenView, TokenView]:
    """Rows with ends among the targets, and the tokens with their own ids and with columns of the merged rows."""
    data = rows(seed, on_policy=False)
    data = Rows(data.student_TV, data.old_TV, data.teacher_TV, data.base_TV, torch.tensor([7, 2, 11, 0, 2, 5, 12]))
    old_TV, _ = whole(data.old_TV)
    of_merged = views(merged_rows(data))[2]
    own = TokenView(
        region_T=of_merged.region_T,
        uniform_T=of_merged.uniform_T,
        sequence_T=of_merged.sequence_T,
        position_T=of_merged.position_T,
        target_T=data.target_T,
        rollout_logprob_T=old_TV.gather(1, data.target_T[:, None])[:, 0] + 0.01,  # of the id that was drawn
        entropy_threshold=of_merged.entropy_threshold,
    )
    return data, own, of_merged


def merged_rows(data: Rows) -> Rows:
    tensors = (merged(x) for x in (data.student_TV, data.old_TV, data.teacher_TV, data.base_TV))
    return Rows(*tensors, column_of(data.target_T))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("seed", [3, 4])
def test_losses_gradients_gates_and_metrics_are_those_of_merged_logits(name: str, seed: int):
    method = replace(build_method(name, **OPTIONS[name]), end_ids=ENDS)
    data, tokens, _ = problem(seed)
    found = method.token_loss(*seen(data, method, tokens))

    ids_TK = data.teacher_TV.topk(method.needs.top_k or 1).indices
    if method.needs.support == "teacher_and_sampled":
        ids_TK = torch.cat([ids_TK, data.target_T[:, None]], dim=1)
    columns_TK = column_of(ids_TK)
    exact = method.token_loss(*views(merged_rows(data), ids_TK=columns_TK, mask_TK=first_of_each(columns_TK)))

    torch.testing.assert_close(found.loss_T, exact.loss_T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradient(found.loss_T, data), gradient(exact.loss_T, data), rtol=1e-9, atol=1e-9)
    assert found.stats.keys() == exact.stats.keys()
    for stat, value_T in exact.stats.items():
        torch.testing.assert_close(found.stats[stat].double(), value_T.double(), rtol=1e-6, atol=1e-9, msg=stat)


def test_the_metrics_of_an_end_are_those_of_the_class_by_hand():
    """Both end with certainty .8, each in its own way: no reverse KL, nothing rejected, the gap of the id drawn."""
    student = torch.tensor([0.5, 0.3, 0.2]).double().log()[None]
    teacher = torch.tensor([0.1, 0.7, 0.2]).double().log()[None]
    target_T = torch.tensor([0])
    outputs = TeacherOutputs(logprob_N=teacher[:, 0], end_logprob_NX=teacher[:, :2], entropy_N=entropy(teacher))
    tokens = TokenView(
        region_T=torch.tensor([2]),
        uniform_T=torch.tensor([0.99]),
        sequence_T=target_T,
        position_T=target_T,
        target_T=target_T,
        rollout_logprob_T=student[:, 0] - 0.25,
    )
    item = TrainPack(
        pack=cast(Pack, None),
        tokens=tokens,
        weight_N=torch.ones(1),
        outputs=ends_as_one(outputs, target_T, (0, 1)),
        end_ids=(0, 1),
    )
    out = LogProbs(logprob_TK=student[:, [0, 0, 1]], entropy_T=entropy(student), logsumexp_T=torch.zeros(1))
    method = build_method("tropd", prefix_schedule="none", outlier="mask")
    stats = {name: float(x) for name, x in method.token_loss(*views_of(item, student_rows(out, item))).stats.items()}
    assert stats["reverse_kl"] == pytest.approx(0.0, abs=1e-6)
    assert (stats["trusted_fraction"], stats["outlier_fraction"]) == (1.0, 0.0)
    assert stats["student_entropy"] == pytest.approx(0.5004, abs=1e-4)  # of .8 and .2, by hand
    assert stats["logprob_gap"] == pytest.approx(0.25, abs=1e-6)
