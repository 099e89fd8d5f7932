"""``tropd serve``: this process becomes a vLLM server for the student of a configuration."""

from __future__ import annotations

import os

import torch

from megatron_tropd.bridge.launch import become_server, server_command
from megatron_tropd.bridge.options import engine_options
from megatron_tropd.config import RunConfig
from megatron_tropd.inputs import DTYPES, longest_sequence


def serve_student(config: RunConfig, *, host: str, port: int) -> None:
    """Does not return.

    Raises:
        ConfigError: vLLM is not installed, or the server would be open to the network without a key.
    """
    gpu = torch.cuda.is_available()
    servers, vllm, model = config.rollout.vllm_server, config.rollout.vllm, config.student.model
    options = {
        "dtype": str(DTYPES[config.dtype]).removeprefix("torch."),
        "tensor_parallel_size": servers.tensor,
        **({} if gpu else {"enforce_eager": True}),
        **engine_options(vllm, gpu=gpu),
    }
    command = server_command(
        model,
        options,
        host=host,
        port=port,
        max_tokens=longest_sequence(config),
        top_k=0,
        takes_weights=True,
    )
    become_server(command, host=host, key=os.environ.get(servers.key_variable, ""))
