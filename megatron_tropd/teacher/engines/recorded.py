"""The teacher's scores on disk, by the sequences they are about: written beside a live teacher, read instead of it.

How the sequences were packed and laid out plays no part. The files are those of ``teacher.store``. A sequence is
what the teacher read: behind another prompt of the teacher's own it is another one.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_tropd.engine.context import carries_loss, own_valid_positions, valid_positions
from megatron_tropd.errors import DataError
from megatron_tropd.losses.end_class import with_ends
from megatron_tropd.losses.support import first_of_each
from megatron_tropd.parallel.collectives import all_gather_stack
from megatron_tropd.parallel.groups import Groups
from megatron_tropd.storage.write_aside import make_directory, remove_partials
from megatron_tropd.teacher.protocol import PendingScores, QueryIds, Teacher, TeacherRequest, start_scoring
from megatron_tropd.teacher.recording import FILE, check_facts, write_facts
from megatron_tropd.teacher.schema import lacking, mapped, outputs_of, present, requested
from megatron_tropd.teacher.store import Place, SequenceScores, Store, Values, hash64, sequence_key, write_part
from megatron_tropd.types import Int64Array, Pack, TeacherOutputs

# Another layout may order two candidates of nearly equal probability the other way; another student has others.
_STRANGERS = 0.1


@dataclass(frozen=True, slots=True)
class _Piece:
    """One sequence of a pack: its tokens, which of its predictions carry loss, and the pack's rows about them."""

    token_ids: Int64Array
    position: Int64Array
    rows: slice


def _pieces(pack: Pack) -> Iterator[_Piece]:
    """Iterate over the sequences of a pack that carry loss, in order."""
    valid_T, row = carries_loss(pack), 0
    for start, end in zip(pack.cu_seqlens[:-1].tolist(), pack.cu_seqlens[1:].tolist(), strict=True):
        position = np.flatnonzero(valid_T[start:end])
        if len(position):
            yield _Piece(pack.token_T[start:end], position, slice(row, row + len(position)))
            row += len(position)


def _hash_of(pack: Pack) -> int:
    return hash64(np.concatenate([pack.token_T, pack.cu_seqlens, valid_positions(pack)]))


class RecordingTeacher:
    """Pass on a live teacher's outputs and write them to a directory."""

    def __init__(
        self,
        teacher: Teacher,
        directory: str | Path,
        student: Groups,
        *,
        facts: Mapping[str, Any],
        values: Values = "fp16",
    ) -> None:
        """Take ``facts``: JSON-able; what the scores depend on besides the sequences, ``vocab_size`` among them.

        ``values``: how log-probs and entropies are stored.

        Raises:
            DataError: the directory holds scores recorded under other facts.
        """
        self._teacher = teacher
        self._directory = Path(directory)
        self._student = student
        self._values = values
        self._vocab_size = int(facts["vocab_size"])
        make_directory(self._directory)
        dist.barrier()
        if (self._directory / FILE).exists():
            facts = check_facts(self._directory, facts, fix="Record into another directory", adding=True)
        dist.barrier()  # nobody looks any more
        if dist.get_rank() == 0:
            remove_partials(self._directory)
            write_facts(self._directory, facts)

    def score(
        self, packs: Sequence[Sequence[Pack]], request: TeacherRequest, query_ids: QueryIds | None = None
    ) -> list[TeacherOutputs | None]:
        return self.start(packs, request, query_ids)()

    def start(
        self, packs: Sequence[Sequence[Pack]], request: TeacherRequest, query_ids: QueryIds | None = None
    ) -> PendingScores:
        """Start as ``score``; outputs are written when they are there."""
        pending = start_scoring(self._teacher, packs, request, query_ids)
        return lambda: self._recorded(packs, pending())

    def _recorded(
        self, packs: Sequence[Sequence[Pack]], outputs: list[TeacherOutputs | None]
    ) -> list[TeacherOutputs | None]:
        found: list[SequenceScores] = []
        for pack, output in zip(packs[self._student.replica], outputs, strict=True):
            if output is not None and self._student.tensor_rank == 0:
                whole = _whole(output, pack, self._student)
                if self._student.context_rank == 0:
                    found += _by_sequence(pack.scored, whole)
        write_part(self._directory, found, vocab_size=self._vocab_size, values=self._values)
        return outputs

    def close(self) -> None:
        self._teacher.close()


