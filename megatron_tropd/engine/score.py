"""What a model says about packs without learning from them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_tropd.engine.batch import StudentScores
from megatron_tropd.engine.forward import run_packs, valid_positions
from megatron_tropd.engine.model import Model
from megatron_tropd.losses.vocab_parallel import linear_logprobs
from megatron_tropd.types import Pack


def score_packs(
    model: Model, packs: Sequence[Pack], *, vocab_size: int, temperature: float = 1.0
) -> list[StudentScores | None]:
    """Log-prob and entropy of every valid prediction at the model's current weights; None off the last stage."""

    def last_stage(number: int, hidden_ND: Tensor, weight_vD: Tensor) -> StudentScores:
        pack = packs[number]
        target_N = torch.from_numpy(pack.target_T[valid_positions(pack)]).to(model.device)
        out = linear_logprobs(
            hidden_ND,
            weight_vD,
            target_N[:, None],
            group=model.groups.tp,
            vocab_size=vocab_size,
            temperature=temperature,
        )
        return StudentScores(out.logprob_TK[:, 0], out.entropy_T)

    return run_packs(model, packs, last_stage) or [None] * len(packs)
