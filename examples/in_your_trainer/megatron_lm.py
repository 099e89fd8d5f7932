"""Distill in Megatron-LM: its ``forward_step`` and ``loss_func``, with top-k forward KL to a teacher's recorded scores.

In ``pretrain_gpt.py``: call ``hand_on_hidden_states(model)`` at the end of ``model_provider``, and pass this
``forward_step`` to ``pretrain``. The batch also carries ``topk_ids`` and ``topk_logprobs``, ``[b, s, K]``, of the
teacher, and its log-prob of the label, ``[b, s]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_tropd.losses.vocab_parallel import enter_vocabulary, linear_logprobs, output_weight, unwrapped
from megatron_tropd.methods import build_method
from megatron_tropd.types import Region, StudentView, TeacherView, TokenView

METHOD = build_method("fkl", form="topk", k=3, tail="bucket")
VOCAB_SIZE = 101


def forward_step(data_iterator: Iterator[dict[str, Tensor]], model: Any) -> tuple[Tensor, Any]:
    """Run one microbatch; the schedule calls what is returned with the model's output on the last stage."""
    batch = next(data_iterator)
    output = model(batch["tokens"], batch["position_ids"], batch["attention_mask"])
    return output, partial(loss_func, batch, model)


def loss_func(batch: dict[str, Tensor], model: Any, hidden_bsD: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return the sum of the loss, its number of tokens (``--calculate-per-token-loss``), and what to log."""
    inner = unwrapped(model)
    group = inner.pg_collection.tp
    hidden_TD = enter_vocabulary(hidden_bsD, group, sequence_parallel=inner.config.sequence_parallel)
    ids_TK, teacher_TK, label_T, teacher_T, mask_T = (
        batch[name].transpose(0, 1).flatten(0, 1)
        for name in ("topk_ids", "topk_logprobs", "labels", "label_logprobs", "loss_mask")
    )
    ids = torch.cat([label_T[:, None], ids_TK], dim=1)
    found = linear_logprobs(hidden_TD, output_weight(model), ids, group=group, vocab_size=VOCAB_SIZE)
    logprob_T, support_TK = found.logprob_TK[:, 0], found.logprob_TK[:, 1:]
    student = StudentView(
        logprob_T=logprob_T,
        old_logprob_T=logprob_T.detach(),
        support_logprob_TK=support_TK,
        support_logtail_T=(-support_TK.logsumexp(1).exp()).log1p(),  # log of what the support leaves
    )
    teacher = TeacherView(
        logprob_T=teacher_T,
        support_ids_TK=ids_TK,
        support_logprob_TK=teacher_TK,
        support_logtail_T=(-teacher_TK.logsumexp(1).exp()).log1p(),
    )
    loss_T = METHOD.token_loss(student, teacher, _tokens(label_T, logprob_T.detach())).loss_T
    loss = (loss_T * mask_T).sum()
    return loss, mask_T.sum().int(), {"fkl": torch.stack([loss.detach(), mask_T.sum()])}


def _tokens(label_T: Tensor, logprob_T: Tensor) -> TokenView:
    zeros_T = torch.zeros_like(label_T)
    regions_T = torch.full_like(label_T, Region.CONTINUATION, dtype=torch.uint8)
    return TokenView(
        region_T=regions_T,
        uniform_T=torch.zeros_like(logprob_T),
        sequence_T=zeros_T,
        position_T=zeros_T,
        target_T=label_T,
        rollout_logprob_T=logprob_T,
    )