def _by_sequence(pack: Pack, outputs: TeacherOutputs) -> Iterator[SequenceScores]:
    """Split the outputs of a pack by its sequences."""
    values = {field.name: value.cpu() for field, value in present(outputs) if value.dim() == 1 or value.shape[1]}
    pack_hash = _hash_of(pack)
    for piece in _pieces(pack):
        fields = {name: value[piece.rows] for name, value in values.items()}
        yield SequenceScores(
            key=sequence_key(piece.token_ids),
            position=piece.position,
            token_ids=piece.token_ids[piece.position + 1],
            pack=pack_hash,
            queries=hash64(fields["query_ids"].numpy()) if "query_ids" in fields else 0,
            fields=fields,
        )


def _whole(outputs: TeacherOutputs, pack: Pack, student: Groups) -> TeacherOutputs:
    """Gather the outputs of all rows of a pack, of which each context rank has some. Collective over them."""
    ranks = student.layout.context
    if ranks == 1:
        return outputs
    rows = [valid_positions(pack, rank=rank, ranks=ranks) for rank in range(ranks)]
    order = torch.from_numpy(np.argsort(np.concatenate(rows), kind="stable"))

    longest = max(map(len, rows))

    def joined(value: torch.Tensor) -> torch.Tensor:
        padded = value.new_zeros(longest, *value.shape[1:])
        padded[: len(value)] = value
        every = all_gather_stack(padded, student.pg.cp)
        parts = [part[: len(own)] for part, own in zip(every, rows, strict=True)]
        return torch.cat(parts)[order.to(value.device)]

    return mapped(outputs, joined)


def _own(outputs: TeacherOutputs, pack: Pack, student: Groups) -> TeacherOutputs:
    """Take the rows of a pack that this context rank computes."""
    if student.layout.context == 1:
        return outputs
    rows = torch.from_numpy(np.searchsorted(valid_positions(pack), own_valid_positions(pack, student)))
    return mapped(outputs, lambda value: value[rows.to(value.device)])


class RecordedTeacher:
    """Implement ``teacher.protocol.Teacher`` from a directory of scores."""

    def __init__(
        self, directory: str | Path, student: Groups, device: torch.device, *, facts: Mapping[str, Any]
    ) -> None:
        """Raise DataError unless the scores were recorded under these ``facts``."""
        self._directory = Path(directory)
        self._student = student
        self._device = device
        check_facts(self._directory, facts, fix="Use the models and method of the recording")
        self._store = Store(self._directory)
        self._readable: dict[TeacherRequest, TeacherRequest] = {}

    def score(
        self, packs: Sequence[Sequence[Pack]], request: TeacherRequest, query_ids: QueryIds | None = None
    ) -> list[TeacherOutputs | None]:
        """Read the recorded outputs; the query ids in them are those of the recording.

        Raises:
            DataError: a sequence was never scored, or was scored with less than is requested, or for a student whose
                own likeliest tokens were others than ``query_ids``.
        """
        mine = packs[self._student.replica]
        if not self._student.is_last_stage:
            return [None] * len(mine)
        if request not in self._readable:
            self._readable[request] = _readable(self._store, request)
        request = self._readable[request]
        outputs: list[TeacherOutputs | None] = []
        for pack, ids_NJ in zip(mine, query_ids or [None] * len(mine), strict=True):
            whole_NJ = None if ids_NJ is None or self._student.layout.context > 1 else ids_NJ
            found = _own(_read_pack(self._store, pack.scored, request, whole_NJ), pack, self._student)
            found = mapped(found, lambda value: value.to(self._device))
            _check_queries(found.query_ids_NJ, ids_NJ, self._directory)
            outputs.append(found)
        return outputs

    def close(self) -> None:
        """Release nothing: there is nothing to release."""


