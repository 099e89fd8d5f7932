"""A configuration from Python: a YAML file, a mapping or keywords, with the same rules and messages as a file's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_tropd.config.loading import config_tree
from megatron_tropd.config.messages import explain
from megatron_tropd.config.run import RunConfig
from megatron_tropd.config.sections import WrittenAt
from megatron_tropd.errors import ConfigError


class Config(RunConfig):
    """A whole run: ``Config("my.yaml", "train.steps=10")``, ``Config(run_dir=..., student={"model": ...}, ...)``."""

    def __init__(self, source: str | Path | Mapping[str, Any] | None = None, /, *overrides: str, **keys: Any) -> None:
        """Read and validate.

        Args:
            source: a YAML file, or the tree of keys itself.
            overrides: of a file: ``key=value``, as on the command line.
            keys: sections and top keys, whose own keys go over those of ``source``: ``train={"steps": 10}``.

        Raises:
            ConfigError: for everything that is wrong with a file, an override or a value.
        """
        tree, written = _read(source, overrides)
        try:
            super().__init__(**_merged(tree, keys))
        except ValidationError as error:
            raise ConfigError(
                explain(error, RunConfig, source=written.source, text=written.text, overrides=written.overrides)
            ) from None
        self.method.note_where(written)


def _read(
    source: str | Path | Mapping[str, Any] | None, overrides: tuple[str, ...]
) -> tuple[Mapping[str, Any], WrittenAt]:
    if isinstance(source, str | Path):
        tree, text = config_tree(source, overrides)
        return tree, WrittenAt(str(source), text, overrides)
    if overrides:
        raise ConfigError(
            f"Config got {overrides[0]!r} as an override, but no file to apply it to: give it as a keyword, such as "
            "train={'steps': 10}."
        )
    return source or {}, WrittenAt("Config")


def _merged(tree: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    """Put keys over a tree, section by section."""
    found = dict(tree)
    for name, value in keys.items():
        old = found.get(name)
        both = isinstance(old, Mapping) and isinstance(value, Mapping)
        found[name] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return found
