"""Teacher signals on disk, by the sequences they grade: written beside a live teacher, read instead of it.

``recording.json`` holds the facts that all of them depend on: what the teacher is, the tokenizer, the temperature, how
many ids its softmax runs over. How the sequences were packed and laid out is none of them. The files beside it are
those of ``teacher.store``.
"""

from __future__ import annotations

import json
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
from megatron_tropd.storage.write_aside import write_aside
from megatron_tropd.teacher.protocol import PendingScores, QueryIds, Teacher, TeacherRequest, start_scoring
from megatron_tropd.teacher.schema import SCORE_FIELDS, lacking, mapped, outputs_of, present, requested
from megatron_tropd.teacher.store import FORMAT, Grades, Place, Store, Values, hash64, sequence_key, write_part
from megatron_tropd.types import Int64Array, Pack, TeacherOutputs

_FACTS = "recording.json"
# Another layout may order two candidates of nearly equal probability the other way; another student has others.
_STRANGERS = 0.1


@dataclass(frozen=True, slots=True)
class _Piece:
    """One sequence of a pack: its tokens, and which rows of the pack's signal are about it."""

    token_ids: Int64Array
    first: int  # its first prediction that carries loss; all later ones do
    rows: slice

    @property
    def count(self) -> int:
        return self.rows.stop - self.rows.start


def _pieces(pack: Pack) -> Iterator[_Piece]:
    """The sequences of a pack that carry loss, in order."""
    valid_T, row = carries_loss(pack), 0
    for start, end in zip(pack.cu_seqlens[:-1].tolist(), pack.cu_seqlens[1:].tolist(), strict=True):
        count = int(valid_T[start:end].sum())
        if count:
            first = int(np.argmax(valid_T[start:end]))
            yield _Piece(pack.token_T[start:end], first, slice(row, row + count))
            row += count


def _hash_of(pack: Pack) -> int:
    return hash64(np.concatenate([pack.token_T, pack.cu_seqlens, valid_positions(pack)]))


class RecordingTeacher:
    """Passes on a live teacher's signals and writes them to a directory."""

    def __init__(
        self,
        teacher: Teacher,
        directory: str | Path,
        student: Groups,
        *,
        facts: Mapping[str, Any],
        values: Values = "fp16",
    ) -> None:
        """``facts``: JSON-able; what the signals depend on besides the sequences, ``vocab_size`` among them.

        ``values``: how log-probs and entropies are stored.

        Raises:
            DataError: the directory holds signals recorded under other facts.
        """
        self._teacher = teacher
        self._directory = Path(directory)
        self._student = student
        self._values = values
        self._vocab_size = int(facts["vocab_size"])
        facts = {"format": FORMAT, **facts}
        self._directory.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        if (self._directory / _FACTS).exists():
            _check_facts(self._directory, facts, fix="Record into another directory")
        dist.barrier()  # nobody looks any more
        if dist.get_rank() == 0:
            write_aside(self._directory / _FACTS, json.dumps(facts, indent=2, sort_keys=True))

    def score(
        self, packs: Sequence[Sequence[Pack]], request: TeacherRequest, query_ids: QueryIds | None = None
    ) -> list[TeacherOutputs | None]:
        return self.start(packs, request, query_ids)()

    def start(
        self, packs: Sequence[Sequence[Pack]], request: TeacherRequest, query_ids: QueryIds | None = None
    ) -> PendingScores:
        """As ``score``; they are written when they are there."""
        pending = start_scoring(self._teacher, packs, request, query_ids)
        return lambda: self._recorded(packs, pending())

    def _recorded(
        self, packs: Sequence[Sequence[Pack]], signals: list[TeacherOutputs | None]
    ) -> list[TeacherOutputs | None]:
        found: list[Grades] = []
        for pack, signal in zip(packs[self._student.replica], signals, strict=True):
            if signal is not None and self._student.tensor_rank == 0:
                whole = _whole(signal, pack, self._student)
                if self._student.context_rank == 0:
                    found += _grades(pack, whole)
        write_part(self._directory, found, vocab_size=self._vocab_size, values=self._values)
        return signals

    def close(self) -> None:
        self._teacher.close()


def _grades(pack: Pack, signal: TeacherOutputs) -> Iterator[Grades]:
    """What a signal says of each sequence of its pack."""
    arrays: dict[str, np.ndarray] = {}
    for field, value in present(signal):
        bits = value.dtype == torch.bfloat16
        array = value.cpu().contiguous()
        arrays[f"{field.name}.bf16" if bits else field.name] = (array.view(torch.int16) if bits else array).numpy()
    pack_hash = _hash_of(pack)
    for piece in _pieces(pack):
        fields = {name: array[piece.rows] for name, array in arrays.items()}
        asked = hash64(fields["query_ids"]) if "query_ids" in fields else 0
        key = sequence_key(piece.token_ids)
        yield Grades(key=key, first=piece.first, pack=pack_hash, asked=asked, fields=fields)


