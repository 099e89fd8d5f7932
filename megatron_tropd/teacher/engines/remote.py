"""A Megatron teacher on ranks of its own, which scores one batch while the student learns from another.

The student's first rank sends the teacher's what to score: packs and what is requested of them, as one request; outputs
come back from rank to rank (``teacher.transfer``). Requests are answered one after another; all of them have been sent
before the first outputs of a later one are waited for, so nobody waits for somebody who waits for them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.numpy import load, save
from torch import Tensor

from megatron_tropd.config.sections import Layout
from megatron_tropd.engine.model import Model
from megatron_tropd.errors import EngineError
from megatron_tropd.parallel.groups import Groups
from megatron_tropd.parallel.partition import CrossWorldLink, Transfer
from megatron_tropd.teacher.engines.megatron import MegatronTeacher
from megatron_tropd.teacher.protocol import PendingScores, QueryIds, TeacherRequest
from megatron_tropd.teacher.sharded import ShardedTeacher
from megatron_tropd.teacher.transfer import Key, ReplicaMap, Wire
from megatron_tropd.teacher.wire import HiddenKind
from megatron_tropd.types import Pack, TeacherOutputs

_OF_TOKENS = ("token_T", "target_T", "position_T", "region_T", "sequence_T")
_OVER, _WITHDRAWN = 0, -1  # in place of a request's length: there will be no more
_FIELDS = {
    **dict.fromkeys(_OF_TOKENS, "tokens"),
    "cu_seqlens": "bounds",
    "sequence_ids": "sequences",
    "row_T": "mapped",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RankSplit:
    """The division of a launch between student and teacher."""

    student: Layout
    student_ranks: int
    teacher: Layout
    teacher_ranks: int


class RemoteTeacher(ShardedTeacher):
    """Implement ``teacher.protocol.AsyncTeacher`` on the student's ranks."""

    def __init__(
        self,
        rank_split: RankSplit,
        student: Groups,
        bridge: CrossWorldLink,
        device: torch.device,
        *,
        vocab_size: int,
        temperature: float,
        hidden: HiddenKind,
    ) -> None:
        """Take ``vocab_size``: ids all models know; ``hidden``: the teacher's hidden states."""
        teacher = ReplicaMap.remote(
            rank_split.teacher, ranks=rank_split.teacher_ranks, round_robin=True, first_rank=rank_split.student_ranks
        )
        super().__init__(teacher, ReplicaMap.local(student, round_robin=False), device, hidden, post=bridge)
        self._bridge, self._ranks = (
            bridge,
            range(rank_split.student_ranks, rank_split.student_ranks + rank_split.teacher_ranks),
        )
        self._facts = {"vocab_size": vocab_size, "temperature": temperature}

    def start(
        self, packs: Sequence[Sequence[Pack]], request: TeacherRequest, query_ids: QueryIds | None = None
    ) -> PendingScores:
        """Start as ``score``; the teacher's ranks score while the caller continues."""
        body = encode_request(packs, request, self._facts)
        sent = self._send_request(len(body), body)
        pending = self._start(packs, request, query_ids)

        def outputs() -> list[TeacherOutputs | None]:
            found = pending()
            sent()
            return found

        return outputs

    def score(
        self, packs: Sequence[Sequence[Pack]], request: TeacherRequest, query_ids: QueryIds | None = None
    ) -> list[TeacherOutputs | None]:
        return self.start(packs, request, query_ids)()

    def close(self) -> None:
        """Release the teacher's ranks and wait until they know; those that are lost need not."""
        with suppress(EngineError):
            self._send_request(_WITHDRAWN if self._bridge.is_withdrawn() else _OVER)()

    def _score_assigned(
        self, packs: Sequence[Sequence[Pack]], request: TeacherRequest, query_ids: Mapping[Key, Tensor]
    ) -> dict[Key, Wire]:
        raise AssertionError("nothing is assigned to the student's ranks")

    def _send_request(self, length: int, body: bytes = b"") -> Callable[[], None]:
        """Start to send: the length to everyone, and the rest to the first of them."""
        if self._bridge.rank != 0:
            return _nothing
        messages = [Transfer(torch.tensor([length]), rank, True) for rank in self._ranks]
        if body:
            whole = torch.frombuffer(bytearray(body), dtype=torch.uint8)
            messages.insert(1, Transfer(whole, self._ranks[0], True))
        return self._bridge.exchange(messages)


