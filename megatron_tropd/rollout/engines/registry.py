"""The engines that write rollouts, one row each: its capabilities, what it needs here, and how it is built.

Only this table, the engines' own files and the configuration's list of names know an engine by its name. Everybody else
reads a capability off the row, so that a new engine is a file and a row.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.distributed as dist

from megatron_tropd.config.sections import RolloutConfig
from megatron_tropd.parallel.groups import Groups
from megatron_tropd.rollout.engines.megatron import MegatronSampler
from megatron_tropd.rollout.engines.recorded import RecordedSampler
from megatron_tropd.rollout.engines.vllm import VLLMSampler
from megatron_tropd.rollout.engines.vllm_server import ServerSampler
from megatron_tropd.rollout.protocol import Sampler
from megatron_tropd.types import Architecture
from megatron_tropd.vllm_bridge.connect import open_pool
from megatron_tropd.vllm_bridge.local_engine import check_installed
from megatron_tropd.vllm_bridge.options import engine_options
from megatron_tropd.weight_sync.publishers import BroadcastPublisher, FilePublisher, Publisher, published_bytes

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplerContext:
    """Everything that a sampler is built from."""

    section: RolloutConfig
    model: Path  # a Hugging Face directory, of which an engine may read ``config.json``
    architecture: Architecture
    groups: Groups  # the sampler's layout over the student's ranks
    dtype: torch.dtype
    device: torch.device
    max_tokens: int  # of the longest sequence there will be
    vocab_size: int | None  # ids that may be drawn; None: all
    run_dir: Path

    @property
    def weight_bytes(self) -> int:
        """Return the bytes of a whole copy of the weights as they are published."""
        return published_bytes(self.architecture, self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutEngineRow:
    """One engine."""

    generates: bool  # answers prompts that it has not seen
    colocated: bool  # computes in the trainer's processes, with its own copy of the weights on the trainer's devices
    exact_vocabulary: bool  # gives log-probs over the shared ids, whatever temperature, top_p and top_k are
    sleeps: bool  # holds its device's memory until it is put to sleep, which one engine of a process can be
    needs_servers: bool
    needs_vllm: bool  # in this environment
    build: Callable[[SamplerContext], Sampler]

    @property
    def is_embedded(self) -> bool:
        """Say whether it is the trainer's own code that samples, in the trainer's processes."""
        return self.generates and self.colocated and not self.needs_vllm

    def check(self) -> None:
        """Raise ConfigError when the engine is not installed here."""
        if self.needs_vllm:
            check_installed()


def build_embedded(context: SamplerContext) -> MegatronSampler:
    """Build a sampler over its own copy of the weights."""
    return MegatronSampler(
        context.architecture,
        context.groups,
        dtype=context.dtype,
        device=context.device,
        batch_size=context.section.batch_size,
        vocab_size=context.vocab_size,
    )


def _build_recorded(context: SamplerContext) -> RecordedSampler:
    assert context.section.recorded_from is not None  # config/sections.py sees to it
    return RecordedSampler(context.section.recorded_from)


def _build_vllm(context: SamplerContext) -> VLLMSampler:
    gpu, section = context.device.type == "cuda", context.section.vllm
    sleep = {"enable_sleep_mode": True} if gpu and section.sleep else {}
    return VLLMSampler(
        context.model,
        context.architecture,
        context.groups,
        dtype=context.dtype,
        device=context.device,
        max_tokens=context.max_tokens,
        vocab_size=context.vocab_size,
        options=engine_options(section, gpu=gpu) | sleep,
    )


def _build_servers(context: SamplerContext) -> ServerSampler:
    """Build a sampler over servers, which the first rank talks to."""
    servers = context.section.vllm_server
    needs: dict[str, Any] = {
        "dtype": str(context.dtype).removeprefix("torch."),
        "vocab_size": context.architecture.vocab_size,
        "max_model_len": context.max_tokens + 1,
        "logprobs_mode": "processed_logprobs",
        "takes_weights": True,
    }
    pool = open_pool(servers, section="rollout.vllm_server", needs=needs) if dist.get_rank() == 0 else None
    publisher: Publisher
    if servers.publish == "files":
        directory = servers.publish_dir or context.run_dir
        if servers.publish_dir is None and pool is not None:
            directory = publish_directory(context.run_dir, context.weight_bytes)
        publisher = FilePublisher(pool, directory, bucket_bytes=servers.bucket_mib << 20, transfer_s=servers.transfer_s)
    else:
        publisher = BroadcastPublisher(
            pool,
            address=servers.publish_address,
            bucket_bytes=servers.bucket_mib << 20,
            transfer_s=servers.transfer_s,
            device=context.device,
        )
    return ServerSampler(
        pool,
        publisher,
        context.architecture,
        max_tokens=context.max_tokens,
        timeout_s=servers.timeout_s,
        vocab_size=context.vocab_size,
    )


def publish_directory(run_dir: Path, weight_bytes: int, *, memory: Path = Path("/dev/shm")) -> Path:
    """Return where weights lie for servers on this host: memory, where its file system has room for those of two
    steps, the older of which go when the newer have arrived.
    """
    disk = run_dir.absolute() / "publish"
    if not memory.is_dir():
        return disk
    free, needed = shutil.disk_usage(memory).free, 2 * weight_bytes
    if free >= needed:
        return memory
    _log.warning(
        "%s has %.1f GiB free, and the weights of two steps take %.1f: they are published through %s. Give it more "
        "(docker run --shm-size), or name a directory (rollout.vllm_server.publish_dir).",
        *(memory, free / 2**30, needed / 2**30, disk),
    )
    return disk


EMBEDDED = "megatron"  # the engine that is always there

ROLLOUT_ENGINES: Mapping[str, RolloutEngineRow] = MappingProxyType(
    {
        "megatron": RolloutEngineRow(
            generates=True,
            colocated=True,
            exact_vocabulary=True,
            sleeps=False,
            needs_servers=False,
            needs_vllm=False,
            build=build_embedded,
        ),
        "vllm": RolloutEngineRow(
            generates=True,
            colocated=True,
            exact_vocabulary=False,
            sleeps=True,
            needs_servers=False,
            needs_vllm=True,
            build=_build_vllm,
        ),
        "vllm_server": RolloutEngineRow(
            generates=True,
            colocated=False,
            exact_vocabulary=False,
            sleeps=False,
            needs_servers=True,
            needs_vllm=False,
            build=_build_servers,
        ),
        "recorded": RolloutEngineRow(
            generates=False,
            colocated=False,
            exact_vocabulary=True,
            sleeps=False,
            needs_servers=False,
            needs_vllm=False,
            build=_build_recorded,
        ),
    }
)
