"""A user's files where this program writes, replaces or removes: they survive, whatever they are called.

``tests/support/path_changes.py`` lists every place of the package that changes a path, with its guard.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.support.attacks import Attack, Hole


def survives(name: str, act: Callable[[Path], str]) -> Attack:
    """An attack: what ``act`` does in a directory leaves every file that is a user's (its content says so)."""

    def attempt(directory: Path) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said = act(directory)
        left = {path.read_bytes() for path in directory.rglob("*") if path.is_file()}
        lost = {name for name in _placed.pop(directory) if _content(name) not in left}
        if lost:
            raise Hole(f"{', '.join(sorted(lost))} is gone")
        return said

    return Attack(name=name, attempt=attempt)


_placed: dict[Path, list[str]] = {}


def users(root: Path, *names: str) -> None:
    """Files of the user's, each with a content of its own: they may be found under another name."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_content(name))
        _placed.setdefault(root, []).append(name)


def _content(name: str) -> bytes:
    return f"mine: {name}".encode()


def refused(act: Callable[[], object]) -> str:
    from megatron_tropd.errors import TropdError

    try:
        act()
    except TropdError as error:
        return str(error).split(". ")[0][-150:]
    raise Hole("taken without a word")


def _export(directory: Path, *, place: str) -> str:
    from megatron_tropd.storage.owned import beside, check_target, mark_directory, replace_directory

    target, aside = directory / "out", directory / "new"
    aside.mkdir()
    (aside / "config.json").write_text("{}")
    mark_directory(aside, kind="test")
    users(directory, f"{target.name if place == 'out' else beside(target, place).name}/precious.txt")
    said = refused(lambda: check_target(target, name="export.hf", protected={}))
    if place != "partial":
        refused(lambda: replace_directory(aside, target))
    return said


def _model(directory: Path) -> Path:
    from tests.support.run_inputs import STUDENT, save_model

    return save_model(directory / "model", STUDENT, tied=True, seed=1)


def _writer(directory: Path) -> str:
    import torch

    from megatron_tropd.convert.writer import HFWriter
    from megatron_tropd.storage.owned import start_unfinished

    model, aside = _model(directory), directory / "out.partial"
    start_unfinished(aside, "another source")
    users(directory, "out.partial/weights.txt", "out.txt")
    return refused(lambda: HFWriter(directory / "out", companions_from=model, tensors={"a": (2,)}, dtype=torch.float32))


def _checkpoints(directory: Path) -> str:
    from megatron_tropd.engine import checkpoint

    for step in (1, 2, 3):
        users(directory, *(["step-00000002/notes.txt"] if step == 2 else []), "step-by-step/own.txt")
        (directory / f"step-0000000{step}").mkdir(exist_ok=True)
        (directory / f"step-0000000{step}" / "common.pt").write_bytes(b"ours")
    users(directory, "elsewhere/common.pt", "step-00000004.partial/hf/mine.json", "step-00000005")
    (directory / "step-00000000").symlink_to(directory / "elsewhere")
    checkpoint._drop_others(directory, directory / "step-00000003", 1)
    checkpoint._make_way(directory / "step-00000004.partial", {})
    checkpoint._make_way(directory / "step-00000005", {})
    if (directory / "step-00000001").exists():
        raise Hole("nothing was removed: the attack shows nothing")
    return "checkpoints alone are removed; a directory or file in the way is moved aside"


def _responses(directory: Path) -> str:
    from megatron_tropd.data.response_file import ResponseFile

    users(directory, "out.jsonl")
    file = ResponseFile(directory / "out.jsonl", {"model": "a"})
    file.append([{"response": "x"}])
    file.finish()
    if not (directory / "out.jsonl.1").exists():
        raise Hole("what was there is not kept")
    users(directory, "other.jsonl.partial")
    return refused(lambda: ResponseFile(directory / "other.jsonl", {"model": "a"}))


def _metrics(directory: Path) -> str:
    from megatron_tropd.report.sinks import MetricsWriter

    users(directory, "metrics.jsonl.partial", "metrics.jsonl.1", "evaluation.json")
    with MetricsWriter(directory / "metrics.jsonl") as writer:
        for step in (1, 2):
            writer.write({"step": step, "loss": 1.0})
        writer.truncate_after(1)
    with (directory / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 2, "sequences/gr\xfcn'.encode()[:-2])  # torn within a character
    MetricsWriter(directory / "metrics.jsonl").close()
    lines = (directory / "metrics.jsonl").read_text().count("\n")
    return f"a line torn within a character is dropped, {lines} is left"


def _earlier_run(directory: Path) -> str:
    from megatron_tropd.train.earlier_run import set_aside

    users(
        directory,
        "metrics.jsonl",
        "checkpoints/step-00000001/common.pt",
        "my-plot.png",
        "earlier-run/metrics-old.jsonl",
    )
    set_aside(directory)
    return f"results are renamed, to {', '.join(sorted(path.name for path in directory.iterdir()))}"


def _published(directory: Path) -> str:
    from megatron_tropd.weight_sync.publish_directory import PREFIX, PublishDirectory

    users(directory, "model.safetensors", f"{PREFIX}-{os.getuid()}-1/weights.bin", "version-1/00000.safetensors")
    place = PublishDirectory(directory)
    (place.path / "version-1").mkdir()
    place.drop_all_but(place.path / "version-2")
    place.close()
    return "its own new directory alone"


def _lock(directory: Path) -> str:
    from megatron_tropd.setup.claims import held_here, run_directory

    users(directory, "run/.tropd.lock")

    def take() -> None:
        with held_here(run_directory(directory / "run")):
            pass

    return refused(take)


def _shared(directory: Path) -> str:
    from megatron_tropd.commands import health

    users(directory, "notes.txt", ".tropd-health-0/token", ".tropd-health-mine")
    alone: dict[str, Any] = {}
    meeting = SimpleNamespace(
        rank=0, tell=alone.__setitem__, hear=lambda name, rank: alone[name], hear_all=lambda name: [alone[name]]
    )
    if problems := health._try_shared(directory, meeting):  # type: ignore[arg-type]
        raise Hole("; ".join(problems))
    if len(left := sorted(path.name for path in directory.iterdir())) != 3:
        raise Hole(f"left {left}")
    return "a folder of its own, which it takes away again"


ATTACKS = (
    survives("files in the directory that `tropd health --shared` tries", _shared),
    survives("a file in the target of an export", lambda directory: _export(directory, place="out")),
    survives("a file in `TARGET.partial`", lambda directory: _export(directory, place="partial")),
    survives("a file in `TARGET.replaced`", lambda directory: _export(directory, place="replaced")),
    survives("a file in what a killed export left", _writer),
    survives("files, folders and links among checkpoints, under `checkpoint.keep`", _checkpoints),
    survives("files at and beside the output of `tropd generate`", _responses),
    survives("files beside the metrics", _metrics),
    survives("files in the directory of a new run", _earlier_run),
    survives("files in the directory where weights are published", _published),
    survives("a file where a lock belongs", _lock),
)
