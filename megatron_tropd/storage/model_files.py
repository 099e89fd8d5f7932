"""Look at the files of a model directory before anything reads them: each must be a file, of a size models have."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_tropd.errors import ModelFileError

# bytes; the largest tokenizers and indices of public models take some tens of megabytes, settings some kilobytes
_LARGEST_TABLE, _LARGEST_SETTINGS = 256 << 20, 16 << 20
_SETTINGS = ("config.json", ".jinja")
_TABLES = (".json", ".txt", ".model", ".tiktoken", ".vocab", ".spm")
_MOST_LAYERS = 10_000
_LAYERS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers")
_FOLDERS = ("additional_chat_templates",)  # that libraries look into


def check_model_files(directory: str | Path) -> None:
    """Make sure that no file of a model directory can hang, or fill the memory of, whatever opens it.

    Raises:
        ModelFileError: names the file and what is wrong with it.
    """
    directory = Path(directory)
    for folder in (directory, *(directory / name for name in _FOLDERS)):
        for path, found in _entries(folder):
            _check_entry(path, found)
    _check_layers(directory / "config.json")


def _entries(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """List what stands in a folder, links followed; what leads nowhere is left to whoever wants to read it."""
    try:
        names = os.listdir(folder)
    except OSError:
        return
    for name in sorted(names):
        try:
            yield folder / name, os.stat(folder / name)
        except OSError:
            continue


def _check_entry(path: Path, found: os.stat_result) -> None:
    if stat.S_ISDIR(found.st_mode):
        return
    if not stat.S_ISREG(found.st_mode):
        raise ModelFileError(
            f"{path.absolute()} is {_kind(found.st_mode)}, not a file: reading it might never end. Take it out of the "
            "model directory."
        )
    name = path.name.lower()
    settings = name.endswith(_SETTINGS)
    largest = _LARGEST_SETTINGS if settings else _LARGEST_TABLE
    if name.endswith((*_SETTINGS, *_TABLES)) and found.st_size > largest:
        raise ModelFileError(
            f"{path.absolute()} has {found.st_size:,} bytes, and no model's has more than {largest:,}. Fetch it again, "
            "or take it out."
        )


def _kind(mode: int) -> str:
    kinds = {stat.S_ISFIFO: "a named pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device", stat.S_ISBLK: "a disk"}
    return next((kind for test, kind in kinds.items() if test(mode)), "something else")


def _check_layers(config: Path) -> None:
    """Refuse a number of layers for which libraries would make lists without end; leave all else to who reads it."""
    try:
        settings = json.loads(config.read_bytes())
    except RecursionError:
        raise ModelFileError(
            f"{config.absolute()} holds lists within lists, deeper than can be read. Fetch it again."
        ) from None
    except (OSError, ValueError):
        return
    for where, part in _sections("", settings):
        for name in _LAYERS:
            count = part.get(name)
            if isinstance(count, int | float) and not 0 <= count <= _MOST_LAYERS:
                raise ModelFileError(
                    f"{config.absolute()} has {where}{name}={count}, and no model has more than {_MOST_LAYERS:,}. "
                    "Fetch it again."
                )


def _sections(where: str, settings: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the settings of a model and of its parts, such as ``text_config``, by the prefix of their names."""
    if not isinstance(settings, dict):
        return
    yield where, settings
    for name, part in settings.items():
        if isinstance(part, dict) and name.endswith("_config"):
            yield from _sections(f"{where}{name}.", part)
