"""Build Megatron-Core GPT models that stop at the final hidden states.

The output layer's weight is there (it registers with DDP and checkpoints as usual), but its product with the hidden
states is left to the vocabulary-parallel losses, so logits are never materialized.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_tropd.config.sections import Layout
from megatron_tropd.engine.attention import PlannedAttention, RMSNorm
from megatron_tropd.engine.experts import expert_options, use_balancing_router
from megatron_tropd.engine.lora import Adapters
from megatron_tropd.engine.offload import OffloadedTensors, OffloadStats
from megatron_tropd.engine.patches import cuda_calls
from megatron_tropd.engine.patches.cuda_calls import cuda_names_mean_cpu
from megatron_tropd.engine.patches.parallel_state import use_parallel_state
from megatron_tropd.errors import ConfigError
from megatron_tropd.models.rotary import rotary_frequencies
from megatron_tropd.parallel.groups import Groups
from megatron_tropd.types import Architecture

_VOCAB_MULTIPLE = 64


class HiddenStateGPT(GPTModel):
    """A GPTModel whose last stage answers with final hidden states ``[s, b, D]`` (normed), not logits.

    ``position_ids`` are honored token by token (Megatron's own RoPE counts from the start of the tensor), which is
    what packed streams and cached decoding with rows of different lengths need.
    """

    # Whether what enters the first layer is to have a gradient, which nobody reads: a recomputed layer is
    # differentiated only where an input of it is, though it be for the sake of adapters within it.
    differentiate_inputs = False

    def _preprocess(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        decoder_input: Tensor | None = None,
        inference_context: Any = None,
        packed_seq_params: Any = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor, None, None, None, Tensor | None]:
        if self.pre_process and decoder_input is None:
            decoder_input = self.embedding(input_ids=input_ids, position_ids=position_ids)
            if self.differentiate_inputs and torch.is_grad_enabled():
                decoder_input.requires_grad_()
        if padding_mask is not None and self.config.sequence_parallel:
            # activations are cut along the sequence between tensor-parallel regions
            padding_mask = padding_mask.chunk(self.pg_collection.tp.size(), dim=1)[self.pg_collection.tp.rank()]
        # [max, 1, 1, d], cached by Megatron; as if packed, or context parallelism would cut it
        table = self.rotary_pos_emb(self.max_sequence_length, packed_seq=True)
        rotary = table[:, 0][position_ids.transpose(0, 1)]  # [s, b, 1, d]
        return decoder_input, rotary, None, None, None, padding_mask

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    def output_weight(self) -> Tensor:
        """Return ``[v, D]``: this rank's shard of the output embedding (the input embedding when tied)."""
        if self.share_embeddings_and_output_weights:
            weight: Tensor = self.shared_embedding_or_output_weight()
            return weight
        own: Tensor = self.output_layer.weight
        return own


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """One rank's part of a model: its chunks (one, or one per virtual stage) and how they are laid out."""

    architecture: Architecture
    groups: Groups
    config: TransformerConfig
    chunks: tuple[HiddenStateGPT, ...]
    device: torch.device
    weights: OffloadedTensors | None = None  # of a model that is on the device only while in use: see `with_offload`
    pending: list[Callable[[], None]] = field(default_factory=list)  # what makes weights whole that are under way
    adapters: Adapters | None = None  # of a model whose own weights are frozen: see `engine.adapters`
    base_only: bool = False  # the same weights without the adapters: see `frozen_base`

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.config.params_dtype
        return dtype

    def layer_offsets(self) -> list[int]:
        """Return the global number of the first layer of each chunk."""
        return [
            get_transformer_layer_offset(self.config, self._vp_stage(i), pp_rank=self.groups.stage)
            for i in range(len(self.chunks))
        ]

    def local_experts(self) -> range:
        """List the numbers of the experts of each layer that this rank holds; empty in a dense model."""
        share = self.architecture.num_experts // self.groups.layout.expert
        first = self.groups.pg.ep.rank() * share
        return range(first, first + share)

    def freeze(self) -> Model:
        """Freeze the model for inference: it is never trained."""
        for chunk in self.chunks:
            chunk.eval()
            chunk.requires_grad_(False)
        return self

    def with_offload(self, offload_stats: OffloadStats | None = None) -> Model:
        """Offload the weights of the frozen model: they are on the device only within ``present()``.

        To be used in place of this one; ``offload_stats`` counts what that moves.
        """
        weights = OffloadedTensors(
            "a frozen model",
            lambda: (parameter for chunk in self.chunks for parameter in chunk.parameters()),
            self.device,
            contents="constant",
            offload_stats=offload_stats,
        )
        for chunk in self.chunks:
            chunk.register_forward_pre_hook(lambda *_: weights.check())
        weights.offload()
        return replace(self, weights=weights)

    def frozen_base(self) -> Model:
        """Return the model that the adapters are beside, which they have no part in: it takes no memory of its own."""
        return replace(self, base_only=True)

    def in_use(self, histories: Mapping[int, Tensor]) -> AbstractContextManager[None]:
        """Let passes within the block go through the adapters, or past them if this is the frozen base.

        ``histories``: by which their inputs are dropped, of each pass, by the id of its plan; empty drops none.
        """
        return nullcontext() if self.adapters is None else self.adapters.used(histories, on=not self.base_only)

    def present(self) -> AbstractContextManager[None]:
        """Keep the weights on the device within the block."""
        return nullcontext() if self.weights is None else self.weights.present()

    def finish_pending_gathers(self) -> None:
        """Finish the gathers that an update has left under way: the weights are about to be read. Collective then.

        Raises:
            EngineError: they are off the device.
        """
        if self.weights is not None:
            self.weights.check()
        for complete in self.pending:
            complete()

    def _vp_stage(self, chunk: int) -> int | None:
        return chunk if self.groups.layout.virtual_pipeline > 1 else None


def padded_vocab_size(vocab_size: int, tensor: int) -> int:
    """Return the rows of the embedding over all shards: the next multiple of 64 x tensor-parallel size."""
    multiple = _VOCAB_MULTIPLE * tensor
    return -(-vocab_size // multiple) * multiple


def build_model(
    architecture: Architecture,
    groups: Groups,
    *,
    dtype: torch.dtype,
    device: torch.device,
    recompute: str = "none",
    balance: float = 0.0,
    initialize: bool = True,
    seed: int = 0,
) -> Model:
    """Build this rank's chunks with random weights (``seed`` is layout-dependent: load weights to compare layouts).

    Args:
        balance: coefficient of the load-balancing loss of a mixture of experts.
        initialize: False leaves the weights as memory happens to be, for a model that is about to be loaded: Megatron
            would make every tensor-parallel matrix whole before it cuts it.
    """
    cuda_calls.install()
    model_parallel_cuda_manual_seed(
        seed + 1, inference_rng_tracker=True, force_reset_rng=True, tp_rank=groups.tensor_rank, ep_rank=0, etp_rank=0
    )
    torch.manual_seed(seed + 1000 * groups.stage + groups.tensor_rank)
    config = transformer_config(architecture, groups, dtype=dtype, recompute=recompute, balance=balance)
    config.perform_initialization = initialize
    virtual = groups.layout.virtual_pipeline
    with use_parallel_state(groups), cuda_names_mean_cpu():
        chunks = tuple(
            _build_chunk(architecture, groups, config, stage if virtual > 1 else None).to(device)
            for stage in range(virtual)
        )
    if not initialize:
        _mark_shards(chunks)
    return Model(architecture=architecture, groups=groups, config=config, chunks=chunks, device=device)


def _mark_shards(chunks: Iterable[torch.nn.Module]) -> None:
    """Mark every weight with its sharding, by which the gradient norm counts it once or once per rank.

    Megatron does so only where it initializes a weight.
    """
    cuts = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for chunk in chunks:
        for module in chunk.modules():
            weight = getattr(module, "weight", None)  # a tied output layer has none
            if type(module) in cuts and weight is not None:
                set_tensor_model_parallel_attributes(weight, True, cuts[type(module)], 1)


def check_divisible(architecture: Architecture, layout: Layout) -> None:
    """Refuse layouts this architecture cannot be cut into, naming the sizes that work."""
    for what, size in (("query heads", architecture.num_heads), ("key/value heads", architecture.num_kv_heads)):
        if size % layout.tensor:
            raise ConfigError(
                f"tensor parallel size {layout.tensor} does not divide the model's {size} {what}. "
                f"Choose a divisor of {architecture.num_kv_heads}."
            )
    if architecture.ffn_size % layout.tensor:
        raise ConfigError(
            f"tensor parallel size {layout.tensor} does not divide the model's ffn size {architecture.ffn_size}. "
            f"Choose a divisor of {math.gcd(architecture.num_kv_heads, architecture.ffn_size)}."
        )
    _check_experts(architecture, layout)
    stages = layout.pipeline * layout.virtual_pipeline
    if architecture.num_layers < stages:
        raise ConfigError(
            f"pipeline*virtual_pipeline = {layout.pipeline}*{layout.virtual_pipeline} = {stages} stages for a model "
            f"of {architecture.num_layers} layers. Use at most {architecture.num_layers} stages."
        )
    if layout.virtual_pipeline > 1 and architecture.num_layers % stages:
        pairs = [(p, v) for p in range(2, architecture.num_layers + 1) for v in range(1, architecture.num_layers + 1)]
        even = [(p, v) for p, v in pairs if architecture.num_layers % (p * v) == 0]
        pipeline, virtual = _nearest((layout.pipeline, layout.virtual_pipeline), even)
        raise ConfigError(
            f"{architecture.num_layers} layers cannot be split evenly over {stages} interleaved stages. "
            f"The nearest that can: pipeline={pipeline}, virtual_pipeline={virtual}."
        )
    if layout.virtual_pipeline == 1 and architecture.num_layers % layout.pipeline:
        uneven_stages(architecture.num_layers, layout.pipeline)


def _nearest(requested: tuple[int, int], pairs: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """Return the pair nearest to the requested one, by the ranks it takes first."""
    return min(pairs, key=lambda pair: (abs(pair[0] - requested[0]), abs(pair[1] - requested[1])), default=(1, 1))


def _check_experts(architecture: Architecture, layout: Layout) -> None:
    if layout.expert > 1 and not architecture.num_experts:
        raise ConfigError(f"expert parallel size {layout.expert} for a model without experts. Use expert=1.")
    if architecture.num_experts % layout.expert:
        raise ConfigError(
            f"expert parallel size {layout.expert} does not divide the model's {architecture.num_experts} experts. "
            f"Choose a divisor of {architecture.num_experts}."
        )


def check_trainable(architecture: Architecture, layout: Layout) -> None:
    """Refuse layouts that serve this architecture for inference only."""
    if architecture.num_experts and layout.tensor > 1 and not layout.sequence:
        raise ConfigError(
            f"tensor parallel size {layout.tensor} without sequence parallelism: every tensor rank would send the same "
            "tokens to the experts, whose gradients would count them that many times. Set sequence to true."
        )


def transformer_config(
    architecture: Architecture, groups: Groups, *, dtype: torch.dtype, recompute: str = "none", balance: float = 0.0
) -> TransformerConfig:
    """Build Megatron's description of the model under this layout."""
    layout = groups.layout
    check_divisible(architecture, layout)
    options = expert_options(architecture, balance=balance)
    if recompute == "full":
        options |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif recompute == "selective":
        options |= {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    if layout.pipeline > 1 and layout.virtual_pipeline == 1 and architecture.num_layers % layout.pipeline:
        options |= uneven_stages(architecture.num_layers, layout.pipeline)
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_size,
        num_attention_heads=architecture.num_heads,
        num_query_groups=architecture.num_kv_heads,
        kv_channels=architecture.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=architecture.norm_eps,
        qk_layernorm=architecture.qk_norm,
        add_qkv_bias=architecture.qkv_bias,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        sequence_parallel=layout.sequence and layout.tensor > 1,
        calculate_per_token_loss=True,
        # packs differ in length, so every stage receives the shape first
        variable_seq_lengths=layout.pipeline > 1,
        moe_token_dispatcher_type="alltoall",  # the only one that takes variable lengths
        # batched point-to-point is silently wrong with interleaved stages (gradients off 40-93x on gloo)
        batch_p2p_comm=False,
        batch_p2p_sync=False,
        overlap_p2p_comm=layout.virtual_pipeline > 1,
        use_cpu_initialization=not torch.cuda.is_available(),
        masked_softmax_fusion=False,
        bias_activation_fusion=fuses_activations(torch.cuda.is_available()),
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **options,
    )


def fuses_activations(gpu: bool) -> bool:
    """Say whether SwiGLU is one kernel, compiled by torch, that keeps its input alone for backward. On a CPU compiling
    takes longer than it saves.
    """
    return gpu


def uneven_stages(num_layers: int, pipeline: int) -> dict[str, int]:
    """Put fewer layers on the last stage, which also carries the loss; the others share evenly."""
    last_stage = _last_stage(num_layers, pipeline)
    if last_stage:
        return {"num_layers_in_last_pipeline_stage": last_stage}
    works = [size for size in range(1, num_layers + 1) if num_layers % size == 0 or _last_stage(num_layers, size)]
    below, above = (max(s for s in works if s < pipeline), min((s for s in works if s > pipeline), default=0))
    raise ConfigError(
        f"{num_layers} layers cannot be split over {pipeline} stages with only the last one shorter. "
        f"The nearest pipeline sizes that can: {below}{f' and {above}' if above else ''}."
    )


def _last_stage(num_layers: int, pipeline: int) -> int:
    """Return the layers of a last stage that is shorter than the others, which are equal; 0 when there is none such."""
    lengths = range(num_layers // pipeline, 0, -1)
    return next((last for last in lengths if pipeline > 1 and (num_layers - last) % (pipeline - 1) == 0), 0)


def _build_chunk(
    architecture: Architecture, groups: Groups, config: TransformerConfig, vp_stage: int | None
) -> HiddenStateGPT:
    layout = groups.layout
    first = groups.is_first_stage and (vp_stage in (None, 0))
    last = groups.is_last_stage and (vp_stage in (None, layout.virtual_pipeline - 1))
    chunk = HiddenStateGPT(
        config,
        _block_spec(config, groups, vp_stage),
        vocab_size=padded_vocab_size(architecture.vocab_size, layout.tensor),
        max_sequence_length=architecture.max_positions,
        pre_process=first,
        post_process=last,
        parallel_output=True,
        share_embeddings_and_output_weights=architecture.tied_embeddings,
        position_embedding_type="rope",
        rotary_base=architecture.rope_theta,
        pg_collection=groups.pg,
        vp_stage=vp_stage,
    )
    rotary = chunk.rotary_pos_emb
    rotary.inv_freq = rotary_frequencies(architecture).to(rotary.inv_freq.device)
    for layer in chunk.decoder.layers if config.num_moe_experts else ():
        layer.mlp.router.tokens_of_rows = partial(_tokens_of_rows, layer.self_attention.core_attention)
    return chunk


def _tokens_of_rows(attention: PlannedAttention) -> Tensor | None:
    """Return how many tokens each row counts for in the pass of this layer, of which attention comes first.

    A recomputed layer attends again, too: this is the pack that it is recomputed for.
    """
    return getattr(attention.last_plan, "tokens_r", None)


def _block_spec(config: TransformerConfig, groups: Groups, vp_stage: int | None) -> TransformerBlockSubmodules:
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm, normalization=config.normalization
    )
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PlannedAttention
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = RMSNorm
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if config.num_moe_experts:
        use_balancing_router(layer.submodules.mlp)
    count = get_num_layers_to_build(config, vp_stage, pp_rank=groups.stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * count, layer_norm=RMSNorm)
