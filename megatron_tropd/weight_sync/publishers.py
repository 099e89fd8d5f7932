"""From the trainer to the engines that sample: which weights, in which order, and what they should compute.

Three ways: an engine in the process iterates over the stream itself (``vllm_bridge.local_engine``); servers on this
host read files, best on a memory file system; servers anywhere join a group to which the first rank broadcasts. In the
latter two weights travel in buckets, gathered while the one before is under way.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from megatron_tropd.engine.model import Model
from megatron_tropd.engine.score import pack_alone, score_packs
from megatron_tropd.engine.weights import hf_tensors
from megatron_tropd.errors import ServingError
from megatron_tropd.models.name_table import EMBEDDING, OUTPUT, hf_shapes
from megatron_tropd.types import Architecture, Float32Array, Int64Array
from megatron_tropd.vllm_bridge.client import Server
from megatron_tropd.vllm_bridge.pool import Pool
from megatron_tropd.vllm_bridge.weight_updates import Update
from megatron_tropd.weight_sync.buckets import in_buckets, packed
from megatron_tropd.weight_sync.publish_directory import PublishDirectory
from megatron_tropd.weight_sync.side_group import SideGroup, first_member, listen

_log = logging.getLogger(__name__)

# how often a broadcast that lasts is looked after
_LOOK_S = 1.0

Stream = Iterable[tuple[str, Tensor]]


@dataclass(frozen=True, slots=True)
class WeightStream:
    """The model's present weights as ``(HF name, whole tensor)``, as often as it is iterated over. Collective.

    Tied weights come under both names: an engine that has made its own copy of the output weight must renew it.
    """

    model: Model

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        tied, (embedding,), (output,) = self.model.architecture.tied_embeddings, EMBEDDING.hf, OUTPUT.hf
        for name, tensor in hf_tensors(self.model):
            yield name, tensor
            if tied and name == embedding:
                yield output, tensor


def published_bytes(architecture: Architecture, dtype: torch.dtype) -> int:
    """Return the bytes of one ``WeightStream``: tied embeddings twice."""
    shapes, (embedding,) = hf_shapes(architecture), EMBEDDING.hf
    tied = shapes[embedding] if architecture.tied_embeddings else (0,)
    return dtype.itemsize * sum(math.prod(shape) for shape in (*shapes.values(), tied))


def probe_logprobs(model: Model, token_ids: Int64Array) -> Float32Array:
    """Return ``[L - 1]`` log-prob of every token after the first by the trainer's weights, nats, on every rank.
    Collective.
    """
    groups = model.groups
    packs = pack_alone(token_ids, groups.layout)[0]
    scores = score_packs(model, packs, vocab_size=model.architecture.vocab_size)[0]
    logprob = torch.zeros(len(token_ids) - 1, device=model.device)
    if scores is not None:
        logprob.copy_(scores.logprob_N)
    dist.broadcast(logprob, src=groups.global_rank(replica=0, stage=groups.layout.pipeline - 1))
    found: Float32Array = logprob.cpu().numpy()
    return found


class Publisher(Protocol):
    """Bring weights to servers. Collective: every rank calls, the first one holds the pool of servers."""

    def publish(self, tensors: Stream, *, version: int, keep: bool) -> None:
        """Publish the weights. ``keep``: what is being written is continued with the new weights, not dropped."""
        ...

    def close(self) -> None:
        """Release what it holds."""
        ...


class FilePublisher:
    """Weights as files that the servers' workers read; a server that comes back reads them again by itself."""

    def __init__(self, pool: Pool | None, directory: Path, *, bucket_bytes: int, transfer_s: float) -> None:
        """Keep the servers. ``pool``: on the first rank, None elsewhere. ``directory``: weights go to a new
        directory in it.

        ``transfer_s``: longest time for a bucket to arrive.
        """
        self._pool = pool
        self._place = None if pool is None else PublishDirectory(directory)
        self._bucket_bytes = bucket_bytes
        self._transfer_s = transfer_s

    def publish(self, tensors: Stream, *, version: int, keep: bool) -> None:
        if self._pool is None or self._place is None:
            for _ in tensors:  # iterating is collective
                pass
            return
        update = self._pool.begin_update(version, keep=keep, timeout_s=self._transfer_s)
        folder = self._place.path / f"version-{version}-{time.monotonic_ns()}"
        paths: list[str] = []
        for number, bucket in enumerate(in_buckets(tensors, self._bucket_bytes)):
            path = folder / f"{number:05d}.safetensors"
            _write_bucket(path, bucket)
            update.bucket({"path": str(path)})
            paths.append(str(path))
        update.end()
        again = partial(_read_again, paths=paths, version=version, timeout_s=self._transfer_s)
        self._pool.set_refresh(version, again)
        self._place.drop_all_but(folder)

    def close(self) -> None:
        if self._place is not None:
            self._place.close()


def _write_bucket(path: Path, bucket: Sequence[tuple[str, Tensor]]) -> None:
    path.parent.mkdir(exist_ok=True)
    tensors, seen = {}, set()
    for name, tensor in bucket:
        whole = tensor.detach().cpu().contiguous()
        # one memory under two names is refused by safetensors: tied weights are sent under both
        tensors[name] = whole.clone() if whole.data_ptr() in seen else whole
        seen.add(whole.data_ptr())
    save_file(tensors, path)


