"""Scores of packs by a model that does not learn from them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_tropd.config.sections import Layout
from megatron_tropd.data.packing import pack
from megatron_tropd.engine.context import own_predictions
from megatron_tropd.engine.forward import run_packs
from megatron_tropd.engine.model import Model
from megatron_tropd.engine.step import model_logprob
from megatron_tropd.engine.views import StudentScores
from megatron_tropd.losses.end_class import at_ids, class_entropy, with_ends
from megatron_tropd.losses.vocab_parallel import linear_logprobs, linear_topk
from megatron_tropd.types import Int64Array, Pack, Rollout, single_turn


def score_packs(
    model: Model,
    packs: Sequence[Pack],
    *,
    vocab_size: int,
    temperature: float = 1.0,
    top_k: int = 0,
    end_ids: tuple[int, ...] = (),
) -> list[StudentScores | None]:
    """Return log-prob and entropy of every valid prediction, and its ``top_k`` most likely tokens, at the model's
    current weights; None off the last stage.

    ``end_ids`` count as one token, but for ``model_logprob_N``, which is of the id that was drawn.
    """

    def last_stage(number: int, hidden_ND: Tensor, weight_vD: Tensor) -> StudentScores:
        pack = packs[number]
        target_N = torch.from_numpy(own_predictions(pack, model.groups).target_N).to(model.device)
        ids_NJ, tp = with_ends(target_N[:, None], end_ids), model.groups.tp
        plain_N = None
        if temperature != 1.0:
            plain_N = model_logprob(hidden_ND, weight_vD, target_N, group=tp, vocab_size=vocab_size)
        if top_k:
            top = linear_topk(
                hidden_ND, weight_vD, top_k, ids_TJ=ids_NJ, group=tp, vocab_size=vocab_size, temperature=temperature
            )
            assert top.picked_logprob_TJ is not None
            picked_NJ, entropy_N, topk_NK = top.picked_logprob_TJ, top.entropy_T, top.ids_TK
        else:
            out = linear_logprobs(
                hidden_ND, weight_vD, ids_NJ, group=tp, vocab_size=vocab_size, temperature=temperature
            )
            picked_NJ, entropy_N, topk_NK = out.logprob_TK, out.entropy_T, None
        logprob_N, end_NX = picked_NJ[:, 0], picked_NJ[:, 1:]
        plain_N = logprob_N if plain_N is None else plain_N
        if end_ids:
            logprob_N = at_ids(logprob_N, target_N, end_ids, end_NX)
            entropy_N = class_entropy(entropy_N, end_NX)
        return StudentScores(logprob_N, entropy_N, plain_N, topk_NK)

    return run_packs(model, packs, last_stage) or [None] * len(packs)


def query_ids(scores: Sequence[StudentScores | None]) -> list[Tensor | None]:
    """Take the student's own most likely tokens of every pack, for the teacher to score; None where there are none."""
    return [None if score is None else score.topk_ids_NK for score in scores]


def pack_alone(token_ids: Int64Array, layout: Layout) -> list[list[Pack]]:
    """Put one sequence in a pack of its own, by replica; every token after the first counts."""
    empty = np.empty(0, np.float32)
    sequence = Rollout(
        sequence_id=0,
        prompt_index=0,
        token_ids=token_ids,
        region_L=single_turn(prompt=1, prefix=len(token_ids) - 1),
        sampling_logprob=empty,
        model_logprob=empty,
        finished=True,
    )
    multiple = 2 * layout.tensor * layout.context
    return pack([sequence], max_tokens=len(token_ids) + multiple, multiple_of=multiple)
