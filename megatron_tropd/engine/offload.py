"""Take what is idle off the device, into host memory, and back: a frozen model's weights, an optimizer's states.

Storages are emptied in place and filled again, so that every view of them is good once they are back: parameters in
flat buffers, tied weights, ``main_grad``, the shards of the distributed optimizer. (Megatron's own
``optimizer.offload_to_cpu`` puts other tensors in the place of its parameters: those of fp32 models would leave the
buffers that ranks gather them in.) Host memory is pinned where there is a GPU, and is kept for the next time. Without
a GPU the same code moves storages within host memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from megatron_tropd.errors import EngineError

# host memory is taken in slabs: the pinned allocator rounds up to powers of two, which would double a large buffer
_SLAB_BYTES = 1 << 28
_ALIGNMENT = 512

Contents = Literal["changing", "constant", "scratch"]


@dataclass(slots=True)
class OffloadStats:
    """Bytes and seconds of moves on this rank so far."""

    seconds: float = 0.0
    to_host: int = 0  # bytes
    to_device: int = 0

    def take_seconds(self) -> float:
        """Return the seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


class OffloadedTensors:
    """Storages that leave the device together."""

    def __init__(
        self,
        what: str,
        tensors: Callable[[], Iterable[Tensor]],
        device: torch.device,
        *,
        contents: Contents = "changing",
        offload_stats: OffloadStats | None = None,
    ) -> None:
        """Keep the tensors. ``what``: their name in messages. ``tensors``: called anew for every offload; what is
        not on ``device`` stays where it is.

        ``contents``: ``constant`` never changes, so that it is copied to the host once; ``scratch`` is not copied and
        comes back as zeros.
        """
        self._what = what
        self._tensors = tensors
        self._device = device
        self._contents = contents
        self._stats = offload_stats or OffloadStats()
        self._host = _HostMemory((), pinned=False)
        self._copied = False
        self._gone: list[tuple[torch.UntypedStorage, int]] = []  # with their sizes, in bytes
        self.away = False  # whether they are off the device, or will be as soon as there are any

    def check(self) -> None:
        """Raise EngineError when they are off the device: there is nothing to compute with."""
        if self.away:
            raise EngineError(
                f"{self._what} was used while in host memory. Only what runs within `present()` may use it; with "
                "teacher.offload=false and optimizer.offload=false everything stays on the device."
            )

    def offload(self) -> None:
        """Move them off the device, if they are on it."""
        if self.away:
            return
        with self._timed():
            storages = _storages(self._tensors(), self._device)
            sizes = [storage.nbytes() for storage in storages]
            if self._contents != "scratch" and not (self._contents == "constant" and self._copied):
                if self._host.sizes != sizes:
                    self._host = _HostMemory(sizes, pinned=self._device.type == "cuda")
                for storage, pieces in zip(storages, self._host.pieces, strict=True):
                    for device_bytes, host_bytes in _paired(storage, pieces):
                        host_bytes.copy_(device_bytes, non_blocking=True)
                self._copied = True
                self._stats.to_host += sum(sizes)
            wait_for_device(self._device)  # for kernels that still read them, and for the copies
            for storage in storages:
                storage.resize_(0)
            self._gone, self.away = list(zip(storages, sizes, strict=True)), True
            if self._device.type == "cuda":
                torch.cuda.empty_cache()  # others than torch's allocator may want the room: vLLM, NCCL

    def onload(self) -> None:
        """Move them onto the device, if they are off it."""
        if not self.away:
            return
        with self._timed():
            for number, (storage, size) in enumerate(self._gone):
                storage.resize_(size)
                if self._contents == "scratch":
                    _bytes_of(storage).zero_()
                    continue
                for device_bytes, host_bytes in _paired(storage, self._host.pieces[number]):
                    device_bytes.copy_(host_bytes, non_blocking=True)
                self._stats.to_device += size
            wait_for_device(self._device)
            self._gone, self.away = [], False

    @contextmanager
    def present(self) -> Iterator[None]:
        """Keep them on the device within the block; afterwards off it again if they were before."""
        was_away = self.away
        self.onload()
        try:
            yield
        finally:
            if was_away:
                self.offload()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        with torch.no_grad():
            yield
        self._stats.seconds += time.perf_counter() - started


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive bytes of a storage, and where they are on the host."""

    start: int  # of the storage
    host: Tensor  # uint8


@dataclass(slots=True)
class _HostMemory:
    """Room for storages of these sizes, in bytes, one after the other."""

    sizes: Sequence[int]
    pinned: bool
    pieces: list[list[_Piece]] = field(default_factory=list)  # of every storage

    def __post_init__(self) -> None:
        starts, end = [], 0
        for size in self.sizes:
            starts.append(end)
            end += -(-size // _ALIGNMENT) * _ALIGNMENT
        slabs = [self._slab(min(_SLAB_BYTES, end - start)) for start in range(0, end, _SLAB_BYTES)]
        for start, size in zip(starts, self.sizes, strict=True):
            self.pieces.append(list(_pieces(slabs, start, size)))

    def _slab(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=self.pinned)


def _pieces(slabs: Sequence[Tensor], start: int, size: int) -> Iterator[_Piece]:
    """Cut the bytes from ``start`` of all slabs taken together into pieces."""
    done = 0
    while done < size:
        slab, at = divmod(start + done, _SLAB_BYTES)
        count = min(size - done, _SLAB_BYTES - at)
        yield _Piece(done, slabs[slab][at : at + count])
        done += count


def _paired(storage: torch.UntypedStorage, pieces: Iterable[_Piece]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pair the bytes of every piece, on the device and on the host."""
    whole = _bytes_of(storage)
    for piece in pieces:
        yield whole[piece.start : piece.start + len(piece.host)], piece.host


def _bytes_of(storage: torch.UntypedStorage) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _storages(tensors: Iterable[Tensor], device: torch.device) -> list[torch.UntypedStorage]:
    """List each storage once, however many tensors are views of it."""
    found: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.device.type == device.type and storage.nbytes():
            found.setdefault(storage.data_ptr(), storage)
    return list(found.values())


def device_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes that the storages of these tensors take on their devices."""
    unique = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(unique.values())


def wait_for_device(device: torch.device) -> None:
    """Wait for all that this process has asked of the device; a CPU has done it already."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