def _readable(store: Store, request: TeacherRequest) -> TeacherRequest:
    """Leave out of a request the entropies that no method needs and that only some sequences have.

    A bound stands in for an entropy that is meant for a metric alone. What is then left out is said once.
    """
    if not request.entropy or request.entropy_needed:
        return request
    parts = [columns for columns in store.part_columns() if not lacking(columns, request)]
    for name, instead in (
        ("entropy", request),
        ("entropy_bound", replace(request, entropy=False, entropy_bound=True)),
    ):
        if all(name in columns for columns in parts):
            return instead
    warnings.warn(
        f"{store.directory.absolute()} does not hold the teacher's entropy for every sequence: the metric "
        "teacher_entropy is left out.",
        stacklevel=2,
    )
    return replace(request, entropy=False)


def _read_pack(store: Store, pack: Pack, request: TeacherRequest, query_NJ: torch.Tensor | None) -> TeacherOutputs:
    """Read what is requested of every row of a pack."""
    pack_hash, parts = _hash_of(pack), []
    for piece in _pieces(pack):
        ids_nJ = None if query_NJ is None else query_NJ[piece.rows].cpu()
        place = _best_place(store, piece, request, ids_nJ, pack_hash)
        rows = torch.from_numpy(np.searchsorted(store.positions(place), piece.position))
        target_n = torch.from_numpy(piece.token_ids[piece.position + 1])
        parts.append(fitted(_Found(store, place, rows), target_n, request))
    if not parts:  # a pack that carries no loss: no rows of some place have the right widths and types
        places = (place for place in store.places() if not lacking(store.columns(place), request))
        none = torch.empty(0, dtype=torch.int64)
        parts = [fitted(_Found(store, place, none), none, request) for place in (next(places, None),) if place]
    values = [{field.name: value for field, value in present(part)} for part in parts]
    return outputs_of({name: torch.cat([one[name] for one in values]) for name in values[0]} if values else _nothing())


def _nothing() -> dict[str, torch.Tensor]:
    return {"logprob": torch.empty(0)}


def _best_place(
    store: Store, piece: _Piece, request: TeacherRequest, query_nJ: torch.Tensor | None, pack_hash: int
) -> Place:
    """Choose where to read a sequence.

    A sequence that was scored more than once was so in different packs, with rounding of its own, with more or less
    requested, for more or fewer of its predictions, or for students who named different ids: of the occasions that have
    what is requested, the one that is most like this one is taken.
    """
    places = store.find(sequence_key(piece.token_ids))
    covering = [place for place in places if store.covers(place, piece.position)]
    able = [place for place in covering if not lacking(store.columns(place), request)]
    if not able:
        raise DataError(_what_is_missing(store, piece, request, places, covering))
    if query_nJ is None:
        return max(able, key=lambda place: place.pack == pack_hash)
    queries = hash64(query_nJ.numpy())
    place = max(able, key=lambda place: (place.queries == queries, place.pack == pack_hash))
    if len(able) > 1 and place.queries != queries:
        place = min(able, key=lambda place: _strangers(_query_ids(store, place, piece), query_nJ))
    return place


def _what_is_missing(
    store: Store, piece: _Piece, request: TeacherRequest, places: Sequence[Place], covering: Sequence[Place]
) -> str:
    where = store.directory.absolute()
    if covering:
        # what the fullest of them lacks
        missing = min((lacking(store.columns(place), request) for place in covering), key=len)
        fix = "on the same rollouts or data"
        if request.queries:
            fix = "while training with this method and this student"
        return (
            f"{where} lacks {' and '.join(missing)}, which the method needs. Add the scores that are missing: "
            + ("`tropd score CONFIG teacher.record=DIR` " if not request.queries else "teacher.record=DIR ")
            + f"{fix}."
        )
    known = "" if not places else f" from position {piece.position[0]} on (it has others of its predictions)"
    return (
        f"{where} holds no scores for a sequence of {len(piece.token_ids)} tokens that begins "
        f"{piece.token_ids[:8].tolist()}{known}. Add them with `tropd score CONFIG teacher.record=DIR` on the same "
        "rollouts or data, or use the live teacher."
    )


