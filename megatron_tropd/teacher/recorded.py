"""Teacher signals on disk, keyed by the tokens they grade: written beside a live teacher, read instead of it.

One ``.npz`` file per pack, plain arrays only (never pickled), beside ``recording.json`` with the facts that all of
them depend on: what the teacher is, its temperature, how many ids its softmax runs over.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_tropd.engine.forward import valid_positions
from megatron_tropd.errors import DataError
from megatron_tropd.parallel.groups import Groups
from megatron_tropd.teacher.protocol import SignalSpec, Teacher
from megatron_tropd.types import Pack, Signal

_FIELDS = ("logprob_N", "topk_ids_NK", "topk_logprob_NK", "entropy_N", "hidden_NE")
_FACTS = "recording.json"
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

    def score(self, packs: Sequence[Sequence[Pack]], spec: SignalSpec) -> list[Signal | None]:
        signals = self._teacher.score(packs, spec)
        if self._student.tensor_rank == 0:
            for pack, signal in zip(packs[self._student.replica], signals, strict=True):
                if signal is not None:
                    _write(self._directory / f"{pack_key(pack)}.npz", signal)
        return signals


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

    def score(self, packs: Sequence[Sequence[Pack]], spec: SignalSpec) -> list[Signal | None]:
        """Raises DataError when a pack was never graded, or was graded with less than ``spec`` asks for."""
        mine = packs[self._student.replica]
        if not self._student.is_last_stage:
            return [None] * len(mine)
        return [_read(self._directory / f"{pack_key(pack)}.npz", spec, self._device) for pack in mine]


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
        f"{key} {recorded.get(key)!r}, not {value!r}" for key, value in wanted.items() if recorded.get(key) != value
    ]
    if changed:
        raise DataError(f"{directory.absolute()} was recorded with {'; '.join(changed)}. {fix}.")


def _write(path: Path, signal: Signal) -> None:
    arrays: dict[str, np.ndarray] = {}
    for name in _FIELDS:
        value = getattr(signal, name)
        if value is None:
            continue
        if value.dtype == torch.bfloat16:
            arrays[name + _BF16] = value.cpu().contiguous().view(torch.int16).numpy()
        else:
            arrays[name] = (value.to(torch.int32) if name == "topk_ids_NK" else value).cpu().numpy()
    partial = path.with_suffix(f".{dist.get_rank()}.partial")
    with partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    os.replace(partial, path)


def _read(path: Path, spec: SignalSpec, device: torch.device) -> Signal:
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
    return _fitted({name: value.to(device) for name, value in found.items()}, spec, path)


def _tensor(name: str, array: np.ndarray) -> tuple[str, torch.Tensor]:
    tensor = torch.from_numpy(array)
    if name.endswith(_BF16):
        return name.removesuffix(_BF16), tensor.view(torch.bfloat16)
    return name, tensor


def _fitted(found: dict[str, torch.Tensor], spec: SignalSpec, path: Path) -> Signal:
    """The recorded signal cut to what is asked for."""
    recorded_k = found["topk_ids_NK"].shape[1] if "topk_ids_NK" in found else 0
    lacking = [f"the {spec.top_k} likeliest tokens (it has {recorded_k})"] if recorded_k < spec.top_k else []
    lacking += ["entropies"] if spec.entropy and "entropy_N" not in found else []
    lacking += ["hidden states"] if spec.hidden_states and "hidden_NE" not in found else []
    if lacking:
        raise DataError(
            f"{path.absolute()} lacks {' and '.join(lacking)}, which the method needs. "
            "Record the teacher again with this method."
        )
    k = spec.top_k
    return Signal(
        logprob_N=found["logprob_N"],
        topk_ids_NK=found["topk_ids_NK"][:, :k].long() if k else None,
        topk_logprob_NK=found["topk_logprob_NK"][:, :k] if k else None,
        entropy_N=found["entropy_N"] if spec.entropy else None,
        hidden_NE=found.get("hidden_NE") if spec.hidden_states else None,
    )
