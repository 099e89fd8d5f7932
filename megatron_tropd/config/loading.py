"""Reading a configuration: one frozen tree from YAML and ``key=value`` overrides.

Everything a user can get wrong in a config is refused here, by ``ConfigError``, before any model is built. Paths are
kept as written; a relative path is relative to the current directory, in the config and in overrides alike.
Interpolation (``${student.model}``, ``${oc.env:HOME}``) is OmegaConf's and sees the keys that are written down, not
the defaults.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from omegaconf import OmegaConf
from pydantic import ValidationError

from megatron_tropd.config.messages import NO_FILE, Named, explain, read_tree
from megatron_tropd.config.run import PROMPT_FILES, RunConfig, matches, variable_in
from megatron_tropd.config.sections import FITTED_LATER, SuiteConfig, WrittenAt
from megatron_tropd.errors import ConfigError
from megatron_tropd.storage.write_aside import write_aside


def parse_config(tree: Mapping[str, Any], *, source: str = "config") -> RunConfig:
    """Validate a plain tree of keys. Raises ConfigError naming every bad key; ``source`` heads the message."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, RunConfig, source=source)) from None


def load_config(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    named: Mapping[str, Named] = MappingProxyType({}),
    world_size: int | None = None,
    check_paths: bool = True,
    fitted_later: bool = False,
) -> RunConfig:
    """Read a YAML file, apply ``key=value`` overrides, resolve interpolations and validate.

    Args:
        path: None where ``named`` and ``overrides`` say everything.
        named: by key, what options of the command line say. A file or override that says otherwise is an error.
        overrides: such as ``["train.steps=10", "evaluate.suites[0].samples=2"]``; values are YAML.
        world_size: number of ranks; when given, both layouts must fit it.
        check_paths: whether the models and data must exist; off for reading the config of a finished run.
        fitted_later: whether keys that are ``auto`` will be chosen, so that rules between them wait.

    Raises:
        ConfigError: for everything that is wrong with the file, an override or a value.
    """
    tree, text = config_tree(path, overrides, named=named)
    source = NO_FILE if path is None else str(path)
    try:
        config = RunConfig.model_validate(tree, context=FITTED_LATER if fitted_later else None)
    except ValidationError as error:
        raise ConfigError(explain(error, RunConfig, source=source, text=text, overrides=overrides)) from None
    config.method.note_where(WrittenAt(source, text, tuple(overrides)))
    if check_paths:
        config.check_paths()
    if world_size is not None:
        config.check_world(world_size)
    return config


def config_tree(
    path: str | Path | None, overrides: Sequence[str] = (), *, named: Mapping[str, Named] = MappingProxyType({})
) -> tuple[dict[str, Any], str]:
    """Read a YAML file, overrides applied, as the tree that a configuration is made of, and its text.

    ``path`` and ``named`` are those of :func:`load_config`.

    Raises:
        ConfigError: the file, a file that it names, or an override cannot be read.
    """
    tree, text = read_tree(None if path is None else Path(path), overrides, named)
    _include_suites(tree)
    return tree, text


def read_overrides(path: str | Path) -> list[str]:
    """Read a YAML file as the overrides ``key=value`` that set them.

    Raises:
        ConfigError: the file cannot be read.
    """

    def leaves(tree: Mapping[str, Any], prefix: str) -> list[str]:
        found: list[str] = []
        for name, value in tree.items():
            if isinstance(value, dict):
                found += leaves(value, f"{prefix}{name}.")
            else:
                # JSON is YAML, and a text stays one whatever it looks like
                plain = isinstance(value, str) and value.isidentifier()
                found.append(f"{prefix}{name}={value if plain else json.dumps(value)}")
        return found

    return leaves(read_tree(Path(path), ())[0], "")


def _include_suites(tree: dict[str, Any]) -> None:
    """Put the keys of ``file`` under those of every suite that names one."""
    evaluate = tree.get("evaluate")
    suites = evaluate.get("suites") if isinstance(evaluate, dict) else None
    for i, suite in enumerate(suites if isinstance(suites, list) else ()):
        if isinstance(suite, dict) and "file" in suite:
            own = {key: value for key, value in suite.items() if key != "file"}
            suites[i] = read_tree(Path(str(suite["file"])).expanduser(), ())[0] | own  # type: ignore[index]


def load_suite(path: str | Path, overrides: Sequence[str] = (), *, check_paths: bool = True) -> SuiteConfig:
    """Read a suite of its own file, with ``key=value`` overrides; with ``check_paths`` its problems must exist.

    Raises:
        ConfigError: for everything that is wrong with the file, an override or a value.
    """
    tree, text = read_tree(Path(path), overrides)
    try:
        suite = SuiteConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, SuiteConfig, source=str(path), text=text, overrides=overrides)) from None
    for prompts in suite.prompts if check_paths else ():
        if not prompts.exists() and not matches(prompts):
            raise ConfigError(
                f"{path}: prompts = '{prompts}': there is nothing at {prompts.absolute()}. {PROMPT_FILES}"
                f"{variable_in(prompts)}"
            )
    return suite


def dump_config(config: RunConfig, path: str | Path) -> None:
    """Write every key, resolved, as YAML that :func:`load_config` reads back to an equal config. Atomic."""
    # OmegaConf's dumper quotes what its own reader would take for a number, such as the text "1e-4"
    text = OmegaConf.to_yaml(OmegaConf.create(_plain(config.model_dump())))
    write_aside(path, text)


def _plain(value: Any) -> Any:
    """Turn a value into what YAML can hold, with literal ``${`` protected, which OmegaConf would read as an
    interpolation.
    """
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str | Path):
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", str(value))
    return value
