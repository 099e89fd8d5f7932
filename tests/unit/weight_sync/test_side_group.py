"""A broadcast whose members are lost ends with an error, whatever the backend's ``wait`` says; so does a meeting."""

from __future__ import annotations

import os
import socket
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from megatron_tropd.weight_sync import side_group
from megatron_tropd.weight_sync.side_group import SideGroup, first_member, listen, meet_at, other_member, within


class StuckWork:
    """Of NCCL: ``wait`` makes a stream wait and returns at once; the work never completes."""

    def wait(self) -> bool:
        return True

    def is_completed(self) -> bool:
        return False


class AsyncBackend:
    """A group whose broadcasts never end; it counts them, and how often it was aborted."""

    def __init__(self) -> None:
        self.begun = self.aborts = 0

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> StuckWork:
        self.begun += 1
        return StuckWork()

    def abort(self) -> None:
        self.aborts += 1


def test_a_broadcast_that_never_completes_is_aborted_at_its_deadline():
    backend = AsyncBackend()
    group = SideGroup(backend, None, timedelta(seconds=0.2))
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"a broadcast took longer than 0.2 s"):
        group.broadcast(torch.zeros(3))
    assert 0.2 <= time.monotonic() - started < 60
    assert (backend.begun, backend.aborts) == (1, 1)


def test_a_group_that_is_given_up_ends_the_broadcast_that_is_under_way():
    backend = AsyncBackend()
    group = SideGroup(backend, None, timedelta(hours=1))
    failed: list[str] = []

    def send() -> None:
        try:
            group.broadcast(torch.zeros(3))
        except RuntimeError as error:
            failed.append(str(error))

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    while not backend.begun:
        time.sleep(0.001)
    group.abort()
    group.abort()
    sender.join(60)
    assert failed == ["the group was given up"] and backend.aborts == 1


def test_members_meet_before_anything_that_has_no_limit_and_one_that_is_lost_is_noticed():
    store = HashStore()
    with pytest.raises(RuntimeError):
        meet_at(store, rank=0, size=2, timeout=timedelta(seconds=0.2))
    meet_at(store, rank=1, size=2, timeout=timedelta(seconds=30))  # who comes late finds the one that was there


def test_a_call_that_never_returns_is_left_behind_and_does_not_hold_up_the_end_of_the_process():
    forever = threading.Event()
    with pytest.raises(RuntimeError, match=r"not made within 0.1 s"):
        within(timedelta(seconds=0.1), lambda: forever.wait() and None)
    (left,) = (thread for thread in threading.enumerate() if thread.name == "tropd-meeting")
    assert left.daemon
    forever.set()
    with pytest.raises(RuntimeError, match="boom"):
        within(timedelta(seconds=30), boom)


def boom() -> None:
    raise RuntimeError("boom")


def pair(timeout_s: float) -> list[SideGroup]:
    """Both ends of a gloo group, in this process."""
    listener, ends = listen("127.0.0.1"), []
    port = listener.getsockname()[1]
    cpu = {"name": "n", "size": 2, "device": torch.device("cpu"), "timeout_s": timeout_s}

    def join() -> None:
        ends.append(other_member("127.0.0.1", port, rank=1, **cpu))

    other = threading.Thread(target=join)
    other.start()
    ends.insert(0, first_member(listener, **cpu))
    other.join()
    return ends


def test_a_gloo_group_broadcasts_and_can_be_given_up():
    first, second = pair(timeout_s=60.0)
    sent, received = torch.arange(5, dtype=torch.uint8), torch.zeros(5, dtype=torch.uint8)
    sender = threading.Thread(target=first.broadcast, args=(sent,))
    sender.start()
    second.broadcast(received)
    sender.join()
    assert received.tolist() == [0, 1, 2, 3, 4]
    first.abort()
    with pytest.raises(RuntimeError):
        first.broadcast(sent)


def test_nccl_is_told_to_leave_the_process_alone(monkeypatch: pytest.MonkeyPatch):
    """Its watchdog's default ends the process that a late collective is in."""
    found: dict[str, Any] = {}

    class Options:
        _timeout = timedelta(0)

    class Group:
        def __init__(self, store: Any, rank: int, size: int, options: Options) -> None:
            found.update(handling=os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING"), timeout=options._timeout)

    Group.Options = Options  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.distributed, "ProcessGroupNCCL", Group, raising=False)
    monkeypatch.delenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", raising=False)
    side_group._nccl(HashStore(), 0, 1)
    assert found["handling"] == "0" and found["timeout"] > timedelta(days=1)
    assert "TORCH_NCCL_ASYNC_ERROR_HANDLING" not in os.environ


def test_an_address_without_a_listener_is_an_error_in_time():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.raises(RuntimeError):
        other_member("127.0.0.1", port, name="n", rank=1, size=2, device=torch.device("cpu"), timeout_s=1.0)
