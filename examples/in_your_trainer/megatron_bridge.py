"""Distill in Megatron-Bridge: its ``forward_step``, with the policy gradient of TrOPD's authors' baseline, ``opd``.

Register ``hand_on_hidden_states`` as a pre-wrap hook of the model provider, and pass this ``forward_step`` to
``pretrain`` or ``finetune``. The batch's tokens were sampled from the student; ``label_logprobs`` ``[b, s]`` are the
teacher's of them.
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

METHOD = build_method("opd")
VOCAB_SIZE = 101


def forward_step(
    state: Any, data_iterator: Iterator[dict[str, Tensor]], model: Any, return_schedule_plan: bool = False
) -> tuple[Tensor, Any]:
    """Run one microbatch. ``state`` is Bridge's; nothing here needs it."""
    del state, return_schedule_plan
    batch = next(data_iterator)
    output = model(batch["tokens"], batch["position_ids"], batch["attention_mask"])
    return output, partial(policy_gradient, batch, model)


def policy_gradient(batch: dict[str, Tensor], model: Any, hidden_bsD: Tensor) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Return the sum of the loss, its number of tokens, and what to log."""
    inner = unwrapped(model)
    group = inner.pg_collection.tp
    hidden_TD = enter_vocabulary(hidden_bsD, group, sequence_parallel=inner.config.sequence_parallel)
    label_T, teacher_T, mask_T = (
        batch[name].transpose(0, 1).reshape(-1) for name in ("labels", "label_logprobs", "loss_mask")
    )
    found = linear_logprobs(hidden_TD, output_weight(model), label_T[:, None], group=group, vocab_size=VOCAB_SIZE)
    logprob_T, zeros_T = found.logprob_TK[:, 0], torch.zeros_like(label_T)
    student = StudentView(logprob_T=logprob_T, old_logprob_T=logprob_T.detach())
    tokens = TokenView(
        region_T=torch.full_like(label_T, Region.CONTINUATION, dtype=torch.uint8),
        uniform_T=torch.zeros_like(teacher_T),
        sequence_T=zeros_T,
        position_T=zeros_T,
        target_T=label_T,
        rollout_logprob_T=logprob_T.detach(),
    )
    loss_T = METHOD.token_loss(student, TeacherView(logprob_T=teacher_T), tokens).loss_T
    loss = (loss_T * mask_T).sum()
    return loss, mask_T.sum().int(), {"opd": torch.stack([loss.detach(), mask_T.sum()])}