def _query_ids(store: Store, place: Place, piece: _Piece) -> torch.Tensor | None:
    if "query_ids" not in store.columns(place):
        return None
    rows = torch.from_numpy(np.searchsorted(store.positions(place), piece.position))
    return store.read(place, "query_ids")[rows]


def _strangers(recorded_NJ: torch.Tensor | None, query_NJ: torch.Tensor) -> float:
    """Compute the share of the query ids that are not in the recording."""
    if recorded_NJ is None or not query_NJ.numel() or len(recorded_NJ) != len(query_NJ):
        return 1.0
    both_NX = torch.cat([recorded_NJ.long(), query_NJ], dim=1)
    return first_of_each(both_NX)[:, recorded_NJ.shape[1] :].double().mean().item()


class _Found(Mapping[str, torch.Tensor]):
    """Recorded fields of some predictions of one sequence, each read when it is looked at."""

    def __init__(self, store: Store, place: Place, rows: torch.Tensor) -> None:
        self._store, self._place, self._rows = store, place, rows

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._store.columns(self._place):
            raise KeyError(name)
        return self._store.read(self._place, name)[self._rows]

    def __iter__(self) -> Iterator[str]:
        return iter(self._store.columns(self._place))

    def __len__(self) -> int:
        return len(self._store.columns(self._place))


def _check_queries(recorded_NJ: torch.Tensor | None, query_NJ: torch.Tensor | None, path: Path) -> None:
    """Raise DataError when too many of the query ids are not those of the recording."""
    if recorded_NJ is None or query_NJ is None or not query_NJ.numel():
        return
    strangers = _strangers(recorded_NJ, query_NJ)
    if strangers > _STRANGERS:
        raise DataError(
            f"{path.absolute()} was recorded for another student: {strangers:.0%} of the present one's likeliest "
            "tokens were not scored. Replay with the student and rollouts of the recording, or use the live teacher."
        )


def fitted(found: Mapping[str, torch.Tensor], target_N: torch.Tensor, request: TeacherRequest) -> TeacherOutputs:
    """Cut what is recorded, by the fields' names, to what is requested; nothing else of it is read."""
    values: dict[str, torch.Tensor] = {}
    for field in requested(request):
        if field.name in found:
            value = found[field.name]
            values[field.name] = value[:, : field.columns(request)] if field.width in ("top_k", "queries") else value
    if request.has_tail:
        values["logtail"] = _tail_beyond(found, request, target_N)
    return outputs_of(values)


def _tail_beyond(found: Mapping[str, torch.Tensor], request: TeacherRequest, target_N: torch.Tensor) -> torch.Tensor:
    """Add to the recorded log tail the mass of what was recorded and is not requested."""
    none_N0 = target_N.new_empty(len(target_N), 0)
    # the ends of responses are those of the recording: they are among its facts
    wanted_ids, other_ids = [with_ends(target_N[:, None], request.end_ids)], []
    other_logprobs = [found["logtail"][:, None]]
    for kind, count in (("topk", request.top_k), ("query", request.queries)):
        ids, logprob = found.get(f"{kind}_ids", none_N0), found.get(f"{kind}_logprob", none_N0)
        wanted_ids.append(ids[:, :count])
        other_ids.append(ids[:, count:])
        other_logprobs.append(logprob[:, count:])
    listed = torch.cat([*wanted_ids, *other_ids], dim=1)
    fresh = first_of_each(listed)[:, sum(ids.shape[1] for ids in wanted_ids) :]
    tail, *others = other_logprobs
    outside = torch.cat(others, dim=1).masked_fill(~fresh, -torch.inf)
    return torch.cat([tail, outside], dim=1).logsumexp(-1)
