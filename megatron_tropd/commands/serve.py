"""``tropd serve``: this process becomes a vLLM server for the student or the teacher of a configuration."""

from __future__ import annotations

import os
from typing import Literal

import torch

from megatron_tropd.config.run import RunConfig
from megatron_tropd.convert.source import source_architecture, source_files, source_fingerprint
from megatron_tropd.setup.validate import (
    DTYPES,
    check_method,
    longest_sequence,
    longest_training_sequence,
    most_alternatives,
)
from megatron_tropd.vllm_bridge.launch import become_server, server_command
from megatron_tropd.vllm_bridge.options import engine_options, whole_prompts

Role = Literal["student", "teacher"]


def serve(config: RunConfig, role: Role, *, host: str, port: int) -> None:
    """Become a server; this does not return.

    Raises:
        ConfigError: vLLM is not installed, or the server would be open to the network without a key.
    """
    gpu = torch.cuda.is_available()
    teaches = role == "teacher"
    source_architecture(config.teacher.source if teaches else config.student.source)  # vLLM opens whatever is there
    servers = config.teacher.vllm_server if teaches else config.rollout.vllm_server
    vllm = config.teacher.vllm if teaches else config.rollout.vllm
    options = {
        "dtype": str(DTYPES[config.dtype]).removeprefix("torch."),
        "tensor_parallel_size": servers.tensor,
        **({} if gpu else {"enforce_eager": True, **whole_prompts(longest_sequence(config))}),
        **engine_options(vllm, gpu=gpu),
    }
    top_k = 0
    if teaches:
        top_k = most_alternatives(config, check_method(config), source_architecture(config.teacher.source))
    command = server_command(
        config.teacher.model if teaches else source_files(config.student.source),
        options,
        host=host,
        port=port,
        max_tokens=longest_training_sequence(config) if teaches else longest_sequence(config),
        top_k=top_k,
        takes_weights=not teaches,
    )
    # a student's are those of the run's present step, whatever it was started with
    weights = source_fingerprint(config.teacher.source) if teaches else None
    become_server(command, host=host, key=os.environ.get(servers.key_variable, ""), weights=weights)
