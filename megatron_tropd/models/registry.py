"""The families there are, one row each, and the relatives that are refused by name."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_tropd.errors import CheckpointError
from megatron_tropd.models import llama, mistral, mixtral, qwen2, qwen3, qwen3_moe
from megatron_tropd.models.config_fields import Config, say_unread, unread_fields, within_limits
from megatron_tropd.models.family import Family
from megatron_tropd.types import Architecture

FAMILIES: Mapping[str, Family] = {
    module.FAMILY.name: module.FAMILY for module in (llama, mistral, qwen2, qwen3, qwen3_moe, mixtral)
}
# close relatives of these that would load and be another model
_REFUSED = {
    "GemmaForCausalLM": "its norms multiply by 1 + weight and its embedding is scaled",
    "Gemma2ForCausalLM": "it normalizes after attention and MLP, alternates sliding and global layers and caps its "
    "logits, which the fused losses and Megatron-Core's layers do not",
    "Gemma3ForCausalLM": "it normalizes after attention and MLP and alternates sliding and global layers with RoPE of "
    "their own, which Megatron-Core's layers do not",
    "Gemma3ForConditionalGeneration": "it also sees images",
}


def architecture_of(config: Config) -> Architecture:
    """Read the ``Architecture`` of an HF ``config.json``.

    Raises:
        CheckpointError: the architecture, or an option of it, is not supported; a required key is missing.
    """
    if not isinstance(config, Mapping):
        raise CheckpointError(f"config.json holds a {type(config).__name__}, not the settings of a model.")
    names = config.get("architectures") or []
    if not isinstance(names, list) or len(names) != 1 or names[0] not in FAMILIES:
        reason = _REFUSED.get(names[0]) if isinstance(names, list) and len(names) == 1 else None
        raise CheckpointError(
            f"architecture {names or 'missing'} is not supported{': ' + reason if reason else ''}. "
            f"Supported: {', '.join(sorted(FAMILIES))}."
        )
    try:
        architecture = within_limits(FAMILIES[names[0]].read(config))
    except KeyError as error:
        raise CheckpointError(f"config.json of a {names[0]} lacks {error}: it needs all its sizes.") from error
    except (TypeError, ValueError, AttributeError, OverflowError, ZeroDivisionError) as error:
        raise CheckpointError(f"config.json of a {names[0]} has a value of the wrong kind: {error}.") from error
    say_unread(names[0], tuple(unread_fields(config)))
    return architecture
