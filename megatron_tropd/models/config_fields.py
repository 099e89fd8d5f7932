"""Fields that the families' ``config.json`` have in common, and the refusal of options that are not carried.

Defaults are those that `transformers` gives to an absent key, for checkpoints older than the key.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_tropd.errors import CheckpointError

Config = Mapping[str, Any]

_ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def refuse(config: Config, **expected: Any) -> None:
    """Options this family has but this package does not carry are refused by name, before anything is read."""
    for option, value in expected.items():
        if config.get(option, value) not in (value, None):
            raise CheckpointError(
                f"config.json has {option}={config[option]!r}, which is not supported (only {value!r} is). "
                "Use a checkpoint without it."
            )


def common(config: Config, *, window: int | None = None, theta: float = 1e4) -> dict[str, Any]:
    """What all families write alike. ``window``: tokens that a layer looks back. ``theta``: where the config has none.

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


def rope(config: Config, default_theta: float) -> tuple[float, dict[str, float | str] | None]:
    """Base, and what a scaled RoPE is made of. transformers 5 keeps both in ``rope_parameters``, earlier ones apart."""
    table = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(table.get("rope_theta") or config.get("rope_theta") or default_theta)
    # one set of parameters per kind of layer is a table of tables
    nested = [name for name, value in table.items() if isinstance(value, Mapping)]
    kind = nested or table.get("rope_type", table.get("type", "default"))
    if nested or kind not in _ROPE_NEEDS:
        raise CheckpointError(
            f"config.json asks for RoPE of type {kind!r}, which is not supported, only {', '.join(_ROPE_NEEDS)} are."
        )
    refuse(table, partial_rotary_factor=1.0)
    if kind == "default":
        return theta, None
    return theta, {"type": kind, **{name: float(table[name]) for name in _ROPE_NEEDS[kind]}}


def window(config: Config, *, used: bool, default: int | None = 4096) -> int | None:
    """Tokens that some layer looks back; None where every layer looks back all the way."""
    kinds = config.get("layer_types") or []
    strange = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if strange:
        raise CheckpointError(f"config.json has layer_types={strange}, which are not supported.")
    window = config.get("sliding_window", default)
    return int(window) if window is not None and (used or "sliding_attention" in kinds) else None


def qwen_window(config: Config) -> int | None:
    """Of a dense Qwen, whose first ``max_window_layers`` layers look back all the way unless ``layer_types`` says."""
    some = config.get("layer_types") is None and config.get("max_window_layers", 28) < config["num_hidden_layers"]
    return window(config, used=some and bool(config.get("use_sliding_window", False)))


def experts(config: Config, *, normalized: bool) -> dict[str, Any]:
    # both names are in use for both families
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
