"""Mixtures of experts: how Megatron-Core's MoE layer is put together here, and the load balancing of its router."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from megatron_tropd.engine.patches.router_gemm import define_te_general_gemm
from megatron_tropd.types import Architecture

define_te_general_gemm()


class BalancingRouter(TopKRouter):
    """Megatron's router with a load-balancing loss that means the same under every layout.

    megatron-core 0.16 weighs the loss by the tokens of one tensor- and context-parallel rank, which divides it by the
    number of these ranks (https://github.com/NVIDIA/Megatron-LM/pull/5047).
    """

    # how many tokens each row of the pass under way counts for; None, or a result of None: one each
    tokens_of_rows: Callable[[], Tensor | None] | None = None

    def _apply_aux_loss(
        self, probs: Tensor, scores_for_aux_loss: Tensor, routing_map: Tensor, with_padding_mask: bool = False
    ) -> Tensor:
        """Attach ``coefficient * tokens * E * sum_e f_e p_e`` to the backward pass, this rank's share of it.

        ``f_e`` is the fraction of choices that fell on expert e and ``p_e`` the mean probability it was given, over the
        pack's unmasked tokens on all tensor- and context-parallel ranks (Switch Transformer, eq. 4, for top-k). The
        trainer divides the whole gradient by its token count, which leaves a mean over tokens. A row that several
        tokens share counts as many times.
        """
        del with_padding_mask  # masked tokens are already out of scores and map
        coefficient, experts = self.get_aux_loss_coeff("aux_loss"), scores_for_aux_loss.size(1)
        tokens_r = None if self.tokens_of_rows is None else self.tokens_of_rows()
        if tokens_r is not None:
            if len(tokens_r) > len(probs):  # activations are cut along the sequence between tensor-parallel regions
                tokens_r = tokens_r.chunk(self.tp_group.size())[self.tp_group.rank()]
            scores_for_aux_loss = scores_for_aux_loss * tokens_r[:, None]
            routing_map = routing_map * tokens_r[:, None]
        choices_E = routing_map.sum(dim=0, dtype=scores_for_aux_loss.dtype)
        if self.tp_cp_group.size() > 1:
            dist.all_reduce(choices_E, group=self.tp_cp_group)
        fraction_E = choices_E / choices_E.sum().clamp(min=1)
        loss = coefficient * experts * (fraction_E * scores_for_aux_loss.sum(dim=0)).sum()
        balanced: Tensor = MoEAuxLossAutoScaler.apply(probs, loss)
        return balanced


def expert_options(architecture: Architecture, *, balance: float) -> dict[str, Any]:
    """Return the part of Megatron's ``TransformerConfig`` that is about experts; empty for a dense model."""
    if not architecture.num_experts:
        return {}
    return {
        "num_moe_experts": architecture.num_experts,
        "moe_ffn_hidden_size": architecture.ffn_size,
        "moe_router_topk": architecture.experts_per_token,
        # softmax over the chosen experts is softmax over all, divided by what the chosen ones have of it
        "moe_router_pre_softmax": not architecture.normalize_experts,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_aux_loss_coeff": balance,
        # in bf16 experts near a tie would be chosen by rounding, in another way than Hugging Face's and vLLM's
        "moe_router_dtype": "fp32",
    }


@contextmanager
def without_balancing(config: Any) -> Iterator[None]:
    """Switch the load-balancing loss off within the block: gradients are those of the method alone."""
    before, config.moe_aux_loss_coeff = config.moe_aux_loss_coeff, 0.0
    try:
        yield
    finally:
        config.moe_aux_loss_coeff = before


def use_balancing_router(mlp: ModuleSpec) -> None:
    """Swap the router in the spec of a MoE layer."""
    mlp.submodules.router = BalancingRouter
