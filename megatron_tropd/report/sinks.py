"""Where metrics go: ``RUN/metrics.jsonl`` always, TensorBoard and services on request. One rank writes."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self, SupportsFloat

from megatron_tropd.errors import ConfigError, DataError
from megatron_tropd.report.metrics import unknown_names
from megatron_tropd.report.trackers import open_tracker
from megatron_tropd.storage.write_aside import make_directory, storage_errors, write_aside

logger = logging.getLogger(__name__)

Number = int | float | None  # as written


class Sink(Protocol):
    """An extra destination of metrics."""

    def write(self, step: int, metrics: Mapping[str, Number]) -> None:
        """Take the metrics of one step."""

    def truncate_after(self, step: int) -> None:
        """Prepare to resume after ``step``: anything later will be written again."""

    def close(self) -> None:
        """Flush what is pending."""


class MetricsWriter:
    """Append one JSON object per step, on disk before ``write`` returns, and hand it on to the other sinks.

    Args:
        path: usually ``RUN/metrics.jsonl``; made with its directory when missing.
        sinks: extra destinations, see :func:`open_sinks`.
        strict: refuse names that are not in ``metrics.METRICS`` (tests do; a long run is not worth losing over one).
    """

    def __init__(self, path: str | Path, *, sinks: Sequence[Sink] = (), strict: bool = False) -> None:
        self.path = Path(path)
        self.sinks = tuple(sinks)
        self.strict = strict
        make_directory(self.path.parent)
        _mend(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, metrics: Mapping[str, SupportsFloat | None]) -> None:
        """Append one step; ``metrics["step"]`` is required. Values that are not finite are written as null."""
        if "step" not in metrics:
            raise ValueError(f"metrics need a step, got {sorted(metrics)}. Add the key 'step'.")
        step = int(float(metrics["step"] or 0))
        if self.strict and (unknown := unknown_names(metrics)):
            raise ValueError(f"metrics {unknown} are not in report/metrics.py. Add a row with unit and meaning.")
        finite = {name: _finite(value) for name, value in metrics.items()} | {"step": step}
        with storage_errors(self.path):
            self._file.write(json.dumps(finite) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        for sink in self.sinks:
            sink.write(step, finite)

    def truncate_after(self, step: int) -> None:
        """Keep the lines with ``step`` or less, to resume from a checkpoint; ``-1`` empties the file. Atomic."""
        self._file.close()
        rows, _ = read_jsonl(self.path)
        stepless = sum(not isinstance(row.get("step"), int) for row in rows)
        if stepless:
            raise DataError(f"{self.path}: {stepless} line(s) have no step. Mend them, or move the file away.")
        _replace(self.path, [json.dumps(row) for row in rows if row["step"] <= step])
        self._file = self.path.open("a", encoding="utf-8")
        for sink in self.sinks:
            sink.truncate_after(step)

    def close(self) -> None:
        """Close the file and the sinks."""
        self._file.close()
        for sink in self.sinks:
            sink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_jsonl(path: str | Path) -> tuple[list[dict[str, Any]], bool]:
    """Read the rows of a file of JSON objects, and whether a torn last line (a killed writer) was left out.

    Raises:
        DataError: a line before the last is not a JSON object.
    """
    rows: list[dict[str, Any]] = []
    lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line.decode())  # a torn line may end within a character
            if not isinstance(row, dict):
                raise ValueError(f"holds {type(row).__name__}, expected an object")
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # no line break after it: its writer was killed
                return rows, True
            raise DataError(
                f"{path}:{number}: not a JSON object ({error}). Mend that line, or move the file away."
            ) from None
        rows.append(row)
    return rows, False


def _mend(path: Path) -> None:
    """Drop a line torn by a killed writer, so that the next one does not continue it."""
    if not path.exists() or (content := path.read_bytes()) == b"" or content.endswith(b"\n"):
        return
    rows, torn = read_jsonl(path)
    if torn:
        logger.warning(
            "%s ends in a torn line, dropped: %s", path, content.rsplit(b"\n", 1)[-1][:80].decode(errors="replace")
        )
    _replace(path, (json.dumps(row) for row in rows))


def _replace(path: Path, lines: Iterable[str]) -> None:
    write_aside(path, "".join(f"{line}\n" for line in lines))


def _finite(value: SupportsFloat | None) -> Number:
    if value is None or isinstance(value, bool | int):
        return value
    number = float(value)  # numpy and torch scalars included
    return number if math.isfinite(number) else None


# --------------------------------------------------------------------------- optional sinks


def open_sinks(
    run_dir: str | Path, *, tensorboard: bool = False, config: Mapping[str, Any] | None = None, **projects: str | None
) -> list[Sink]:
    """Open the optional sinks requested: TensorBoard events in ``RUN/tensorboard``, a run in each service's project.

    Args:
        config: what a service shows as the run's configuration.
        projects: by name of ``trackers.TRACKERS``; None: not requested.

    Raises:
        ConfigError: a package that is needed is not installed.
    """
    sinks: list[Sink] = []
    if tensorboard:
        sinks.append(TensorBoardSink(Path(run_dir) / "tensorboard"))
    for name, project in projects.items():
        if project is not None:
            sinks.append(open_tracker(name, Path(run_dir), project, config or {}))
    return sinks


class TensorBoardSink:
    """One scalar per metric."""

    def __init__(self, directory: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "report.tensorboard = true needs the package tensorboard, which is not installed. "
                "Run `pip install tensorboard`, or set report.tensorboard=false."
            ) from error
        self._open = SummaryWriter
        self._directory = str(directory)
        self._writer = SummaryWriter(self._directory)

    def write(self, step: int, metrics: Mapping[str, Number]) -> None:
        """Write the numbers that are there; a null leaves a gap."""
        for name, value in metrics.items():
            if name != "step" and value is not None:
                self._writer.add_scalar(name, value, step)

    def truncate_after(self, step: int) -> None:
        """Tell TensorBoard to hide what an earlier process wrote beyond ``step``."""
        self._writer.close()
        self._writer = self._open(self._directory, purge_step=step + 1)

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()
