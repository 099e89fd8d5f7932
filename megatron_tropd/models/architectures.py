"""Reading ``config.json``: the sizes of a model, or a refusal that names what this package does not carry.

Defaults are those that `transformers` gives to an absent key, for checkpoints older than the key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from megatron_tropd.errors import CheckpointError
from megatron_tropd.types import Architecture

Config = Mapping[str, Any]

_ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# close relatives of the families below that would load and be another model
_REFUSED = {
    "GemmaForCausalLM": "its norms multiply by 1 + weight and its embedding is scaled",
    "Gemma2ForCausalLM": "it normalises after attention and MLP, alternates sliding and global layers and caps its "
    "logits, which the fused losses and Megatron-Core's layers do not",
    "Gemma3ForCausalLM": "it normalises after attention and MLP and alternates sliding and global layers with RoPE of "
    "their own, which Megatron-Core's layers do not",
    "Gemma3ForConditionalGeneration": "it also sees images",
}


def architecture_of(config: Config) -> Architecture:
    """The ``Architecture`` of an HF ``config.json``.

    Raises:
        CheckpointError: the architecture, or an option of it, is not supported; a required key is missing.
    """
    if not isinstance(config, Mapping):
        raise CheckpointError(f"config.json holds a {type(config).__name__}, not the settings of a model.")
    names = config.get("architectures") or []
    if not isinstance(names, list) or len(names) != 1 or names[0] not in _READERS:
        reason = _REFUSED.get(names[0]) if isinstance(names, list) and len(names) == 1 else None
        raise CheckpointError(
            f"architecture {names or 'missing'} is not supported{': ' + reason if reason else ''}. "
            f"Supported: {', '.join(sorted(_READERS))}."
        )
    try:
        return _READERS[names[0]](config)
    except KeyError as error:
        raise CheckpointError(f"config.json of a {names[0]} lacks {error}: it needs all its sizes.") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"config.json of a {names[0]} has a value of the wrong kind: {error}.") from error


def _refuse(config: Config, **expected: Any) -> None:
    """Options this family has but this package does not carry are refused by name, before anything is read."""
    for option, value in expected.items():
        if config.get(option, value) not in (value, None):
            raise CheckpointError(
                f"config.json has {option}={config[option]!r}, which is not supported (only {value!r} is). "
                "Use a checkpoint without it."
            )


def _common(config: Config, *, window: int | None = None, theta: float = 1e4) -> dict[str, Any]:
    """What all families write alike. ``window``: tokens that a layer looks back. ``theta``: where the config has none.

    Up to ``window`` tokens a windowed layer is plainly causal, so longer sequences alone are beyond such a model.
    """
    _refuse(config, hidden_act="silu", quantization_config=None, partial_rotary_factor=1.0)
    heads, hidden = int(config["num_attention_heads"]), int(config["hidden_size"])
    theta, scaling = _rope(config, theta)
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


def _rope(config: Config, default_theta: float) -> tuple[float, dict[str, float | str] | None]:
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
    _refuse(table, partial_rotary_factor=1.0)
    if kind == "default":
        return theta, None
    return theta, {"type": kind, **{name: float(table[name]) for name in _ROPE_NEEDS[kind]}}


def _window(config: Config, *, used: bool, default: int | None = 4096) -> int | None:
    """Tokens that some layer looks back; None where every layer looks back all the way."""
    kinds = config.get("layer_types") or []
    strange = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if strange:
        raise CheckpointError(f"config.json has layer_types={strange}, which are not supported.")
    window = config.get("sliding_window", default)
    return int(window) if window is not None and (used or "sliding_attention" in kinds) else None


def _qwen_window(config: Config) -> int | None:
    """Of a dense Qwen, whose first ``max_window_layers`` layers look back all the way unless ``layer_types`` says."""
    some = config.get("layer_types") is None and config.get("max_window_layers", 28) < config["num_hidden_layers"]
    return _window(config, used=some and bool(config.get("use_sliding_window", False)))


def _llama(config: Config) -> Architecture:
    _refuse(config, attention_bias=False, mlp_bias=False)
    return Architecture(**_common(config))


def _mistral(config: Config) -> Architecture:
    return Architecture(**_common(config, window=_window(config, used=True)))


def _qwen2(config: Config) -> Architecture:
    return Architecture(**_common(config, window=_qwen_window(config)), qkv_bias=True)


def _qwen3(config: Config) -> Architecture:
    _refuse(config, attention_bias=False)
    common = _common(config, window=_qwen_window(config)) | {"head_dim": int(config["head_dim"])}
    return Architecture(**common, qk_norm=True)


def _qwen3_moe(config: Config) -> Architecture:
    _refuse(config, attention_bias=False, decoder_sparse_step=1)
    if config.get("mlp_only_layers"):
        raise CheckpointError(
            f"config.json has mlp_only_layers={config['mlp_only_layers']}: models with some dense layers are not "
            "supported, only those with experts in every layer."
        )
    window = _window(config, used=bool(config.get("use_sliding_window", False)))
    common = _common(config, window=window) | {"ffn_size": int(config["moe_intermediate_size"])}
    normalised = bool(config.get("norm_topk_prob", False))
    return Architecture(**common, **_experts(config, normalised=normalised), qk_norm=True)


def _mixtral(config: Config) -> Architecture:
    window = _window(config, used=True, default=None)
    return Architecture(**_common(config, window=window, theta=1e6), **_experts(config, normalised=True))


def _experts(config: Config, *, normalised: bool) -> dict[str, Any]:
    # both names are in use for both families
    count = int(config["num_local_experts"] if config.get("num_experts") is None else config["num_experts"])
    chosen = int(config["num_experts_per_tok"])
    if not 1 <= chosen <= count:
        raise CheckpointError(
            f"config.json has num_experts_per_tok={chosen}, of {count} experts. It must be from 1 to {count}."
        )
    if chosen == 1 and normalised:
        raise CheckpointError(
            "config.json has num_experts_per_tok=1 and weights that add up to 1: every token's expert would have "
            "weight 1 whatever the router says, which Megatron-Core does not do."
        )
    return {"num_experts": count, "experts_per_token": chosen, "normalise_experts": normalised}


_READERS: dict[str, Callable[[Config], Architecture]] = {
    "LlamaForCausalLM": _llama,
    "MistralForCausalLM": _mistral,
    "Qwen2ForCausalLM": _qwen2,
    "Qwen3ForCausalLM": _qwen3,
    "Qwen3MoeForCausalLM": _qwen3_moe,
    "MixtralForCausalLM": _mixtral,
}