async def _read_again(server: Server, *, paths: Sequence[str], version: int, timeout_s: float) -> None:
    await server.start("abort")
    for path in paths:
        await server.bucket({"path": path}, timeout_s=timeout_s)
    await server.finish(version)


class BroadcastPublisher:
    """Weights by collective broadcast from the first rank to every worker of every server.

    A server that is lost on the way may break the broadcast for all: it is then repeated, from the start, with those
    left.
    """

    def __init__(
        self, pool: Pool | None, *, address: str, bucket_bytes: int, transfer_s: float, device: torch.device
    ) -> None:
        """Keep the servers. ``pool``: on the first rank, None elsewhere. ``address``: of the first rank's host, as
        servers reach it.

        ``transfer_s``: longest time for a bucket to arrive.
        """
        self._pool = pool
        self._address = address
        self._bucket_bytes = bucket_bytes
        self._transfer_s = transfer_s
        self._device = device
        self._workers = {} if pool is None else {url: int(info["workers"]) for url, info in pool.infos().items()}
        self._group: SideGroup | None = None
        self._members: list[str] = []
        self._groups_made = 0
        self._sender = _new_sender()

    def publish(self, tensors: Stream, *, version: int, keep: bool) -> None:
        attempts = 1 if self._pool is None else self._pool.settings.attempts
        for number in range(1, 1 + _agreed(attempts)):
            if _agreed(self._send(tensors, version, keep)):
                return
            _log.warning("publishing step %d broke off at attempt %d", version, number)
        raise ServingError(
            f"the weights of step {version} could not be broadcast: it broke off every time. Look at the servers' "
            "logs, or use rollout.vllm_server.publish=files where servers and trainer share a host."
        )

    def close(self) -> None:
        self._sender.shutdown()
        self._group = None

    def _leave_group(self) -> None:
        """Make the next update meet anew. A broadcast that is stuck ends with the group."""
        if self._group is not None:
            self._group.abort()
        self._sender.shutdown(wait=False, cancel_futures=True)
        self._sender, self._group, self._members = _new_sender(), None, []

    def _send(self, tensors: Stream, version: int, keep: bool) -> int:
        """Return 1 when all servers that are alive in the end have the weights, 0 when it broke off."""
        if self._pool is None:
            for _ in tensors:
                pass
            return 1
        update = self._pool.begin_update(version, keep=keep, timeout_s=self._transfer_s)
        under_way: list[Future[None]] = []
        # who is not ready would be waited for in the meeting
        broken = not (update.wait_ready() and self._meet(update))
        for bucket in in_buckets(tensors, self._bucket_bytes):
            if broken or self._group is None:
                continue  # the stream is collective: it is drawn to its end
            flat, slots = packed([(name, tensor.to(self._device)) for name, tensor in bucket])
            update.bucket({"slots": [list(slot) for slot in slots], "nbytes": flat.numel()})
            under_way.append(self._sender.submit(self._group.broadcast, flat, after=self._group.mark()))
            # one bucket is sent while the next is gathered
            broken = len(under_way) > 1 and _failed(under_way[-2], update)
        broken = broken or any(_failed(future, update) for future in under_way[-2:])
        # weights of which a part is missing are not to be made anyone's
        reached = update.end(complete=not broken)
        if broken or len(reached) < len(update.urls):
            self._leave_group()
        # who has been lost meanwhile gets the weights when it is back; who is there and lacks them, now
        return int(not broken and len(reached) == update.left)

    def _meet(self, update: Update) -> bool:
        """Make a group with the servers of this update, unless there is one."""
        if not update.urls or (self._group is not None and self._members == update.urls):
            return True
        self._group, self._members, self._groups_made = None, update.urls, self._groups_made + 1
        name, size = f"weights-{self._groups_made}", 1 + sum(self._workers[url] for url in update.urls)
        listener, timeout_s = listen(self._address), self._transfer_s
        meeting = {"address": self._address, "port": listener.getsockname()[1], "name": name, "size": size}
        meetings, rank = {}, 1
        for url in update.urls:
            meetings[url] = {**meeting, "rank_offset": rank, "timeout_s": timeout_s}
            rank += self._workers[url]
        update.meet(meetings)
        try:
            self._group = first_member(listener, name=name, size=size, device=self._device, timeout_s=timeout_s)
        except RuntimeError as error:
            _log.warning("the servers did not meet to receive weights: %s", error)
            return False
        return True


def _new_sender() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "tropd-broadcast")


def _failed(future: Future[None], update: Update) -> bool:
    """Wait for one broadcast; return whether a member of the group was lost or too late, or is known to be lost."""
    while True:
        try:
            future.result(timeout=_LOOK_S)
        except TimeoutError:
            if update.intact:
                continue
            _log.warning("broadcasting weights was given up: a server was lost")
            return True
        except RuntimeError as error:
            _log.warning("broadcasting weights failed: %s", error)
            return True
        return False


def _agreed(value: int) -> int:
    """Return the first rank's value, on every rank."""
    flag = torch.tensor([value])
    dist.broadcast(flag, src=0)
    return int(flag)
