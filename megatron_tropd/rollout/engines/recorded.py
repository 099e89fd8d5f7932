"""Rollouts on disk: any run can record them, any run can replay them exactly.

One ``.npz`` file per step, plain arrays only (never pickled): concatenated tokens, regions and log-probs plus one row
of integers per sequence. Files of format 1 had the lengths of prompt and prefix instead of regions; they are read, too.
"""

from __future__ import annotations

import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from megatron_tropd.data.packing import check_regions
from megatron_tropd.errors import DataError
from megatron_tropd.rollout.dispatch import versions_of
from megatron_tropd.rollout.recording import check_sampling
from megatron_tropd.storage.write_aside import make_directory, write_aside
from megatron_tropd.types import Region, Rollout, RolloutRequest, SamplingParams, single_turn

FORMAT = 2
# what numpy and zipfile say of damaged files; RuntimeError of one that seems to be encrypted, or packed in another way
_UNREADABLE = (
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    OSError,
    EOFError,
    MemoryError,
    OverflowError,
    RuntimeError,
    SyntaxError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
_COLUMNS = ("sequence_id", "prompt_index", "finished", "weight_version")
_COLUMNS_1 = ("sequence_id", "prompt_index", "prompt_length", "prefix_length", "finished", "weight_version")


def _file(directory: Path, step: int) -> Path:
    return directory / f"step-{step:08d}.npz"


def write_rollouts(directory: str | Path, step: int, rollouts: Sequence[Rollout]) -> Path:
    """Write one step's rollouts; the file appears whole or not at all."""
    path = _file(Path(directory), step)
    make_directory(path.parent)
    rows = [[getattr(rollout, name) for name in _COLUMNS] for rollout in rollouts]
    columns = {}
    if any(rollout.token_versions is not None for rollout in rollouts):
        columns["token_versions"] = _joined([versions_of(rollout) for rollout in rollouts], np.int64)
    columns |= {
        "format": np.array(FORMAT),
        "rows": np.array(rows, dtype=np.int64).reshape(-1, len(_COLUMNS)),
        "lengths": np.array([len(rollout.token_ids) for rollout in rollouts], dtype=np.int64),
        "token_ids": _joined([rollout.token_ids for rollout in rollouts], np.int64),
        "regions": _joined([rollout.region_L for rollout in rollouts], np.uint8),
        "sampling_logprob": _joined([rollout.sampling_logprob for rollout in rollouts], np.float32),
        "model_logprob": _joined([rollout.model_logprob for rollout in rollouts], np.float32),
    }
    # numpy's stub takes the arrays for allow_pickle
    return write_aside(path, lambda file: np.savez(file, **columns))  # type: ignore[arg-type]


def _joined(arrays: list[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *arrays]).astype(dtype)


def read_rollouts(directory: str | Path, step: int) -> list[Rollout]:
    """Read one step's rollouts as they were recorded.

    Raises:
        DataError: nothing was recorded for the step, or the file is torn, or of a format that is not known here.
    """
    check_recorded(directory, range(step, step + 1))
    path = _file(Path(directory), step)
    arrays = read_arrays(path)
    try:
        if int(arrays.get("format", 1)) <= FORMAT:
            return _rollouts(arrays)
    except _UNREADABLE as error:
        raise _torn(path, error) from error
    raise DataError(
        f"{path.absolute()} is a recording of format {int(arrays['format'])}; read are formats up to {FORMAT}. "
        "Replay it with the version of megatron_tropd that wrote it, or record it again."
    )


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of an ``.npz`` file, none of them pickled; DataError when it is torn."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    # a file that is a single array opens, but is no archive: it has neither `with` nor names
    except _UNREADABLE as error:
        raise _torn(path, error) from error


def _torn(path: Path, error: Exception) -> DataError:
    return DataError(f"{path.absolute()} is torn or not a recording: {error}. Record it again.")


def check_recorded(directory: str | Path, steps: Iterable[int]) -> None:
    """Raise DataError when one of the steps was not recorded."""
    for step in steps:
        path = _file(Path(directory), step)
        if not path.exists():
            recorded = sorted(p.stem for p in path.parent.glob("step-*.npz"))
            span = f"the directory holds {recorded[0]} to {recorded[-1]}" if recorded else "the directory holds none"
            raise DataError(
                f"{path.absolute()} was not recorded ({span}). Record as many steps as train.steps of the replay."
            )


def _rollouts(arrays: dict[str, np.ndarray]) -> list[Rollout]:
    columns = _COLUMNS if "regions" in arrays else _COLUMNS_1
    rows = [dict(zip(columns, row, strict=True)) for row in arrays["rows"].tolist()]
    lengths = arrays["lengths"]
    regions = _parts(arrays["regions"], lengths) if "regions" in arrays else _three_stretches(rows, lengths)
    check_regions(_joined(regions, np.uint8), lengths, np.array([row["sequence_id"] for row in rows], np.int64))
    written = np.array([np.count_nonzero(region_L == Region.CONTINUATION) for region_L in regions], dtype=np.int64)
    versions: list[np.ndarray | None] = [None] * len(rows)
    if "token_versions" in arrays:  # where one sequence has several
        versions = [_if_mixed(version_n) for version_n in _parts(arrays["token_versions"], written)]
    return [
        Rollout(
            **{**row, "finished": bool(row["finished"])},
            token_ids=t,
            region_L=r,
            sampling_logprob=s,
            model_logprob=m,
            token_versions=v,
        )
        for row, t, r, s, m, v in zip(
            rows,
            _parts(arrays["token_ids"], lengths),
            regions,
            _parts(arrays["sampling_logprob"], written),
            _parts(arrays["model_logprob"], written),
            versions,
            strict=True,
        )
    ]


def _three_stretches(rows: list[dict[str, int]], lengths: np.ndarray) -> list[np.ndarray]:
    """Return the regions of sequences of format 1, whose rows lose the lengths they follow from."""
    regions = []
    for row, length in zip(rows, lengths.tolist(), strict=True):
        prompt, prefix = row.pop("prompt_length"), row.pop("prefix_length")
        regions.append(single_turn(prompt=prompt, prefix=prefix, continuation=length - prompt - prefix))
    return regions


def _if_mixed(version_n: np.ndarray) -> np.ndarray | None:
    return version_n if len(version_n) and (version_n != version_n[0]).any() else None


def _parts(joined: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    if (lengths < 0).any() or lengths.sum() != len(joined):
        raise ValueError(f"its sequences have {lengths.sum()} entries, its arrays {len(joined)}")
    return np.split(joined, np.cumsum(lengths)[:-1]) if len(lengths) else []


class RecordedSampler:
    """Implement ``rollout.protocol.Sampler`` by replaying a recording; weights are ignored."""

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)

    def update_weights(self, tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        # the stream is collective: it must be drawn to its end
        for _ in tensors:
            pass

    def close(self) -> None:
        """Release nothing: there is nothing to release."""

    def generate(
        self, requests: Sequence[RolloutRequest], params: SamplingParams, *, seed: int, step: int
    ) -> list[Rollout]:
        """Return the recorded rollouts of ``step``.

        Raises:
            DataError: they answer other requests than these (other prompts, order, prefixes or number of samples), or
                were sampled otherwise (other budgets, another temperature).
        """
        check_sampling(self._directory, params)
        rollouts = read_rollouts(self._directory, step)
        if len(rollouts) != len(requests):
            raise DataError(
                f"the recording of step {step} in {self._directory.absolute()} holds {len(rollouts)} sequences, but "
                f"{len(requests)} are requested. Replay with the prompts_per_step, samples_per_prompt and "
                "guided_per_prompt of the recording."
            )
        for request, rollout in zip(requests, rollouts, strict=True):
            if not _answers(rollout, request):
                raise DataError(
                    f"the recording of step {step} in {self._directory.absolute()} answers other prompts: sequence "
                    f"{request.sequence_id} is of prompt {rollout.prompt_index} there, of prompt "
                    f"{request.prompt_index} here, or its text has changed. Replay with the seed, prompts, tokenizer "
                    "and guidance of the recording."
                )
            written = int(np.count_nonzero(rollout.region_L == Region.CONTINUATION))
            if written > request.max_new_tokens:  # of recordings that do not say how they were sampled
                raise DataError(
                    f"the recording of step {step} in {self._directory.absolute()} has a response of {written} tokens "
                    f"for a budget of {request.max_new_tokens} (sequence {request.sequence_id}). Replay with the "
                    "rollout.max_new_tokens of the recording."
                )
        return rollouts


def _answers(rollout: Rollout, request: RolloutRequest) -> bool:
    """Say whether the recorded sequence starts with exactly what is to be continued."""
    context = np.concatenate([request.prompt_ids, request.prefix_ids])
    regions = single_turn(prompt=len(request.prompt_ids), prefix=len(request.prefix_ids))
    given = np.isin(rollout.region_L, (Region.PROMPT, Region.PREFIX))
    context_length = len(given) if given.all() else int(given.argmin())  # tokens before the first that was not given
    return (
        (rollout.sequence_id, rollout.prompt_index) == (request.sequence_id, request.prompt_index)
        and np.array_equal(rollout.region_L[:context_length], regions)
        and np.array_equal(rollout.token_ids[:context_length], context)
    )