def _nothing() -> None:
    """Wait for nothing, off the first rank."""


def serve_score_requests(
    model: Model, rank_split: RankSplit, bridge: CrossWorldLink, *, on_request: Callable[[], None]
) -> bool:
    """Score what the student requests until it requests no more, on the teacher's ranks. Collective over them.

    ``on_request`` is called when a request has come, before it is scored.

    Returns:
        True where the student stops before it was done.

    Raises:
        EngineError: the student's ranks are lost.
    """
    student = ReplicaMap.remote(rank_split.student, ranks=rank_split.student_ranks, round_robin=False)
    length = torch.zeros(1, dtype=torch.int64)
    while True:
        bridge.wait_for(length, 0)
        if int(length) in (_OVER, _WITHDRAWN):
            return int(length) == _WITHDRAWN
        body = _receive_request(bridge, int(length))
        if body is None:
            return True
        on_request()
        packs, request, facts = decode_request(body)
        teacher = MegatronTeacher(model, student, first_rank=rank_split.student_ranks, post=bridge, **facts)
        teacher.score(packs, request)


def _receive_request(bridge: CrossWorldLink, length: int) -> bytes | None:
    """Receive a request of so many bytes on all of the teacher's ranks; None when the student wants no more scores."""
    body = torch.empty(length + 1, dtype=torch.uint8)
    if dist.get_rank() == 0:
        bridge.wait_for(body[:length], 0)
        body[length] = bridge.is_withdrawn()  # one rank looks, so that all do the same
    dist.broadcast(body, src=0)
    return None if body[length] else body[:length].numpy().tobytes()


# --------------------------------------------------------------------------- requests as bytes


def encode_request(packs: Sequence[Sequence[Pack]], request: TeacherRequest, facts: Mapping[str, Any]) -> bytes:
    """Encode packs of every replica, of which all have the same number, and what is requested, as safetensors."""
    flat = [pack for replica in packs for pack in replica]
    count, own = len(flat), [number for number, pack in enumerate(flat) if pack.teacher_pack is not None]
    flat += [flat[number].scored for number in own]
    text = json.dumps(
        {"replicas": len(packs), "packs": count, "own": own, "request": asdict(request), "facts": dict(facts)}
    )
    arrays: dict[str, np.ndarray] = {
        "header": np.frombuffer(text.encode(), np.uint8),
        "tokens": np.array([len(pack.token_T) for pack in flat], np.int64),
        "bounds": np.array([len(pack.cu_seqlens) for pack in flat], np.int64),
        "sequences": np.array([len(pack.sequence_ids) for pack in flat], np.int64),
        "num_valid": np.array([pack.num_valid for pack in flat], np.int64),
        "mapped": np.array([0 if pack.row_T is None else len(pack.row_T) for pack in flat], np.int64),
        "num_rows": np.array([pack.num_rows for pack in flat], np.int64),
    }
    empty = np.empty(0, np.int64)  # in place of a map from tokens to rows that a pack does not have
    columns = {name: [getattr(pack, name) for pack in flat] for name in _FIELDS}
    columns["row_T"] = [empty if row_T is None else row_T for row_T in columns["row_T"]]
    return save(arrays | {name: np.concatenate(column) for name, column in columns.items()})


def decode_request(body: bytes) -> tuple[list[list[Pack]], TeacherRequest, dict[str, Any]]:
    """Decode what ``encode_request`` was given."""
    arrays = load(body)
    header = json.loads(arrays["header"].tobytes())
    columns = {name: np.split(arrays[name], np.cumsum(arrays[of])[:-1]) for name, of in _FIELDS.items()}
    flat = []
    counts = zip(arrays["num_valid"].tolist(), arrays["num_rows"].tolist(), strict=True)
    for number, (valid, rows) in enumerate(counts):
        fields: dict[str, Any] = {name: column[number] for name, column in columns.items()}
        fields["row_T"] = fields["row_T"] if len(fields["row_T"]) else None
        flat.append(Pack(num_valid=valid, num_rows=rows, **fields))
    flat, read = flat[: header["packs"]], flat[header["packs"] :]
    for number, other in zip(header["own"], read, strict=True):
        flat[number] = replace(flat[number], teacher_pack=other)
    each = len(flat) // header["replicas"]
    packs = [flat[start : start + each] for start in range(0, len(flat), each)]
    request = header["request"]
    return packs, TeacherRequest(**request | {"end_ids": tuple(request["end_ids"])}), header["facts"]
