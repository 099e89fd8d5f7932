"""From the ``vllm`` section of a configuration to vLLM's own arguments."""

from __future__ import annotations

from typing import Any

from megatron_tropd.config.sections import VLLMConfig

_CPU_CACHE_MIB = 1024
_CPU_STEP_TOKENS = 4096


def engine_options(config: VLLMConfig, *, gpu: bool) -> dict[str, Any]:
    """Return the arguments of ``vllm.LLM`` and of its server that this section decides."""
    options: dict[str, Any] = {"max_num_seqs": config.max_sequences}
    cache_mib = config.cache_mib or (None if gpu else _CPU_CACHE_MIB)
    if cache_mib is not None:
        options["kv_cache_memory_bytes"] = cache_mib << 20
    if gpu:
        options["gpu_memory_utilization"] = config.memory_fraction
    return options | dict(config.options)


def whole_prompts(max_tokens: int) -> dict[str, Any]:
    """Return arguments that read prompts of sequences up to ``max_tokens`` in one piece each: needed without a GPU.

    There vLLM 0.32 cannot take back the random number that it draws for a seeded sequence at the end of a first piece:
    "CPU Generator does not use offset" is all that a run would hear of it.
    """
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": max(_CPU_STEP_TOKENS, max_tokens + 1)}
