"""Teacher signals on disk, keyed by the tokens they grade: written beside a live teacher, read instead of it."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_tropd.engine.forward import valid_positions
from megatron_tropd.errors import DataError
from megatron_tropd.parallel.groups import Groups
from megatron_tropd.teacher.protocol import SignalSpec, Teacher
from megatron_tropd.types import Pack, Signal

_FIELDS = ("logprob_N", "topk_ids_NK", "topk_logprob_NK", "entropy_N", "hidden_NE")


def pack_key(pack: Pack) -> str:
    """Name of a pack's signal: a hash of its tokens, where sequences begin, and which predictions count."""
    digest = hashlib.sha256()
    for array in (pack.token_T, pack.cu_seqlens, valid_positions(pack)):
        digest.update(np.ascontiguousarray(array).tobytes())
        digest.update(b"|")
    return digest.hexdigest()[:32]


class RecordingTeacher:
    """Passes on a live teacher's signals and writes them to a directory."""

    def __init__(self, teacher: Teacher, directory: str | Path, student: Groups) -> None:
        self._teacher = teacher
        self._directory = Path(directory)
        self._student = student
        self._directory.mkdir(parents=True, exist_ok=True)

    def score(self, packs: Sequence[Sequence[Pack]], spec: SignalSpec) -> list[Signal | None]:
        signals = self._teacher.score(packs, spec)
        if self._student.tensor_rank == 0:
            for pack, signal in zip(packs[self._student.replica], signals, strict=True):
                if signal is not None:
                    _write(self._directory / f"{pack_key(pack)}.npz", signal)
        return signals


class RecordedTeacher:
    """Implements ``teacher.protocol.Teacher`` from a directory of signals."""

    def __init__(self, directory: str | Path, student: Groups, device: torch.device) -> None:
        self._directory = Path(directory)
        self._student = student
        self._device = device

    def score(self, packs: Sequence[Sequence[Pack]], spec: SignalSpec) -> list[Signal | None]:
        """Raises DataError when a pack was never graded, or was graded with less than ``spec`` asks for."""
        mine = packs[self._student.replica]
        if not self._student.is_last_stage:
            return [None] * len(mine)
        return [_read(self._directory / f"{pack_key(pack)}.npz", spec, self._device) for pack in mine]


def _write(path: Path, signal: Signal) -> None:
    arrays = {name: value.float().cpu().numpy() for name in _FIELDS if (value := getattr(signal, name)) is not None}
    if signal.topk_ids_NK is not None:
        arrays["topk_ids_NK"] = signal.topk_ids_NK.to(torch.int32).cpu().numpy()
    partial = path.with_suffix(f".{dist.get_rank()}.partial")
    with partial.open("wb") as file:
        np.savez(file, **arrays)
    os.replace(partial, path)


def _read(path: Path, spec: SignalSpec, device: torch.device) -> Signal:
    if not path.exists():
        raise DataError(
            f"{path.parent.absolute()} holds no grades for a pack ({path.stem}). Record the teacher on the same "
            "rollouts, data order and train.pack_tokens, or use the live teacher."
        )
    try:
        with np.load(path, allow_pickle=False) as stored:
            found = {name: torch.from_numpy(stored[name]).to(device) for name in stored.files}
    except (KeyError, ValueError, zipfile.BadZipFile, EOFError) as error:
        raise DataError(f"{path.absolute()} is torn or not a recording: {error}. Record it again.") from error
    return _fitted(found, spec, path)


def _fitted(found: dict[str, torch.Tensor], spec: SignalSpec, path: Path) -> Signal:
    """The recorded signal cut to what is asked for."""
    recorded_k = found["topk_ids_NK"].shape[1] if "topk_ids_NK" in found else 0
    missing = [name for name, asked in (("entropy_N", spec.entropy), ("hidden_NE", spec.hidden_states)) if asked]
    missing = [name for name in missing if name not in found]
    if recorded_k < spec.top_k or missing:
        raise DataError(
            f"{path.absolute()} was recorded with top-{recorded_k}{' and without ' + missing[0] if missing else ''}, "
            f"but the method needs top-{spec.top_k}. Record the teacher again with this method."
        )
    k = spec.top_k
    return Signal(
        logprob_N=found["logprob_N"],
        topk_ids_NK=found["topk_ids_NK"][:, :k].long() if k else None,
        topk_logprob_NK=found["topk_logprob_NK"][:, :k] if k else None,
        entropy_N=found["entropy_N"] if spec.entropy else None,
        hidden_NE=found.get("hidden_NE") if spec.hidden_states else None,
    )
