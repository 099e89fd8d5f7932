"""Teacher signals on disk, keyed by the tokens they grade: written beside a live teacher, read instead of it.

One ``.npz`` file per pack, plain arrays only (never pickled), beside ``recording.json`` with the facts that all of
them depend on: what the teacher is, its temperature, how many ids its softmax runs over.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_tropd.engine.context import own_valid_positions, valid_positions
from megatron_tropd.errors import DataError
from megatron_tropd.losses.support import first_of_each
from megatron_tropd.parallel.collectives import all_gather_stack
from megatron_tropd.parallel.groups import Groups
from megatron_tropd.teacher.protocol import AskedIds, SignalSpec, Teacher
from megatron_tropd.types import Pack, Signal

_FIELDS = (
    "logprob_N",
    "topk_ids_NK",
    "topk_logprob_NK",
    "asked_ids_NJ",
    "asked_logprob_NJ",
    "topk_logtail_N",
    "entropy_N",
    "base_logprob_N",
    "hidden_NE",
)
_FACTS = "recording.json"
# Another layout may order two candidates of nearly equal probability the other way; another student has others.
_STRANGERS = 0.1
_BF16 = ".bf16"  # numpy has no bfloat16: its bits are kept as int16 under the name with this ending


def pack_key(pack: Pack) -> str:
    """Name of a pack's signal: a hash of its tokens, where sequences begin, and which predictions count."""
    digest = hashlib.sha256()
    for array in (pack.token_T, pack.cu_seqlens, valid_positions(pack)):
        digest.update(np.ascontiguousarray(array).tobytes())
        digest.update(b"|")
    return digest.hexdigest()[:32]


class RecordingTeacher:
    """Passes on a live teacher's signals and writes them to a directory."""

    def __init__(self, teacher: Teacher, directory: str | Path, student: Groups, *, facts: Mapping[str, Any]) -> None:
        """``facts``: JSON-able; what the signals depend on besides the packs.

        Raises:
            DataError: the directory holds signals recorded under other facts.
        """
        self._teacher = teacher
        self._directory = Path(directory)
        self._student = student
        self._directory.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        if (self._directory / _FACTS).exists():
            _check_facts(self._directory, facts, fix="Record into another directory")
        dist.barrier()  # nobody looks any more
        if dist.get_rank() == 0:
            partial = self._directory / (_FACTS + ".partial")
            partial.write_text(json.dumps(dict(facts), indent=2, sort_keys=True))
            os.replace(partial, self._directory / _FACTS)

    def score(
        self, packs: Sequence[Sequence[Pack]], spec: SignalSpec, asked: AskedIds | None = None
    ) -> list[Signal | None]:
        signals = self._teacher.score(packs, spec, asked)
        for pack, signal in zip(packs[self._student.replica], signals, strict=True):
            if signal is not None and self._student.tensor_rank == 0:
                whole = _whole(signal, pack, self._student)
                if self._student.context_rank == 0:
                    _write(self._directory / f"{pack_key(pack)}.npz", whole)
        return signals

    def close(self) -> None:
        self._teacher.close()


def _whole(signal: Signal, pack: Pack, student: Groups) -> Signal:
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

    return _mapped(signal, joined)


def _own(signal: Signal, pack: Pack, student: Groups) -> Signal:
    """The rows of a pack's signal that this context-parallel rank computes."""
    if student.layout.context == 1:
        return signal
    rows = torch.from_numpy(np.searchsorted(valid_positions(pack), own_valid_positions(pack, student)))
    return _mapped(signal, lambda value: value[rows.to(value.device)])


def _mapped(signal: Signal, change: Callable[[torch.Tensor], torch.Tensor]) -> Signal:
    fields = {name: getattr(signal, name) for name in _FIELDS}
    return replace(signal, **{name: change(value) for name, value in fields.items() if value is not None})


class RecordedTeacher:
    """Implements ``teacher.protocol.Teacher`` from a directory of signals."""

    def __init__(
        self, directory: str | Path, student: Groups, device: torch.device, *, facts: Mapping[str, Any]
    ) -> None:
        """Raises DataError unless the signals were recorded under these ``facts``."""
        self._directory = Path(directory)
        self._student = student
        self._device = device
        _check_facts(self._directory, facts, fix="Use the models and method of the recording")

    def score(
        self, packs: Sequence[Sequence[Pack]], spec: SignalSpec, asked: AskedIds | None = None
    ) -> list[Signal | None]:
        """The recorded signals; the ids in them are those that were asked about then.

        Raises:
            DataError: a pack was never graded, or was graded with less than ``spec`` asks for, or for a student whose
                own likeliest tokens were others than ``asked``.
        """
        mine = packs[self._student.replica]
        if not self._student.is_last_stage:
            return [None] * len(mine)
        signals: list[Signal | None] = []
        for pack, ids_NJ in zip(mine, asked or [None] * len(mine), strict=True):
            path = self._directory / f"{pack_key(pack)}.npz"
            signal = _own(_read(path, pack, spec, self._device), pack, self._student)
            _check_asked(signal.asked_ids_NJ, ids_NJ, path)
            signals.append(signal)
        return signals

    def close(self) -> None:
        """There is nothing to let go of."""


def _check_asked(recorded_NJ: torch.Tensor | None, asked_NJ: torch.Tensor | None, path: Path) -> None:
    """DataError when too many of the ids asked about are not those of the recording."""
    if recorded_NJ is None or asked_NJ is None or not asked_NJ.numel():
        return
    both_NX = torch.cat([recorded_NJ, asked_NJ], dim=1)
    strangers = first_of_each(both_NX)[:, recorded_NJ.shape[1] :].double().mean().item()
    if strangers > _STRANGERS:
        raise DataError(
            f"{path.absolute()} was recorded for another student: {strangers:.0%} of the present one's likeliest "
            "tokens were not asked about. Replay with the student and rollouts of the recording, or use the live "
            "teacher."
        )