def _whole(signal: TeacherOutputs, pack: Pack, student: Groups) -> TeacherOutputs:
    """The signal of all rows of a pack, of which each context-parallel rank has some. Collective over them."""
    ranks = student.layout.context
    if ranks == 1:
        return signal
    rows = [valid_positions(pack, rank=rank, ranks=ranks) for rank in range(ranks)]
    order = torch.from_numpy(np.argsort(np.concatenate(rows), kind="stable"))

    longest = max(map(len, rows))

    def joined(value: torch.Tensor) -> torch.Tensor:
        padded = value.new_zeros(longest, *value.shape[1:])
        padded[: len(value)] = value
        every = all_gather_stack(padded, student.pg.cp)
        parts = [part[: len(own)] for part, own in zip(every, rows, strict=True)]
        return torch.cat(parts)[order.to(value.device)]

    return mapped(signal, joined)


def _own(signal: TeacherOutputs, pack: Pack, student: Groups) -> TeacherOutputs:
    """The rows of a pack's signal that this context-parallel rank computes."""
    if student.layout.context == 1:
        return signal
    rows = torch.from_numpy(np.searchsorted(valid_positions(pack), own_valid_positions(pack, student)))
    return mapped(signal, lambda value: value[rows.to(value.device)])


def recorded_facts(directory: str | Path) -> dict[str, Any]:
    """The facts of a recording; DataError where there is none."""
    path = Path(directory) / _FACTS
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{path.parent.absolute()} is not a recording of a teacher ({_FACTS} is missing or broken). "
            "Give the directory of a run with teacher.record, or of `tropd score`."
        ) from error


class RecordedTeacher:
    """Implements ``teacher.protocol.Teacher`` from a directory of signals."""

    def __init__(
        self, directory: str | Path, student: Groups, device: torch.device, *, facts: Mapping[str, Any]
    ) -> None:
        """Raises DataError unless the signals were recorded under these ``facts``."""
        self._directory = Path(directory)
        self._student = student
        self._device = device
        _check_facts(self._directory, {"format": FORMAT, **facts}, fix="Use the models and method of the recording")
        self._store = Store(self._directory)

    def score(
        self, packs: Sequence[Sequence[Pack]], request: TeacherRequest, query_ids: QueryIds | None = None
    ) -> list[TeacherOutputs | None]:
        """The recorded signals; the ids in them are those that were asked about then.

        Raises:
            DataError: a sequence was never graded, or was scored with less than ``request`` asks for, or for a student
                whose own likeliest tokens were others than ``query_ids``.
        """
        mine = packs[self._student.replica]
        if not self._student.is_last_stage:
            return [None] * len(mine)
        signals: list[TeacherOutputs | None] = []
        for pack, ids_NJ in zip(mine, query_ids or [None] * len(mine), strict=True):
            target_N = torch.from_numpy(pack.target_T[valid_positions(pack)]).to(self._device)
            whole_NJ = None if ids_NJ is None or self._student.layout.context > 1 else ids_NJ
            found = _Found(self._store, _places(self._store, pack, whole_NJ), self._device)
            signal = _own(_fitted(found, target_N, request, self._directory), pack, self._student)
            _check_asked(signal.query_ids_NJ, ids_NJ, self._directory)
            signals.append(signal)
        return signals

    def close(self) -> None:
        """There is nothing to let go of."""


def _places(store: Store, pack: Pack, asked_NJ: torch.Tensor | None) -> list[tuple[Place, slice]]:
    """Where the grades of a pack's sequences lie, and which of the rows there are wanted.

    A sequence that was graded more than once was so in different packs, with rounding of its own, or for students who
    asked about different ids: the occasion that is most like this one is taken.
    """
    pack_hash, found = _hash_of(pack), []
    for piece in _pieces(pack):
        places = [p for p in store.find(sequence_key(piece.token_ids)) if p.first <= piece.first]
        if not places:
            raise DataError(
                f"{store.directory.absolute()} holds no grades for a sequence of {len(piece.token_ids)} tokens that "
                f"begins {piece.token_ids[:8].tolist()}. Record the teacher on the same rollouts or data, or use the "
                "live teacher."
            )
        asked = 0 if asked_NJ is None else hash64(asked_NJ[piece.rows].cpu().numpy())
        ids = None if asked_NJ is None else asked_NJ[piece.rows].cpu()
        place = max(places, key=lambda p: (p.asked == asked, p.pack == pack_hash))
        if ids is not None and len(places) > 1 and place.asked != asked:
            place = min(places, key=lambda p: _strangers(_tensor(store, p, "query_ids"), ids))
        found.append((place, slice(piece.first - place.first, piece.first - place.first + piece.count)))
    if not found and len(store):  # a pack that carries no loss: no rows of some place have the right widths and types
        found.append((store.first, slice(0, 0)))
    return found


