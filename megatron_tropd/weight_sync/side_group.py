"""A process group besides the default one, joined by processes that share nothing else: trainer and engine workers.

The same code on both sides: gloo for CPU tensors, NCCL for CUDA ones. The first member holds the meeting point; it, and
gloo's connections, use the address given and no other interface.
"""

from __future__ import annotations

import socket
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore


@dataclass(frozen=True, slots=True)
class SideGroup:
    """One member's end of the group. The members' calls must match."""

    backend: Any
    store: Any  # the group lives as long as this does
    timeout: timedelta  # of one broadcast

    def broadcast(self, tensor: Tensor) -> None:
        """Broadcast the first member's contiguous ``tensor`` into everyone's. RuntimeError when a member is lost or
        too late.
        """
        options = BroadcastOptions()
        options.timeout = self.timeout
        options.rootRank = options.rootTensor = 0
        self.backend.broadcast([tensor], options).wait()


# longest time to meet: nothing is sent yet, so who takes longer is lost
_MEETING_S = 120.0


def listen(address: str) -> socket.socket:
    """Open a socket on a free port of ``address``, for ``first_member``: bound before anyone learns the port."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, 0), family=family)


def first_member(listener: socket.socket, *, name: str, size: int, device: torch.device, timeout_s: float) -> SideGroup:
    """Hold the meeting point and wait for the others. Blocks until all ``size`` are there.

    ``timeout_s``: of one broadcast.

    Raises:
        RuntimeError: they were not within two minutes, or ``timeout_s`` where that is less.
    """
    address, port = listener.getsockname()[:2]
    timeout = timedelta(seconds=timeout_s)
    store = TCPStore(
        address,
        port,
        is_master=True,
        wait_for_workers=False,
        timeout=_to_meet(timeout),
        master_listen_fd=listener.detach(),
    )
    return _join(store, address, name=name, rank=0, size=size, device=device, timeout=timeout)


def other_member(
    address: str, port: int, *, name: str, rank: int, size: int, device: torch.device, timeout_s: float
) -> SideGroup:
    """Join the group whose first member listens at ``address`` and ``port``; RuntimeError when that fails."""
    timeout = timedelta(seconds=timeout_s)
    store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=_to_meet(timeout))
    own = _own_address(address, port)
    return _join(store, own, name=name, rank=rank, size=size, device=device, timeout=timeout)


def _join(
    store: Any, address: str, *, name: str, rank: int, size: int, device: torch.device, timeout: timedelta
) -> SideGroup:
    meeting = PrefixStore(name, store)
    if device.type == "cuda":
        from torch.distributed import ProcessGroupNCCL

        nccl = ProcessGroupNCCL.Options()
        nccl._timeout = timeout
        return SideGroup(ProcessGroupNCCL(meeting, rank, size, nccl), store, timeout)
    backend: Any = ProcessGroupGloo  # torch's own type stub lacks its options
    gloo = backend._Options()
    gloo._devices = [backend.create_device(hostname=address)]
    gloo._timeout = _to_meet(timeout)
    return SideGroup(backend(meeting, rank, size, gloo), store, timeout)


def _to_meet(timeout: timedelta) -> timedelta:
    return min(timeout, timedelta(seconds=_MEETING_S))


def _own_address(address: str, port: int) -> str:
    """Return this host's address on the way to another (nothing is sent)."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port))
        own: str = probe.getsockname()[0]
    return own
