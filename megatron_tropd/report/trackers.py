"""Services that follow a run through their own clients: a row each in ``TRACKERS``, one table of metric names for all.

A restarted process finds its run again by the id kept in ``RUN/NAME_id``. A repeated step has the same values, so that
what a service does with it does not matter.
"""

from __future__ import annotations

import importlib
import logging
import re
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

from megatron_tropd.errors import ConfigError
from megatron_tropd.report.settings import flat
from megatron_tropd.storage.write_aside import make_directory, write_aside

_log = logging.getLogger(__name__)

Number = int | float | None  # as written
_PACKAGES = ("megatron-tropd", "torch", "megatron-core", "transformers")
_MOST_OF_PARAMETER = 500  # characters of a value that MLflow takes everywhere
_PARAMETERS_AT_ONCE = 100  # that it takes


class TrackedRun(Protocol):
    """Run of a service, as its client gives it."""

    def log(self, metrics: dict[str, Any], step: int) -> Any:
        """Take the metrics of a step."""

    def finish(self) -> Any:
        """End the run."""


class TrackerSink:
    """A run of a service whose client takes a step's metrics as they are."""

    def __init__(self, run: TrackedRun) -> None:
        self._run = run

    def write(self, step: int, metrics: Mapping[str, Number]) -> None:
        """Log the numbers that are there."""
        # the step goes by itself: some services keep its name for themselves
        named = {name: value for name, value in metrics.items() if value is not None and name != "step"}
        self._run.log(named, step=step)

    def truncate_after(self, step: int) -> None:
        """Do nothing: a repeated step has the same values."""

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def open_wandb(client: Any, run_dir: Path, project: str, config: Mapping[str, Any]) -> TrackerSink:
    """Open a run of Weights & Biases, or take it up; ``WANDB_MODE=offline`` leaves it in ``RUN/wandb``."""
    identity = kept_id(run_dir, "wandb", lambda: uuid.uuid4().hex[:8])
    run = client.init(
        project=project, name=run_dir.name, id=identity, resume="allow", dir=str(run_dir), config=dict(config)
    )
    return TrackerSink(run)


def open_trackio(client: Any, run_dir: Path, project: str, config: Mapping[str, Any]) -> TrackerSink:
    """Open a run of Trackio, or take it up; it lies in ``TRACKIO_DIR``, or where ``TRACKIO_SERVER_URL`` says."""
    # a run is known by its name there, and directories of several runs may share theirs
    identity = kept_id(run_dir, "trackio", lambda: f"{run_dir.name}-{uuid.uuid4().hex[:6]}")
    run = client.init(project=project, name=identity, resume="allow", config=dict(config), embed=False)
    return TrackerSink(run)


class MlflowSink:
    """A run of MLflow, where ``MLFLOW_TRACKING_URI`` says. Steps that its server does not take are counted."""

    def __init__(self, client: Any, run_dir: Path, project: str, config: Mapping[str, Any]) -> None:
        self._mlflow, self._lost = client, 0
        self._client = client.MlflowClient()
        kept = run_dir / "mlflow_id"
        resumed = kept.exists()
        self._id = kept_id(run_dir, "mlflow", lambda: self._create(run_dir.name, project))
        if resumed:
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._log_parameters(flat(dict(config)))
        self._client.log_dict(self._id, dict(config), "config.yaml")

    def _create(self, name: str, project: str) -> str:
        experiment = self._client.get_experiment_by_name(project)
        identity = self._client.create_experiment(project) if experiment is None else experiment.experiment_id
        return str(self._client.create_run(identity, run_name=name).info.run_id)

    def _log_parameters(self, settings: Mapping[str, str]) -> None:
        parameter = self._mlflow.entities.Param
        every = [parameter(_plain(key), value[:_MOST_OF_PARAMETER]) for key, value in settings.items()]
        for start in range(0, len(every), _PARAMETERS_AT_ONCE):
            self._client.log_batch(self._id, params=every[start : start + _PARAMETERS_AT_ONCE])

    def write(self, step: int, metrics: Mapping[str, Number]) -> None:
        """Log the numbers that are there; a server that is away costs the step's numbers, not the run."""
        now, metric = int(1000 * time.time()), self._mlflow.entities.Metric
        values = [metric(_plain(name), float(value), now, step) for name, value in metrics.items() if value is not None]
        try:
            self._client.log_batch(self._id, metrics=values)
        except self._mlflow.exceptions.MlflowException as error:
            if not self._lost:
                _log.warning("MLflow has not taken step %d (%s). metrics.jsonl has it. Said once.", step, error)
            self._lost += 1

    def truncate_after(self, step: int) -> None:
        """Do nothing: a repeated step has the same values."""

    def close(self) -> None:
        """Finish the run, and say how many steps it lacks."""
        if self._lost:
            _log.warning("MLflow lacks %d step(s) of this run; metrics.jsonl has all.", self._lost)
        try:
            self._client.set_terminated(self._id)
        except self._mlflow.exceptions.MlflowException as error:
            _log.warning("MLflow still lists the run as running: %s", error)


def open_swanlab(client: Any, run_dir: Path, project: str, config: Mapping[str, Any]) -> TrackerSink:
    """Open a run of SwanLab, or take it up; ``SWANLAB_MODE=offline`` leaves it in ``RUN/swanlog``."""
    identity = kept_id(run_dir, "swanlab", lambda: uuid.uuid4().hex[:21])
    run = client.init(
        project=project,
        name=run_dir.name,
        id=identity,
        resume="allow",
        log_dir=str(run_dir / "swanlog"),
        config=dict(config),
    )
    return TrackerSink(run)


@dataclass(frozen=True, slots=True)
class Tracker:
    """One service: its client, what installs it, and how a run is opened."""

    package: str  # that is imported
    install: str  # for pip
    open: Callable[[Any, Path, str, Mapping[str, Any]], Any]


# by the name of the key in the report section, whose value is the project
TRACKERS: Mapping[str, Tracker] = {
    "wandb": Tracker("wandb", "wandb", open_wandb),
    "mlflow": Tracker("mlflow", "mlflow-skinny", MlflowSink),
    "trackio": Tracker("trackio", "trackio", open_trackio),
    "swanlab": Tracker("swanlab", "swanlab", open_swanlab),
}


def open_tracker(name: str, run_dir: Path, project: str, config: Mapping[str, Any]) -> Any:
    """Open a run of a service.

    Raises:
        ConfigError: its client is not installed.
    """
    row = TRACKERS[name]
    try:
        client = importlib.import_module(row.package)
    except ImportError as error:
        raise ConfigError(
            f"report.{name} = {project!r} needs the package {row.install}, which is not installed. "
            f"Run `pip install {row.install}`, or set report.{name}=null."
        ) from error
    return row.open(client, run_dir, project, config)


def versions() -> dict[str, str]:
    """Return the versions of this package and of what its numbers depend on."""
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a folder that is not installed
            continue
    return found


def kept_id(run_dir: Path, name: str, make: Callable[[], str]) -> str:
    """Return the id of a run at a service, which is kept in ``RUN/NAME_id``; a new one where there is none."""
    kept = run_dir / f"{name}_id"
    if kept.exists():
        return kept.read_text(encoding="utf-8").strip()
    identity = make()
    make_directory(run_dir)
    write_aside(kept, identity + "\n")
    return identity


def _plain(name: str) -> str:
    """Write a name with the characters that MLflow takes."""
    return re.sub(r"[^\w\-. :/]", "_", name, flags=re.ASCII)