def _strangers(recorded_NJ: torch.Tensor | None, asked_NJ: torch.Tensor) -> float:
    """Share of the ids asked about that are not in the recording."""
    if recorded_NJ is None or not asked_NJ.numel() or len(recorded_NJ) != len(asked_NJ):
        return 1.0
    both_NX = torch.cat([recorded_NJ.long(), asked_NJ], dim=1)
    return first_of_each(both_NX)[:, recorded_NJ.shape[1] :].double().mean().item()


def _tensor(store: Store, place: Place, name: str) -> torch.Tensor | None:
    if store.width(place, name) is None:
        return None
    array, bits = store.read(place, name)
    if bits:
        return torch.from_numpy(array).view(torch.bfloat16)
    if name.endswith("_ids"):
        return torch.from_numpy(array.astype(np.int64))
    return torch.from_numpy(array if "hidden" in name else array.astype(np.float32))


class _Found(Mapping[str, torch.Tensor]):
    """The recorded fields of one pack, each read when it is looked at."""

    def __init__(self, store: Store, places: Sequence[tuple[Place, slice]], device: torch.device) -> None:
        self._store, self._places, self._device = store, places, device
        self._names = [f.name for f in SCORE_FIELDS if all(store.width(p, f.name) is not None for p, _ in places)]

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        parts = []
        for place, rows in self._places:
            tensor = _tensor(self._store, place, name)
            assert tensor is not None
            parts.append(tensor[rows])
        if parts and parts[0].dim() == 2:  # parts may be of recordings with different numbers of candidates
            narrowest = min(part.shape[1] for part in parts)
            parts = [part[:, :narrowest] for part in parts]
        return torch.cat(parts).to(self._device) if parts else torch.empty(0, device=self._device)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _check_asked(recorded_NJ: torch.Tensor | None, asked_NJ: torch.Tensor | None, path: Path) -> None:
    """DataError when too many of the ids asked about are not those of the recording."""
    if recorded_NJ is None or asked_NJ is None or not asked_NJ.numel():
        return
    strangers = _strangers(recorded_NJ, asked_NJ)
    if strangers > _STRANGERS:
        raise DataError(
            f"{path.absolute()} was recorded for another student: {strangers:.0%} of the present one's likeliest "
            "tokens were not asked about. Replay with the student and rollouts of the recording, or use the live "
            "teacher."
        )


def _check_facts(directory: Path, facts: Mapping[str, Any], *, fix: str) -> None:
    recorded = recorded_facts(directory)
    wanted = json.loads(json.dumps(dict(facts)))
    changed = [
        f"with {key} {recorded[key]!r}, not {value!r}" if key in recorded else f"without {key}"
        for key, value in wanted.items()
        if recorded.get(key) != value
    ]
    if changed:
        raise DataError(f"{directory.absolute()} was recorded {'; '.join(changed)}. {fix}.")


def _fitted(
    found: Mapping[str, torch.Tensor], target_N: torch.Tensor, request: TeacherRequest, path: Path
) -> TeacherOutputs:
    """Cut what is recorded, by the fields' names, to what is requested."""
    # what is not requested is not read
    columns = {f.name: _columns(found[f.name]) for f in requested(request) if f.name in found}
    if request.entropy and not columns.get("entropy") and "entropy_bound" in found:
        request = replace(request, entropy=request.entropy_needed, entropy_bound=True)
    missing = lacking(columns, request)
    if request.entropy and not request.entropy_needed and not columns.get("entropy"):
        missing += ["entropies"]
    if missing:
        raise DataError(
            f"{path.absolute()} lacks {' and '.join(missing)}, which the method needs. "
            "Record the teacher again with this method."
        )
    values = {field.name: found[field.name] for field in requested(request) if field.name in found}
    for field in requested(request):
        if field.width in ("top_k", "queries"):
            values[field.name] = values[field.name][:, : field.columns(request)]
    if request.has_tail:
        values["logtail"] = _tail_beyond(found, request, target_N)
    return outputs_of({name: value.long() if name.endswith("_ids") else value for name, value in values.items()})


def _columns(value: torch.Tensor) -> int:
    return value.shape[1] if value.dim() == 2 else 1


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
