"""Fields that the families' ``config.json`` have in common, and the refusal of options that are not carried.

Defaults are those that `transformers` gives to an absent key, for checkpoints older than the key.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

from megatron_tropd.errors import CheckpointError
from megatron_tropd.types import Architecture

Config = Mapping[str, Any]

_ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# what the families' readers look at
_READ = _names(
    "architectures attention_bias decoder_sparse_step head_dim hidden_act hidden_size intermediate_size "
    "layer_types max_position_embeddings max_window_layers mlp_bias mlp_only_layers moe_intermediate_size "
    "norm_topk_prob num_attention_heads num_experts num_experts_per_tok num_hidden_layers "
    "num_key_value_heads num_local_experts partial_rotary_factor quantization_config rms_norm_eps "
    "rope_parameters rope_scaling rope_theta sliding_window tie_word_embeddings use_sliding_window "
    "vocab_size"
)
_ROPE_READ = {
    "rope_type",
    "type",
    "rope_theta",
    "partial_rotary_factor",
    *(n for ns in _ROPE_NEEDS.values() for n in ns),
}
# what changes no log-prob: names, ids of tokens (the tokenizer is asked), training's dropout and losses, classifiers,
# generation (``rollout`` and suites say how), and what `transformers` keeps for itself
_HARMLESS = _names(
    "attention_dropout attn_implementation bos_token_id chunk_size_feed_forward dtype eos_token_id "
    "id2label initializer_range is_decoder is_encoder_decoder label2id language max_length model_type "
    "name_or_path output_attentions output_hidden_states output_router_logits pad_token_id pretraining_tp "
    "problem_type return_dict router_aux_loss_coef router_jitter_noise tokenizer_class torch_dtype "
    "transformers_version unk_token_id use_cache use_return_dict unsloth_fixed unsloth_version"
)

logger = logging.getLogger(__name__)


def unread_fields(config: Config) -> list[str]:
    """List the settings of a ``config.json`` that are neither read nor known to change nothing."""
    # what begins with an underscore is a library's own
    found = [name for name in _set(config) if name not in _READ | _HARMLESS and not name.startswith("_")]
    for table in ("rope_scaling", "rope_parameters"):
        values = config.get(table)
        if isinstance(values, Mapping):
            found += [f"{table}.{name}" for name in _set(values) if name not in _ROPE_READ]
    return sorted(found)


def _set(table: Config) -> list[str]:
    return [name for name, value in table.items() if value not in (None, False, [], {}, "")]


@cache
def say_unread(family: str, names: tuple[str, ...]) -> None:
    """Name settings that are not read, once."""
    if names:
        own = " Its own code (auto_map) is never run." if "auto_map" in names else ""
        logger.warning(
            "config.json of a %s sets %s, which this family does not have and which is not read.%s If the model was "
            "trained with it, its log-probs are wrong here.",
            *(family, ", ".join(names), own),
        )


def refuse(config: Config, **expected: Any) -> None:
    """Refuse, by name, options that this family has but this package does not carry, before anything is read."""
    for option, value in expected.items():
        if config.get(option, value) not in (value, None):
            raise CheckpointError(
                f"config.json has {option}={config[option]!r}, which is not supported (only {value!r} is). "
                "Use a checkpoint without it."
            )


def common(config: Config, *, window: int | None = None, theta: float = 1e4) -> dict[str, Any]:
    """Read the fields that all families write alike. ``window``: tokens that a layer looks back. ``theta``: where
    the config has none.

    Up to ``window`` tokens a windowed layer is plainly causal, so longer sequences alone are beyond such a model.
    """
    refuse(config, hidden_act="silu", quantization_config=None, partial_rotary_factor=1.0)
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    theta, scaling = rope(config, theta)
    positions = int(config["max_position_embeddings"])
    window = window if window is not None and window < positions else None
    return {
        "family": config["architectures"][0],
        "num_layers": int(config["num_hidden_layers"]),
        "hidden_size": hidden,
        "ffn_size": int(config["intermediate_size"]),
        "num_heads": heads,
        "num_kv_heads": int(config.get("num_key_value_heads") or heads),
        "head_dim": int(config.get("head_dim") or hidden // heads),
        "vocab_size": int(config["vocab_size"]),
        "max_positions": positions if window is None else window,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "sliding_window": window,
        "norm_eps": float(config["rms_norm_eps"]),
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
    }


# sizes for which nothing can be built, or lists alone would fill the memory; the largest public models have 126 layers
# of width 16,384, 61 of 256 experts, and 262,144 tokens
_LIMITS = {
    "num_layers": (1, 2_000),
    "hidden_size": (1, 1 << 18),
    "ffn_size": (1, 1 << 22),
    "num_heads": (1, 1 << 14),
    "num_kv_heads": (1, 1 << 14),
    "head_dim": (1, 1 << 14),
    "vocab_size": (1, 1 << 24),
    "max_positions": (1, 1 << 34),
    "num_experts": (0, 1 << 14),
}
_MOST_EXPERTS = 1 << 18  # over all layers


def within_limits(architecture: Architecture) -> Architecture:
    """Return the same; CheckpointError when a size is none that a model has."""
    for name, (least, most) in _LIMITS.items():
        size = getattr(architecture, name)
        if not least <= size <= most:
            raise CheckpointError(f"config.json gives {name}={size}: it must be from {least} to {most:,}.")
    experts = architecture.num_layers * architecture.num_experts
    if experts > _MOST_EXPERTS:
        raise CheckpointError(f"config.json gives {experts:,} experts in all: there must be at most {_MOST_EXPERTS:,}.")
    return architecture


def rope(config: Config, default_theta: float) -> tuple[float, dict[str, float | str] | None]:
    """Read the base and the parameters of a scaled RoPE from where transformers 5 reads them.

    It keeps both in ``rope_parameters``, earlier versions separately; a ``rope_scaling`` also there takes its
    place, base and all (``RotaryEmbeddingConfigMixin.convert_rope_params_to_dict``).
    """
    table = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta = float(table.get("rope_theta") or config.get("rope_theta") or default_theta)
    # one set of parameters per kind of layer is a table of tables
    nested = [name for name, value in table.items() if isinstance(value, Mapping)]
    kind = nested or table.get("rope_type", table.get("type", "default"))
    if nested or kind not in _ROPE_NEEDS:
        raise CheckpointError(
            f"config.json requests RoPE of type {kind!r}, which is not supported, only {', '.join(_ROPE_NEEDS)} are."
        )
    refuse(table, partial_rotary_factor=1.0)
    _say_if_replaced(config, theta)
    if kind == "default":
        return theta, None
    values = dict(table)
    if kind == "llama3":
        # of these families it counts in the table alone; where it is not, the model was never made longer
        values.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    return theta, {"type": kind, **{name: float(values[name]) for name in _ROPE_NEEDS[kind]}}


def _say_if_replaced(config: Config, theta: float) -> None:
    """Warn of a base that is written down and does not count: it is easily lost with the table that holds it."""
    table = config.get("rope_parameters") or {}
    lost = table.get("rope_theta") if config.get("rope_scaling") and isinstance(table, Mapping) else None
    if lost is not None and float(lost) != theta:
        warnings.warn(
            f"config.json has both rope_scaling and rope_parameters: as in transformers 5 only the former counts, with "
            f"rope_theta={theta:g}, and rope_theta={lost} of the latter does not. Write one table with all values.",
            stacklevel=2,
        )


def window(config: Config, *, used: bool, default: int | None = 4096) -> int | None:
    """Return the tokens that some layer looks back; None where every layer looks back all the way."""
    kinds = config.get("layer_types") or []
    strange = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if strange:
        raise CheckpointError(f"config.json has layer_types={strange}, which are not supported.")
    window = config.get("sliding_window", default)
    return int(window) if window is not None and (used or "sliding_attention" in kinds) else None


def qwen_window(config: Config) -> int | None:
    """Return the window of a dense Qwen, whose first ``max_window_layers`` layers look back all the way unless
    ``layer_types`` says.
    """
    some = config.get("layer_types") is None and config.get("max_window_layers", 28) < config["num_hidden_layers"]
    return window(config, used=some and bool(config.get("use_sliding_window", False)))


def experts(config: Config, *, normalized: bool) -> dict[str, Any]:
    # both names are in use for both families, and in transformers they are one
    names = ("num_local_experts", "num_experts")
    if None not in (given := [config.get(name) for name in names]) and given[0] != given[1]:
        raise CheckpointError(
            f"config.json has num_local_experts={given[0]} and num_experts={given[1]}, which are one setting. "
            "Take out the wrong one."
        )
    count = int(config["num_local_experts"] if config.get("num_experts") is None else config["num_experts"])
    chosen = int(config["num_experts_per_tok"])
    if not 1 <= chosen <= count:
        raise CheckpointError(
            f"config.json has num_experts_per_tok={chosen}, of {count} experts. It must be from 1 to {count}."
        )
    if chosen == 1 and normalized:
        raise CheckpointError(
            "config.json has num_experts_per_tok=1 and weights that add up to 1: every token's expert would have "
            "weight 1 whatever the router says, which Megatron-Core does not do."
        )
    return {"num_experts": count, "experts_per_token": chosen, "normalize_experts": normalized}
