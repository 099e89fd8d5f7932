"""One bit that flips in a file of a run: noticed by an error of this program's, or nothing that is read is another.

The suite flips a bit in every few hundred; ``tools/attack.py flips`` flips every one of the small files.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np

from tests.support.attacks import Attack, Hole

FORMAT_2 = Path(__file__).resolve().parents[2] / "unit" / "teacher" / "recording_format_2"
Read = Callable[[Path], Any]


def flip(path: Path, bits: Iterable[int], read: Callable[[], Any]) -> Counter[str]:
    """How often a flipped bit of a file is ``noticed`` or leaves what is read the ``same``; anything else is a Hole."""
    from megatron_tropd.errors import TropdError

    whole, expected, found = path.read_bytes(), repr(read()), Counter[str]()
    for bit in bits:
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            got = repr(read())
        except TropdError:
            found["noticed"] += 1
            continue
        except Exception as error:
            raise Hole(f"bit {bit} of {path.name}: {type(error).__name__}: {error}") from error
        if got != expected:
            raise Hole(f"bit {bit} of {path.name} changes what is read")
        found["same"] += 1
    path.write_bytes(whole)
    return found


def flipped(make: Callable[[Path], Path], read: Read, *, every: int) -> Callable[[Path], str]:
    """Flips one bit in ``every`` of each file that ``make`` leaves in a directory; ``read`` is given that directory."""

    def attempt(directory: Path) -> str:
        root = make(directory)
        total: Counter[str] = Counter()
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            # an odd distance, so that every bit of a byte has its turn
            total += flip(path, range(0, 8 * path.stat().st_size, every), partial(read, root))
        return f"{total['noticed']:,} noticed, {total['same']:,} change nothing that is read"

    return attempt


# --------------------------------------------------------------------------- rollouts


def rollouts(directory: Path) -> Path:
    from megatron_tropd.rollout.engines.recorded import write_rollouts
    from megatron_tropd.types import Rollout, single_turn

    rng = np.random.default_rng(0)
    made = [
        Rollout(
            sequence_id=number,
            prompt_index=number,
            finished=bool(number % 2),
            weight_version=2,
            token_ids=rng.integers(0, 99, 12),
            region_L=single_turn(prompt=4, prefix=1, continuation=7),
            sampling_logprob=rng.normal(size=7).astype(np.float32),
            model_logprob=rng.normal(size=7).astype(np.float32),
        )
        for number in range(3)
    ]
    write_rollouts(directory, 0, made)
    return directory


def read_rollouts(directory: Path) -> Any:
    from megatron_tropd.rollout.engines import recorded

    facts = ("sequence_id", "prompt_index", "finished", "weight_version", "token_ids", "region_L")
    facts += ("sampling_logprob", "model_logprob", "token_versions")
    return [[getattr(rollout, name) for name in facts] for rollout in recorded.read_rollouts(directory, 0)]


# --------------------------------------------------------------------------- a teacher's scores


def scores(directory: Path) -> Path:
    import torch

    from megatron_tropd.teacher.store import SequenceScores, sequence_key, write_part

    rng, rows = np.random.default_rng(0), 5
    made = [
        SequenceScores(
            key=sequence_key(np.arange(number, 9)),
            position=np.arange(rows),
            token_ids=rng.integers(0, 99, rows),
            fields={
                "logprob": torch.from_numpy(-rng.exponential(size=rows).astype(np.float32)),
                "topk_ids": torch.from_numpy(rng.integers(0, 99, (rows, 3))),
                "topk_logprob": torch.from_numpy(-rng.exponential(size=(rows, 3)).astype(np.float32)),
            },
        )
        for number in range(2)
    ]
    write_part(directory, made, vocab_size=99, values="fp16")
    return directory


def read_scores(directory: Path) -> Any:
    from megatron_tropd.teacher.store import Store

    store = Store(directory)
    return [
        (place, store.positions(place).tolist(), {n: store.read(place, n).tolist() for n in store.columns(place)})
        for place in store.places()
    ]


def format_2(directory: Path) -> Path:
    return Path(shutil.copytree(FORMAT_2, directory / "old", ignore=shutil.ignore_patterns("*.json")))


def read_format_2(directory: Path) -> Any:
    """What a conversion would write, without the file of facts, which is compared with the run's own."""
    from megatron_tropd.teacher import old_recordings

    parts = [old_recordings._read_part(path) for path in sorted(directory.glob(f"*{old_recordings.SUFFIX}"))]
    return [
        (one.key, one.pack, one.queries, one.position.tolist(), {k: v.tolist() for k, v in one.fields.items()})
        for part in parts
        for one in old_recordings._scores(part)
    ]


# --------------------------------------------------------------------------- a checkpoint


def checkpoint(directory: Path) -> Path:
    """Files as training leaves them, with a complete.json as training writes it; what is in them plays no part."""
    from megatron_tropd.engine import checkpoint as module
    from megatron_tropd.storage.checksums import record_files

    root = directory / "checkpoints" / "step-00000004"
    (root / "ahead").mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = ["__0_0.distcp", ".metadata", "common.pt", "metadata.json", "ahead/scores-00000005-00000.npz"]
    for name in names:
        (root / name).write_bytes(rng.bytes(61))
    files = {name: record.as_json() for name, record in record_files(root, names).items()}
    state = module._signed({"step": 4, "run": {"seed": 7, "method.name": "tropd"}, "files": files})
    (root / "complete.json").write_text(json.dumps(state, indent=2, sort_keys=True))
    return root


def read_checkpoint(root: Path) -> Any:
    """What every start does with a checkpoint before anything of it is loaded, and what it would load then."""
    from megatron_tropd.engine import checkpoint as module

    alone = SimpleNamespace(
        get_rank=lambda: 0,
        get_world_size=lambda: 1,
        all_gather_object=lambda found, own: found.__setitem__(0, own),
    )
    with mock.patch.object(module, "dist", alone):
        state = module.read_state(root)
        module.check_contents(root)
    return sorted(state.items()), [(name, (root / name).read_bytes()) for name in sorted(state["files"])]


def latest(directory: Path) -> Path:
    checkpoint(directory)
    root = directory / "checkpoints" / "named"
    root.mkdir()
    (root / "latest").write_text("step-00000004")
    return root


def read_latest(root: Path) -> Any:
    """Which checkpoint a run resumes from: ``latest`` lies beside the checkpoint while it is read."""
    from megatron_tropd.engine.checkpoint import find_checkpoint

    shutil.copyfile(root / "latest", root.parent / "latest")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it names no checkpoint is said
        return find_checkpoint(root.parent)


MAKERS: dict[str, tuple[Callable[[Path], Path], Read, int]] = {
    "rollouts": (rollouts, read_rollouts, 131),
    "scores in Parquet": (scores, read_scores, 101),
    "scores of format 2": (format_2, read_format_2, 37),
    "a checkpoint": (checkpoint, read_checkpoint, 47),
    "`latest`": (latest, read_latest, 3),
}
ATTACKS = (
    *(Attack(name=f"{name}: some bits", attempt=flipped(m, r, every=n)) for name, (m, r, n) in MAKERS.items()),
    *(
        Attack(name=f"{name}: every bit", attempt=flipped(m, r, every=1), quick=False)
        for name, (m, r, _) in MAKERS.items()
    ),
)
