"""The command that starts a vLLM server for this program: what ``tropd serve`` becomes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_tropd.errors import ConfigError
from megatron_tropd.vllm_bridge.local_engine import check_installed, prepare

# bridge.app.KEY_VARIABLE, which can only be imported where vLLM is
_KEY_VARIABLE = "TROPD_SERVER_KEY"
_WEIGHTS_VARIABLE = "TROPD_SERVER_WEIGHTS"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def server_command(
    model: Path,
    options: Mapping[str, Any],
    *,
    host: str,
    port: int,
    max_tokens: int,
    top_k: int,
    takes_weights: bool,
) -> list[str]:
    """Build the command. ``options``: more arguments of vLLM's server, by their Python names.

    ``max_tokens``: the longest sequence. ``top_k``: how many alternatives of a token may be requested.
    """
    arguments: dict[str, Any] = {
        "model": str(model),
        "host": host,
        "port": port,
        "max_model_len": max_tokens + 1,
        "max_logprobs": top_k,
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "logprobs_mode": "processed_logprobs",
        "middleware": "megatron_tropd.vllm_bridge.app.Tropd",
        "uvicorn_log_level": "warning",
        **options,
    }
    if takes_weights:
        arguments["worker_extension_cls"] = "megatron_tropd.weight_sync.vllm_worker.Extension"
        arguments["weight_transfer_config"] = {"backend": "tropd"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    for name, value in arguments.items():
        command += _argument(name.replace("_", "-"), value)
    return command


def _argument(name: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", json.dumps(value) if isinstance(value, dict | list) else str(value)]


def become_server(command: list[str], *, host: str, key: str, weights: str | None = None) -> None:
    """Turn this process into the server. ``weights``: their fingerprint, for clients to compare.

    Raises:
        ConfigError: vLLM is not installed, or the server would be open to the network without a key.
    """
    check_installed()
    if host not in _LOOPBACK and not key:
        raise ConfigError(
            f"--host {host} is open to the network, and no API key is set: whoever reaches it could change its "
            "weights. Put a key into the environment variable that key_variable names, or use 127.0.0.1."
        )
    prepare(in_process=False)
    environment = dict(os.environ)
    environment[_KEY_VARIABLE] = key
    environment[_WEIGHTS_VARIABLE] = weights or ""
    os.execve(command[0], command, environment)
