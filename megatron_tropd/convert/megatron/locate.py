"""Find the checkpoint that a directory of Megatron-LM, Megatron-Bridge, NeMo 2 or of a run of ours holds."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_tropd.errors import CheckpointError

OURS = "megatron_tropd"
TRACKER = "latest_checkpointed_iteration.txt"
TRAIN_STATE = "latest_train_state.pt"
RUN_CONFIG = "run_config.yaml"
OUR_RECORD, _OUR_LATEST = "complete.json", "latest"
ADAPTER_KEY = ".lora_A."  # in the names of adapters' matrices
_OUR_STEP = re.compile(r"step-\d{8,}")
_COMPANIONS = ("hf", "tokenizer", "context/nemo_tokenizer")
_CONVERT = {
    "torch": "python tools/checkpoint/convert.py --model-type GPT --loader core --saver core --load-dir {path} "
    "--save-dir NEW` of Megatron-LM, or load it there with `--ckpt-convert-format torch_dist --ckpt-convert-save NEW",
    "fsdp_dtensor": "python examples/conversion/mfsdp/convert_checkpoints_fsdp.py` of Megatron-Bridge, or save it "
    "again with `--ckpt-format torch_dist",
    "zarr": "pretrain_gpt.py --load {path} --ckpt-convert-format torch_dist --ckpt-convert-save NEW` of Megatron-LM "
    "(a version that still reads zarr: up to core_r0.12",
}


def adapters_alone(path: Path) -> str:
    """Say what a checkpoint of a student with adapters lacks, and what to do."""
    return (
        f"{path.absolute()} holds the adapters of a run (student.lora) and not the model that they are beside. Resume "
        "that run with export.hf=DIR for the merged model, or export.adapter=DIR for the adapters, and give that."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MegatronDirectory:
    """A checkpoint on disk: whose it is, where its tensors lie, and where its own config and tokenizer may lie."""

    writer: str
    path: Path  # with .metadata in it
    root: Path  # what the user named

    @property
    def is_ours(self) -> bool:
        """Say whether this program wrote it."""
        return self.writer == OURS

    @property
    def described(self) -> tuple[Path, ...]:
        """Return where a description of the model may lie, besides ``common.pt``."""
        above = self.path.parent
        return (self.path / RUN_CONFIG, above / RUN_CONFIG, above / "context" / "model.yaml")

    @property
    def companions(self) -> tuple[Path, ...]:
        """Return where the checkpoint's own ``config.json`` and tokenizer may lie, the likeliest first."""
        places = (self.path, self.path.parent, self.root)
        return tuple(dict.fromkeys(place / name for place in places for name in _COMPANIONS))


def find_megatron(directory: str | Path) -> MegatronDirectory | None:
    """Find the checkpoint that a directory holds; None where it holds none of Megatron's.

    Raises:
        CheckpointError: it holds one that cannot be read: of a format that is not carried, or not whole.
    """
    root = Path(directory)
    if not root.is_dir() or (root / "config.json").is_file():
        return None
    if (root / "weights").is_dir() and (root / "context").is_dir():
        return _checked(root / "weights", root, "NeMo 2")
    if (root / TRACKER).is_file() or (root / TRAIN_STATE).is_file():
        path = root / _named_iteration(root)
        return _checked(path, root, "Megatron-Bridge" if (path / RUN_CONFIG).is_file() else "Megatron-LM")
    if (found := _of_ours(root)) is not None:
        return _checked(found, root, OURS)
    if _is_checkpoint(root):
        return _checked(root, root, "Megatron-Bridge" if (root / RUN_CONFIG).is_file() else "Megatron-LM")
    return None


def _is_checkpoint(path: Path) -> bool:
    names = (".metadata", "metadata.json", "common.pt")
    return any((path / name).is_file() for name in names) or any(path.glob("mp_rank_*"))


def _of_ours(root: Path) -> Path | None:
    """Return the checkpoint of a run, of its checkpoints, or the one that is named itself."""
    if (root / OUR_RECORD).is_file():
        return root
    for place in (root, root / "checkpoints"):
        steps = sorted(path for path in place.glob("step-*") if _OUR_STEP.fullmatch(path.name))
        if not steps:
            continue
        try:
            named = place / (place / _OUR_LATEST).read_text(encoding="utf-8").strip()
        except (OSError, ValueError):
            named = steps[-1]
        return named if named in steps else steps[-1]
    return None


def _named_iteration(root: Path) -> str:
    """Return the name of the directory that the tracker file names.

    Raises:
        CheckpointError: it names none, or one that is not there.
    """
    tracker = root / TRACKER
    if tracker.is_file():
        said = tracker.read_text(encoding="utf-8", errors="replace").strip()
    else:
        tracker = root / TRAIN_STATE
        said = _step_of(tracker)
    if said != "release" and not said.isdecimal():
        raise CheckpointError(f"{tracker.absolute()} holds {said[:80]!r}, neither an iteration nor release.")
    name = "release" if said == "release" else f"iter_{int(said):07d}"
    if not (root / name).is_dir():
        there = sorted(path.name for path in root.iterdir() if path.is_dir() and path.name.startswith(("iter_", "rel")))
        raise CheckpointError(
            f"{tracker.absolute()} names {name}, which is not there ({', '.join(there) or 'no iteration is'}). Name "
            "one of those directories itself, or copy the one that is missing."
        )
    return name


def _step_of(tracker: Path) -> str:
    try:
        state = torch.load(tracker, map_location="cpu", weights_only=True)
        return str(int(state["step"]))
    except Exception as error:  # whatever a torn file makes of the library
        raise CheckpointError(f"{tracker.absolute()} does not say which step is the latest: {error}.") from error


def _checked(path: Path, root: Path, writer: str) -> MegatronDirectory:
    """Make sure of the format.

    Raises:
        CheckpointError: another format than ``torch_dist``, or files without which there is none.
    """
    kind = _format(path)
    if kind in _CONVERT:
        raise CheckpointError(
            f"{path.absolute()} is a checkpoint of {writer} in the format {kind}, which is not read here, only "
            f"torch_dist is. Convert it: `{_CONVERT[kind].format(path=root)}`."
        )
    if kind != "torch_dist":
        raise CheckpointError(
            f"{path.absolute()} is no whole checkpoint of {writer}: {kind}. It is left as it is. Copy the whole "
            "directory."
        )
    return MegatronDirectory(writer=writer, path=path, root=root)


def _format(path: Path) -> str:
    """Return the format of a checkpoint directory, or why it has none."""
    if any(path.glob("mp_rank_*")):
        return "torch"
    try:
        said = json.loads((path / "metadata.json").read_text(encoding="utf-8"))
        backend = said["sharded_backend"]
    except FileNotFoundError:
        if (path / ".metadata").is_file():
            return "fsdp_dtensor"
        return "it has neither .metadata nor metadata.json"
    except (OSError, ValueError, LookupError, TypeError) as error:
        return f"metadata.json is broken ({error})"
    if backend == "torch_dist" and not (path / ".metadata").is_file():
        return ".metadata, its table of tensors, is missing"
    return str(backend)
