"""A process group besides the default one, joined by processes that share nothing else: trainer and engine workers.

The same code on both sides: gloo for CPU tensors, NCCL for CUDA ones. The first member holds the meeting point; it, and
gloo's connections, use the address given and no other interface.

NCCL knows no lost member: its ``wait`` only queues the wait on a stream, and the watchdog that would end a late
collective ends the process with it. So all members meet at the store before NCCL is used, every broadcast runs on a
stream of its own and is watched from the host, and a late one aborts this group and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import BroadcastOptions, PrefixStore, ProcessGroupGloo, TCPStore

_LOOKS_S = (0.0005, 0.01)  # shortest and longest time between two looks at a broadcast
_NEVER = timedelta(days=365)  # of NCCL's watchdog, which is not needed and would end the process


@dataclass(frozen=True, slots=True)
class SideGroup:
    """One member's end of the group. The members' calls must match."""

    backend: Any
    store: Any  # the group lives as long as this does
    timeout: timedelta  # of one broadcast
    stream: torch.cuda.Stream | None = None  # that broadcasts run on; None: there are none
    aborted: threading.Event = field(default_factory=threading.Event)

    def mark(self) -> torch.cuda.Event | None:
        """Return the point on this thread's stream at which what it has issued so far is done; None without
        streams.
        """
        return None if self.stream is None else torch.cuda.current_stream(self.stream.device).record_event()

    def broadcast(self, tensor: Tensor, *, after: torch.cuda.Event | None = None) -> None:
        """Broadcast the first member's contiguous ``tensor`` into everyone's, and wait for it. RuntimeError when a
        member is lost or too late, or the group was aborted.

        ``after``: the point (``mark``) at which the tensor is there; None: what this thread has issued by now.
        """
        if self.aborted.is_set():
            raise RuntimeError("the group was given up")
        options = BroadcastOptions()
        options.timeout = self.timeout
        options.rootRank = options.rootTensor = 0
        with self._own_stream(tensor, after or self.mark()):
            work = self.backend.broadcast([tensor], options)
            self._watch(work)

    def abort(self) -> None:
        """Give the group up: what is under way ends with an error."""
        if not self.aborted.is_set():
            self.aborted.set()
            self.backend.abort()

    def _watch(self, work: Any) -> None:
        deadline, pause = time.monotonic() + self.timeout.total_seconds(), _LOOKS_S[0]
        while not work.is_completed():
            if self.aborted.is_set():
                raise RuntimeError("the group was given up")
            if time.monotonic() > deadline:
                self.abort()
                raise RuntimeError(f"a broadcast took longer than {self.timeout.total_seconds():g} s")
            time.sleep(pause)
            pause = min(2 * pause, _LOOKS_S[1])
        work.wait()  # raises what it has failed with

    @contextlib.contextmanager
    def _own_stream(self, tensor: Tensor, after: torch.cuda.Event | None) -> Iterator[None]:
        if self.stream is None or after is None:
            yield
            return
        self.stream.wait_event(after)
        tensor.record_stream(self.stream)
        with torch.cuda.stream(self.stream):
            yield


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
        meet_at(meeting, rank=rank, size=size, timeout=_to_meet(timeout))
        group = SideGroup(_nccl(meeting, rank, size), store, timeout, torch.cuda.Stream(device))
        # NCCL makes its communicator at the first use: on the host, and for as long as that takes
        nothing = torch.zeros(1, dtype=torch.uint8, device=device)
        within(_to_meet(timeout), lambda: group.broadcast(nothing), device=device)
        return group
    backend: Any = ProcessGroupGloo  # torch's own type stub lacks its options
    gloo = backend._Options()
    gloo._devices = [backend.create_device(hostname=address)]
    gloo._timeout = _to_meet(timeout)
    return SideGroup(backend(meeting, rank, size, gloo), store, timeout)


def _nccl(store: Any, rank: int, size: int) -> Any:
    """Make a group whose watchdog leaves the process alone: what is late is found, and aborted, here."""
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = _NEVER
    name = "TORCH_NCCL_ASYNC_ERROR_HANDLING"  # read by the group's constructor
    before = os.environ.get(name)
    os.environ[name] = "0"
    try:
        return ProcessGroupNCCL(store, rank, size, options)
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def meet_at(store: Any, *, rank: int, size: int, timeout: timedelta) -> None:
    """Wait until all members have reached this point. RuntimeError when one has not in time."""
    store.set(f"here/{rank}", "")
    store.wait([f"here/{other}" for other in range(size)], timeout)


def within(timeout: timedelta, call: Callable[[], None], *, device: torch.device | None = None) -> None:
    """Make a call that may never return, in a thread that nobody waits for. RuntimeError when it takes too long."""
    failed: list[BaseException] = []

    def run() -> None:
        try:
            if device is not None and device.type == "cuda":
                torch.cuda.set_device(device)
            call()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, name="tropd-meeting", daemon=True)
    thread.start()
    thread.join(timeout.total_seconds())
    if thread.is_alive():
        raise RuntimeError(f"the group was not made within {timeout.total_seconds():g} s")
    if failed:
        raise failed[0]


def _to_meet(timeout: timedelta) -> timedelta:
    return min(timeout, timedelta(seconds=_MEETING_S))


def _own_address(address: str, port: int) -> str:
    """Return this host's address on the way to another (nothing is sent)."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port))
        own: str = probe.getsockname()[0]
    return own
