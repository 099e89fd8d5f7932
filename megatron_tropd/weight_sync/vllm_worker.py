"""Inside vLLM's workers: takes new weights from files or from a broadcast by the trainer, bucket by bucket.

vLLM imports this module because ``--worker-extension-cls`` names ``Extension``; importing it registers the transfer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

from megatron_tropd.weight_sync.buckets import Slot, unpacked
from megatron_tropd.weight_sync.side_group import SideGroup, other_member

BACKEND = "tropd"


@dataclass
class Meeting(WeightTransferInitInfo):  # type: ignore[misc]
    """Where the broadcasting group meets. ``rank_offset``: rank of this server's first worker in it."""

    address: str
    port: int
    name: str
    size: int
    rank_offset: int
    timeout_s: float


@dataclass
class Bucket(WeightTransferUpdateInfo):  # type: ignore[misc]
    """One bucket: a safetensors file, or the slots of a broadcast of so many bytes."""

    path: str = ""
    slots: list[list[Any]] = field(default_factory=list)
    nbytes: int = 0


class WeightReceiver(WeightTransferEngine):  # type: ignore[misc]
    """Take weights from the publishers of ``weight_sync.publishers``."""

    init_info_cls = Meeting
    update_info_cls = Bucket
    _group: SideGroup | None = None

    def init_transfer_engine(self, init_info: Meeting) -> None:
        self._leave()  # an older group, if any, is of a trainer or of servers that are lost
        self._group = other_member(
            init_info.address,
            init_info.port,
            name=init_info.name,
            rank=init_info.rank_offset + self.parallel_config.rank,
            size=init_info.size,
            device=self.device,
            timeout_s=init_info.timeout_s,
        )

    def start_weight_update(self) -> None:
        # what an update that broke off has left would be counted as part of this one
        for layer in self.model.modules():
            info = get_layerwise_info(layer)
            if info.can_load():
                info.loaded_weights.clear()
                info.load_numel = 0
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: Bucket) -> None:
        # a layer is loaded once it is complete: until then vLLM keeps references, so every bucket has its own memory
        tensors = self._from_file(update_info) if update_info.path else self._from_group(update_info)
        self.model.load_weights(tensors)

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        self._leave()

    def _leave(self) -> None:
        if self._group is not None:
            self._group.abort()
            self._group = None

    def _from_file(self, bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
        with safe_open(bucket.path, framework="pt", device=str(self.device)) as file:
            for name in file.keys():  # noqa: SIM118 - the file is no mapping
                yield name, file.get_tensor(name)

    def _from_group(self, bucket: Bucket) -> Iterator[tuple[str, Tensor]]:
        if self._group is None:
            raise ValueError("no group to receive weights from: /tropd/meet comes first.")
        flat = torch.empty(bucket.nbytes, dtype=torch.uint8, device=self.device)
        self._group.broadcast(flat)
        yield from unpacked(flat, [Slot(*slot) for slot in bucket.slots])


class Extension:
    """Mixed into vLLM's workers."""

    def close_open_update(self) -> None:
        """End an update that a trainer began and never finished, or that failed on another worker only."""
        with contextlib.suppress(RuntimeError):  # vLLM's answer when there is none
            self.finish_weight_update()  # type: ignore[attr-defined]


if BACKEND not in WeightTransferEngineFactory._registry:
    WeightTransferEngineFactory.register_engine(BACKEND, WeightReceiver)
