"""Distill in a plain megatron-core loop: reverse KL to the teacher over the full vocabulary, and no logits in memory.

Student and teacher are two ``GPTModel`` on the same ranks. Call ``prepare`` once, before DDP wraps the student, and
``step`` per batch, between ``optimizer.zero_grad`` and ``finalize_model_grads``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from megatron_tropd.losses.vocab_parallel import (
    enter_vocabulary,
    hand_on_hidden_states,
    linear_divergence,
    output_weight,
)


def prepare(student: Any, teacher: Any) -> None:
    """Have both models answer with hidden states; the teacher is never trained."""
    for model in (student, teacher):
        hand_on_hidden_states(model)
    teacher.eval().requires_grad_(False)


def step(student: Any, teacher: Any, batch: dict[str, Tensor], *, group: Any, vocab_size: int) -> Tensor:
    """Add the batch's gradients; return its loss, a mean over the tokens that ``loss_mask`` counts.

    ``group``: the tensor-parallel ranks, over which both models share one vocabulary of ``vocab_size`` ids.
    """
    inputs = (batch["tokens"], batch["position_ids"], batch["attention_mask"])
    parallel = student.config.sequence_parallel
    hidden_TD = enter_vocabulary(student(*inputs), group, sequence_parallel=parallel)
    with torch.no_grad():
        teacher_TE = enter_vocabulary(teacher(*inputs), group, sequence_parallel=parallel)
    loss_T = linear_divergence(
        hidden_TD,
        output_weight(student),
        teacher_TE,
        output_weight(teacher),
        kind="reverse_kl",
        group=group,
        vocab_size=vocab_size,
    )
    mask_T = batch["loss_mask"].transpose(0, 1).reshape(-1)
    loss = (loss_T * mask_T).sum() / mask_T.sum()
    loss.backward()
    return loss.detach()
