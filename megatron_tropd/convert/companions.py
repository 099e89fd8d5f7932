"""Files of a model directory besides weights: config and tokenizer files of whatever kind, for an export to carry.

Tokenizers come as tokenizer.json, vocab.txt, spiece.model, merges.txt and whatever their class reads, with templates
in files and folders of their own. So not names are listed here but what is left behind: weights, code and prose.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from megatron_tropd.data.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from megatron_tropd.errors import CheckpointError, TokenizerError
from megatron_tropd.storage.model_files import check_model_files

_log = logging.getLogger(__name__)

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".npz", ".npy")
_INDEX = ".index.json"  # of shards
_ELSEWHERE = (".py", ".md", ".pdf", ".png", ".jpg", ".gitattributes", ".gitignore", ".log", ".lock", ".ipynb")
_FOLDERS = ("additional_chat_templates",)  # where transformers keeps named templates
_LARGEST = 256 << 20  # bytes; the largest tokenizers take some tens of megabytes


def companions_of(directory: Path) -> dict[str, Path]:
    """List the files to carry along, by their path relative to the model directory, in order."""
    check_model_files(directory)
    found = {path.name: path for path in _files(directory) if _is_companion(path)}
    for folder in _FOLDERS:
        found |= {f"{folder}/{path.name}": path for path in _files(directory / folder)}
    return found


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in directory.iterdir() if path.is_file()) if directory.is_dir() else []


def _is_companion(path: Path) -> bool:
    name = path.name.lower()
    if name.startswith(".") or name.endswith((*_WEIGHTS, _INDEX, *_ELSEWHERE)) or name in ("license", "notice"):
        return False
    if path.stat().st_size > _LARGEST:
        _log.warning("%s has %.0f MiB: it is taken for weights and left out", path, path.stat().st_size / 2**20)
        return False
    return True


def copy_companions(source: Path, target: Path) -> None:
    """Copy them into an existing directory."""
    for name, path in companions_of(source).items():
        (target / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target / name)


def check_companions(source: Path, target: Path) -> None:
    """Load the tokenizer again, where ``source`` has one, before an export counts as done.

    Raises:
        CheckpointError: it cannot be loaded, or has another vocabulary, template or end than that of ``source``.
    """
    try:
        given = load_tokenizer(source)
    except TokenizerError:  # a model without a tokenizer of ours, such as one that is converted alone
        return
    try:
        found = load_tokenizer(target)
    except TokenizerError as error:
        raise CheckpointError(f"the export in {target.absolute()} has no tokenizer that loads: {error}") from error
    if _facts(given) != _facts(found):
        raise CheckpointError(
            f"the tokenizer of the export in {target.absolute()} is not that of {source.absolute()}: its vocabulary, "
            "chat template or end tokens differ. The files of the model directory do not hold all that it reads."
        )


def _facts(tokenizer: Tokenizer) -> tuple[object, ...]:
    template = tokenizer.chat_template if isinstance(tokenizer, HuggingFaceTokenizer) else None
    return tokenizer.fingerprint(), tuple(tokenizer.eos_ids), tokenizer.pad_id, template