def _check_facts(directory: Path, facts: Mapping[str, Any], *, fix: str) -> None:
    path = directory / _FACTS
    try:
        recorded = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{directory.absolute()} is not a recording of a teacher ({_FACTS} is missing or broken). "
            "Give the directory of a run with teacher.record."
        ) from error
    wanted = json.loads(json.dumps(dict(facts)))
    changed = [
        f"with {key} {recorded[key]!r}, not {value!r}" if key in recorded else f"without {key}"
        for key, value in wanted.items()
        if recorded.get(key) != value
    ]
    if changed:
        raise DataError(f"{directory.absolute()} was recorded {'; '.join(changed)}. {fix}.")


def _write(path: Path, signal: Signal) -> None:
    arrays: dict[str, np.ndarray] = {}
    for name in _FIELDS:
        value = getattr(signal, name)
        if value is None:
            continue
        if value.dtype == torch.bfloat16:
            arrays[name + _BF16] = value.cpu().contiguous().view(torch.int16).numpy()
        else:
            arrays[name] = (value.to(torch.int32) if "_ids_" in name else value).cpu().numpy()
    partial = path.with_suffix(f".{dist.get_rank()}.partial")
    with partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    os.replace(partial, path)


def _read(path: Path, pack: Pack, spec: SignalSpec, device: torch.device) -> Signal:
    if not path.exists():
        raise DataError(
            f"{path.parent.absolute()} holds no grades for a pack ({path.stem}). Record the teacher on the same "
            "rollouts, data order and train.pack_tokens, or use the live teacher."
        )
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            found = dict(_tensor(name, stored[name]) for name in stored.files)
        found["logprob_N"]
    # a file that is a single array opens, but is no archive: it has neither `with` nor names
    except (KeyError, ValueError, TypeError, AttributeError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{path.absolute()} is torn or not a recording: {error}. Record it again.") from error
    target_N = torch.from_numpy(pack.target_T[valid_positions(pack)]).to(device)
    return _fitted({name: value.to(device) for name, value in found.items()}, target_N, spec, path)


def _tensor(name: str, array: np.ndarray) -> tuple[str, torch.Tensor]:
    tensor = torch.from_numpy(array)
    if name.endswith(_BF16):
        return name.removesuffix(_BF16), tensor.view(torch.bfloat16)
    return name, tensor


def _fitted(found: dict[str, torch.Tensor], target_N: torch.Tensor, spec: SignalSpec, path: Path) -> Signal:
    """The recorded signal cut to what is asked for."""
    recorded_k = found["topk_ids_NK"].shape[1] if "topk_ids_NK" in found else 0
    lacking = [f"the {spec.top_k} likeliest tokens (it has {recorded_k})"] if recorded_k < spec.top_k else []
    recorded_j = found["asked_ids_NJ"].shape[1] if "asked_ids_NJ" in found else 0
    if recorded_j < spec.asked:
        lacking.append(f"the teacher's answer for the student's {spec.asked} likeliest tokens (it has {recorded_j})")
    lacking += ["tail masses"] if spec.has_tail and "topk_logtail_N" not in found else []
    lacking += ["entropies"] if spec.entropy and "entropy_N" not in found else []
    lacking += ["log-probs of a base model"] if spec.base and "base_logprob_N" not in found else []
    lacking += ["hidden states"] if spec.hidden_states and "hidden_NE" not in found else []
    if lacking:
        raise DataError(
            f"{path.absolute()} lacks {' and '.join(lacking)}, which the method needs. "
            "Record the teacher again with this method."
        )
    k, j = spec.top_k, spec.asked
    return Signal(
        logprob_N=found["logprob_N"],
        topk_ids_NK=found["topk_ids_NK"][:, :k].long() if k else None,
        topk_logprob_NK=found["topk_logprob_NK"][:, :k] if k else None,
        asked_ids_NJ=found["asked_ids_NJ"][:, :j].long() if j else None,
        asked_logprob_NJ=found["asked_logprob_NJ"][:, :j] if j else None,
        topk_logtail_N=_tail_beyond(found, spec, target_N) if spec.has_tail else None,
        entropy_N=found["entropy_N"] if spec.entropy else None,
        base_logprob_N=found["base_logprob_N"] if spec.base else None,
        hidden_NE=found.get("hidden_NE") if spec.hidden_states else None,
    )


def _tail_beyond(found: Mapping[str, torch.Tensor], spec: SignalSpec, target_N: torch.Tensor) -> torch.Tensor:
    """The recorded log tail and, when more was recorded than is asked for, the mass of what is then outside as well."""
    none_N0 = target_N.new_empty(len(target_N), 0)
    wanted_ids, other_ids, other_logprobs = [target_N[:, None]], [], [found["topk_logtail_N"][:, None]]
    for kind, count in (("topk_{}_NK", spec.top_k), ("asked_{}_NJ", spec.asked)):
        ids, logprob = found.get(kind.format("ids"), none_N0), found.get(kind.format("logprob"), none_N0)
        wanted_ids.append(ids[:, :count])
        other_ids.append(ids[:, count:])
        other_logprobs.append(logprob[:, count:])
    listed = torch.cat([*wanted_ids, *other_ids], dim=1)
    fresh = first_of_each(listed)[:, sum(ids.shape[1] for ids in wanted_ids) :]
    tail, *others = other_logprobs
    outside = torch.cat(others, dim=1).masked_fill(~fresh, -torch.inf)
    return torch.cat([tail, outside], dim=1).logsumexp(-1)
