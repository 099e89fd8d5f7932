"""A launch cut in two: its first ranks are the student's, its last ones the teacher's.

Each part is a world of its own to ``torch.distributed`` and to Megatron, with ranks from 0: whatever runs on all ranks
of a world knows nothing of the other. Between the two there is a ``CrossWorldLink``.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, rendezvous

from megatron_tropd.errors import EngineError
from megatron_tropd.parallel.groups import JOIN_TIMEOUT_S, initialize_distributed
from megatron_tropd.parallel.wakeup import interruptible


@dataclass(frozen=True, slots=True)
class Transfer:
    """A tensor that this rank sends to, or receives from, another."""

    tensor: Tensor  # contiguous; what is received is written into it, where `PointToPoint.receives_on` says
    peer: int
    sent: bool


class PointToPoint:
    """Messages within the world. ``peer`` and ``rank`` are world ranks."""

    @property
    def rank(self) -> int:
        """Return this rank's number, as senders give it."""
        return dist.get_rank()

    def receives_on(self, device: torch.device) -> torch.device:
        """Return the device of the receive buffers of a rank whose device is ``device``."""
        return device

    def exchange(self, messages: Sequence[Transfer]) -> Callable[[], None]:
        """Start all messages and return what waits for them, which is to be kept until then: a message that nobody
        can wait for any more may never be sent. Between two ranks they keep their order. Ranks without messages need
        not call: all have met before (``initialize_distributed``).
        """
        operations = [dist.P2POp(dist.isend if m.sent else dist.irecv, m.tensor, m.peer) for m in messages]
        requests = dist.batch_isend_irecv(operations) if operations else []

        def wait() -> None:
            for request in requests:
                request.wait()

        return wait


class CrossWorldLink(PointToPoint):
    """Messages between all ranks of a launch, by their numbers there, through host memory.

    A message may be expected long before it is sent: until then it takes no room on a device, and no kernel waits.
    """

    def __init__(self, store: Any, *, rank: int, size: int, timeout_s: float) -> None:
        """Meet the others. ``timeout_s``: of one message, from when it is waited for."""
        join, self._timeout = datetime.timedelta(seconds=JOIN_TIMEOUT_S), datetime.timedelta(seconds=timeout_s)
        self._rank = rank
        self._gloo: Any = ProcessGroupGloo(store, rank, size, join)  # torch's own type stub lacks its messages
        self._store = store  # the group lives as long as this does

    @property
    def rank(self) -> int:
        return self._rank

    def receives_on(self, device: torch.device) -> torch.device:
        return torch.device("cpu")

    def exchange(self, messages: Sequence[Transfer]) -> Callable[[], None]:
        pending = [self._begin(message) for message in messages]

        def wait() -> None:
            for message, work in zip(messages, pending, strict=True):
                with _talking_to(message.peer):
                    work.wait(self._timeout)

        return wait

    def wait_for(self, tensor: Tensor, peer: int) -> None:
        """Receive into a host tensor, however long it takes. EngineError when the other side is lost."""
        with _talking_to(peer):
            self._gloo.recv([tensor], peer, 0).wait(datetime.timedelta(days=365))

    def withdraw(self) -> None:
        """Announce that the student stops before it is done, and wants no more of what it has requested."""
        self._store.set(_WITHDRAWN, "yes")

    def is_withdrawn(self) -> bool:
        """Say whether that was announced."""
        with _talking_to(0):
            return bool(self._store.check([_WITHDRAWN]))

    def ask_to_stop(self, signal: int) -> None:
        """Announce that this rank has received ``signal``."""
        self._store.set(_STOP, str(int(signal)))

    def asked_to_stop(self) -> int:
        """Return the signal that some rank has announced; 0 when none has."""
        return int(self._store.get(_STOP)) if self._store.check([_STOP]) else 0

    def _begin(self, message: Transfer) -> Any:
        # a connection that is known to be lost fails here already
        with _talking_to(message.peer):
            if message.sent:
                return self._gloo.send([message.tensor.cpu()], message.peer, 0)
            return self._gloo.recv([message.tensor], message.peer, 0)


_STOP, _WITHDRAWN = "asked to stop", "withdrawn"  # in a bridge's store


@contextmanager
def _talking_to(peer: int) -> Iterator[None]:
    """Turn gloo's error about a lost or late message into an EngineError that names the other side."""
    try:
        yield
    except RuntimeError as error:
        raise EngineError(
            f"rank {peer} of the launch is lost or too slow: {str(error).splitlines()[0]}. The first error of any "
            "rank says why; collective_timeout_s is how long ranks wait for one another."
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """This process's place among all that were launched together."""

    device: torch.device
    world_size: int  # of the launch
    student_ranks: int  # the first so many are the student's
    bridge: CrossWorldLink | None = None  # None where the teacher has no ranks of its own

    @property
    def is_teachers(self) -> bool:
        """Say whether this rank is one of the teacher's own."""
        return self.bridge is not None and self.bridge.rank >= self.student_ranks


def join_launch(*, teacher_ranks: int, timeout_s: float) -> Launch:
    """Join the world of this rank's part: the last ``teacher_ranks`` are the teacher's. Collective over the launch.

    Args:
        teacher_ranks: 0 makes one world of all ranks; else fewer than there are.
        timeout_s: longest collective or message, once everyone is there.
    """
    if not teacher_ranks:
        device = initialize_distributed(timeout_s=timeout_s)
        world = dist.get_world_size()
        return Launch(device=device, world_size=world, student_ranks=world)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with interruptible():
        store, _, _ = next(rendezvous("env://", timeout=datetime.timedelta(seconds=JOIN_TIMEOUT_S)))
    students = world - teacher_ranks
    part, first, size = ("student", 0, students) if rank < students else ("teacher", students, teacher_ranks)
    device = initialize_distributed(timeout_s=timeout_s, place=(PrefixStore(part, store), rank - first, size))
    bridge = CrossWorldLink(PrefixStore("bridge", store), rank=rank, size=world, timeout_s=timeout_s)
    return Launch(device=device, world_size=world, student_ranks=students, bridge=bridge)
