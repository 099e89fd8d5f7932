"""Distill in a Hugging Face ``Trainer`` without model parallelism: generalized JSD to a teacher, no logits in memory.

``Distiller(teacher=..., model=..., args=..., train_dataset=...)``; rows have ``input_ids``, ``attention_mask`` and
``labels``, of which -100 carries no loss.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

from megatron_tropd.losses.vocab_parallel import linear_divergence


class Distiller(transformers.Trainer):  # type: ignore[misc]
    """Trainer whose loss is the mean divergence over the tokens that have a label."""

    def __init__(self, *args: Any, teacher: Any, beta: float = 0.5, **options: Any) -> None:
        super().__init__(*args, **options)
        self.teacher, self.beta = teacher.eval().requires_grad_(False).to(self.args.device), beta

    def compute_loss(
        self, model: Any, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, None]:
        """Compare the two models at every position that predicts a label."""
        inner = getattr(model, "module", model)  # within DDP, which has to see the call
        keep = inputs["labels"][:, 1:] != -100
        given: dict[str, Any] = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        given |= {"output_hidden_states": True, "logits_to_keep": 1}
        hidden_TD = model(**given).hidden_states[-1][:, :-1][keep]
        with torch.no_grad():
            teacher_TE = self.teacher(**given).hidden_states[-1][:, :-1][keep]
        loss_T = linear_divergence(
            hidden_TD,
            inner.lm_head.weight,
            teacher_TE,
            self.teacher.lm_head.weight,
            kind="jsd",
            beta=self.beta,
            vocab_size=inner.config.vocab_size,
        )
        loss = loss_T.mean()
        return (loss, None) if return_outputs else loss
