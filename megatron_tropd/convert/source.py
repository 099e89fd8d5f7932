"""Open the model that a configuration names: a Hugging Face directory, or a checkpoint of Megatron."""

from __future__ import annotations

from pathlib import Path

from megatron_tropd.convert.hf import HFWeights, fingerprint_of, read_architecture
from megatron_tropd.convert.lazy import WeightsSource
from megatron_tropd.convert.megatron.locate import MegatronDirectory, find_megatron
from megatron_tropd.convert.megatron.weights import MegatronWeights
from megatron_tropd.errors import CheckpointError
from megatron_tropd.types import Architecture, ModelSource

ModelPath = ModelSource | Path | str
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tokenizer_config.json")


def as_source(source: ModelPath) -> ModelSource:
    """Return the source that a path is."""
    return source if isinstance(source, ModelSource) else ModelSource(Path(source))


def source_files(source: ModelPath) -> Path:
    """Return the directory with the model's ``config.json``, and its tokenizer where that lies beside it.

    Raises:
        CheckpointError: a checkpoint of Megatron has none and no ``like`` names one; or ``like`` is given for a
            Hugging Face directory, or has no ``config.json``.
    """
    source = as_source(source)
    found = find_megatron(source.weights)
    if found is None:
        if source.like is not None:
            raise CheckpointError(
                f"like = '{source.like}' is for checkpoints of Megatron, and {source.weights.absolute()} is none: its "
                "own config.json counts. Take `like` out."
            )
        return source.weights
    return _config_of(found, source)


def _config_of(found: MegatronDirectory, source: ModelSource) -> Path:
    places = found.companions if source.like is None else (source.like,)
    own = next((place for place in places if (place / "config.json").is_file()), None)
    if own is not None:
        return own
    if source.like is not None:
        raise CheckpointError(f"like = '{source.like}' has no config.json. Give a Hugging Face model directory.")
    raise CheckpointError(
        f"{source.weights.absolute()} is a checkpoint of {found.writer} that carries no config.json of a Hugging Face "
        "model. Name the directory of the model that it was trained from: `like` beside `model` in a configuration "
        "(student.like=DIR), --like DIR on the command line."
    )


def source_tokenizer(source: ModelPath) -> Path:
    """Return where the tokenizer lies: with ``config.json``, else in the checkpoint's own directory for it."""
    files = source_files(source)
    if any((files / name).is_file() for name in _TOKENIZERS):
        return files
    found = find_megatron(as_source(source).weights)
    own = () if found is None else found.companions
    return next((place for place in own if any((place / name).is_file() for name in _TOKENIZERS)), files)


def source_architecture(source: ModelPath) -> Architecture:
    """Read the model's sizes; CheckpointError when they are missing or unsupported."""
    return read_architecture(source_files(source))


def open_weights(source: ModelPath) -> WeightsSource:
    """Open the weights, by Hugging Face names. Nothing is read until sliced.

    Raises:
        CheckpointError: they are missing, torn, or of another model than the ``config.json`` they are read under.
    """
    source = as_source(source)
    found = find_megatron(source.weights)
    if found is None:
        return HFWeights(source_files(source))
    files = _config_of(found, source)
    return MegatronWeights(found, read_architecture(files), config=files)


def source_fingerprint(source: ModelPath) -> str | None:
    """Hash the weights, as ``fingerprint_of`` does; None where there are none to be read."""
    try:
        return fingerprint_of(open_weights(source))
    except CheckpointError:
        return None
