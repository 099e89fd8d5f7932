"""Imported by the command server before it forks: vLLM's imports cost twenty seconds, a fork milliseconds."""

import importlib

from megatron_tropd.vllm_bridge.local_engine import prepare

prepare()
for _module in (
    "entrypoints.llm",
    "entrypoints.openai.api_server",
    "entrypoints.launchers.cli_args",
    "v1.engine.core",
    "v1.worker.cpu_worker",
    "v1.attention.backends.cpu_attn",
    "model_executor.models.qwen3",
    "distributed.kv_transfer",
):
    importlib.import_module(f"vllm.{_module}")
