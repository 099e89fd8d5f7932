"""Names on the hub in a configuration, or on the command line, become what lies on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel

from megatron_tropd.config.run import PROMPT_FILES, RunConfig, matches, variable_in
from megatron_tropd.config.sections import SuiteConfig
from megatron_tropd.data.hub import HubName, Kind, commit_of, dataset_files, hub_name
from megatron_tropd.errors import ConfigError
from megatron_tropd.report.records import read_provenance

if TYPE_CHECKING:
    from megatron_tropd.convert.hub import Parts as Parts

Node = TypeVar("Node", bound=BaseModel)


def locate(config: RunConfig, *, parts: Parts = "all") -> RunConfig:
    """Fetch what a configuration names on the hub, and return it with local paths; ``named`` of it has the commits.

    A run that resumes takes the commits that its directory notes. What is on this machine is left as it is.

    Args:
        parts: of the models: all, ``config`` for a plan; data sets are then left alone.

    Raises:
        ConfigError: a name is not to be had; it says whether as a path, or on the hub.
    """
    if not _names_in(config):
        return config
    pins = {} if config.checkpoint.resume == "never" else read_provenance(config.run_dir)
    names = _Names(pins, parts)
    located = _walk(config, names.model_here, names.data_here)
    return located.noting(_walk(config, names.model_pinned, names.data_pinned), names.commits)


def locate_model(path: Path, *, key: str = "MODEL", parts: Parts = "all") -> Path:
    """Return the directory of a model that is named on the command line."""
    name = hub_name(path, "model")
    return path if name is None else _fetched(name.at(commit_of(name, key=key)), parts, key)


def locate_data(path: Path, *, key: str = "PROMPTS") -> tuple[Path, ...]:
    """Return the files of the data that are named on the command line."""
    name = None if matches(path) else hub_name(path, "dataset")
    return (path,) if name is None else dataset_files(name.at(commit_of(name, key=key)), key=key)


def locate_suite(suite: SuiteConfig) -> SuiteConfig:
    """Return a suite whose problems are on this machine.

    Raises:
        ConfigError: nothing is there, here or on the hub.
    """
    key = f"prompts of the suite {suite.name!r}"
    for path in suite.prompts:
        if not path.exists() and not matches(path) and hub_name(path, "dataset") is None:
            where = path.absolute()
            raise ConfigError(f"{key} = '{path}': there is nothing at {where}. {PROMPT_FILES}{variable_in(path)}")
    return _with(suite, {"prompts": tuple(file for path in suite.prompts for file in locate_data(path, key=key))})


@dataclass(slots=True)
class _Names:
    """Commits of names, and how what they stand for is fetched."""

    pins: dict[str, str]  # by the name as it was given
    parts: Parts
    commits: dict[str, str] = field(default_factory=dict)

    def _pinned(self, path: Path, kind: Kind, key: str) -> HubName | None:
        name = hub_name(path, kind)
        if name is None or (kind == "dataset" and (matches(path) or self.parts == "config")):
            return None
        given = str(path)
        if given not in self.commits:
            self.commits[given] = self.pins.get(given) or commit_of(name, key=key)
        return name.at(self.commits[given])

    def model_here(self, path: Path, key: str) -> Path:
        name = self._pinned(path, "model", key)
        return path if name is None else _fetched(name, self.parts, key)

    def model_pinned(self, path: Path, key: str) -> Path:
        return Path(str(self._pinned(path, "model", key) or path))

    def data_here(self, path: Path, key: str) -> tuple[Path, ...]:
        name = self._pinned(path, "dataset", key)
        return (path,) if name is None else dataset_files(name, key=key)

    def data_pinned(self, path: Path, key: str) -> tuple[Path, ...]:
        return (Path(str(self._pinned(path, "dataset", key) or path)),)


def _fetched(name: HubName, parts: Parts, key: str) -> Path:
    from megatron_tropd.convert.hub import (
        fetch_model,  # what it brings in takes seconds, and few configurations need it
    )

    return fetch_model(name, parts=parts, key=key)


def _names_in(config: RunConfig) -> list[HubName]:
    found: list[HubName | None] = []

    def model(path: Path, key: str) -> Path:
        found.append(hub_name(path, "model"))
        return path

    def data(path: Path, key: str) -> tuple[Path, ...]:
        found.append(None if matches(path) else hub_name(path, "dataset"))
        return (path,)

    _walk(config, model, data)
    return [name for name in found if name is not None]


# --------------------------------------------------------------------------- the keys that name something


def _walk(
    config: RunConfig, model: Callable[[Path, str], Path], data: Callable[[Path, str], tuple[Path, ...]]
) -> RunConfig:
    """Put every path of a model, and of data, through a function."""

    def of_model(section: Node, key: str) -> Node:
        given = {name: getattr(section, name) for name in ("model", "like")}
        return _with(section, {n: model(path, f"{key}.{n}") for n, path in given.items() if path is not None})

    def of_data(section: Node, key: str) -> Node:
        paths = section.prompts  # type: ignore[attr-defined]
        return _with(section, {"prompts": tuple(file for path in paths for file in data(path, f"{key}.prompts"))})

    sections = {name: of_model(getattr(config, name), name) for name in ("student", "teacher", "base")}
    teachers = tuple(of_model(one, f"teachers[{i}]") for i, one in enumerate(config.teachers))
    training = of_data(config.data, "data")
    sources = tuple(of_data(one, f"data.sources[{i}]") for i, one in enumerate(training.sources))
    grading = of_data(config.evaluate, "evaluate")
    suites = tuple(of_data(one, f"evaluate.suites[{i}]") for i, one in enumerate(grading.suites))
    changed: dict[str, Any] = sections | {"teachers": teachers}
    changed |= {"data": _with(training, {"sources": sources}), "evaluate": _with(grading, {"suites": suites})}
    return _with(config, changed)


def _with(section: Node, values: dict[str, Any]) -> Node:
    """Return a section with other values: itself where they are the same, which also keeps what was set apart."""
    changed = {name: value for name, value in values.items() if getattr(section, name) != value}
    return section.model_copy(update=changed) if changed else section
