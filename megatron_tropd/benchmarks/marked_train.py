"""Train as ``tropd train`` does, with the seconds, processor seconds and peak memory of this rank's steps written down.

``python -m megatron_tropd.benchmarks.marked_train FOLDER CONFIG key=value ...``, under torchrun: each rank writes
``FOLDER/rank-N.json``, the first one ``FOLDER/prompts.json`` too, the prompts of every step as token ids.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import torch.distributed as dist

from megatron_tropd import cli
from megatron_tropd.setup.build import Run
from megatron_tropd.train import loop


def main(folder: Path, arguments: list[str]) -> None:
    """Mark the end of every step, which is when its weights are published."""
    marks: list[tuple[float, float]] = []
    publish = loop.publish

    def marked(run: Run, version: int) -> None:
        publish(run, version)
        marks.append((time.perf_counter(), time.process_time()))
        if version == run.train.steps:
            _write(folder, run, marks)

    loop.publish = marked
    sys.argv = ["tropd", "train", *arguments]
    cli.main()


def _write(folder: Path, run: Run, marks: list[tuple[float, float]]) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    (folder / f"rank-{dist.get_rank()}.json").write_text(json.dumps({"marks": marks, "peak": peak}))
    if dist.get_rank() == 0:
        batches = [run.prompts.batch(step, run.train.prompts_per_step) for step in range(run.train.steps)]
        ids = [[prompt.token_ids.tolist() for prompt in batch] for batch in batches]
        (folder / "prompts.json").write_text(json.dumps(ids))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
