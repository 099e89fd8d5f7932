"""The student in files of others: at the end, every so many steps, and the best so far."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from megatron_tropd.config.sections import ExportConfig
from megatron_tropd.convert.companions import companions_of
from megatron_tropd.convert.peft import write_peft
from megatron_tropd.convert.writer import HFWriter
from megatron_tropd.engine.adapters import adapter_tensors
from megatron_tropd.engine.megatron_layout import save_for_megatron
from megatron_tropd.engine.weights import hf_rows
from megatron_tropd.errors import StorageError
from megatron_tropd.models.name_table import hf_shapes
from megatron_tropd.progress.phases import Phase
from megatron_tropd.report.terminal import say
from megatron_tropd.setup.build import Run
from megatron_tropd.storage.owned import remove_owned

EXPORTS, BEST = "exports", "best"  # RUN/exports/step-00000020, RUN/exports/best
_OF_STEP = re.compile(r"step-\d{8}")


class Exporter:
    """Exporter of a run's student while it trains. Every method is collective."""

    def __init__(
        self, run: Run, section: ExportConfig, *, companions_from: Path, card: Callable[[int], str], base: str
    ) -> None:
        """Export nothing yet.

        Args:
            companions_from: a model directory whose config and tokenizer an export gets.
            card: writes the README.md of the weights after so many steps; the first rank calls it.
            base: path or name on the hub of the model that adapters are for.
        """
        self._run, self._section, self._companions, self._card = run, section, companions_from, card
        self._base = base

    def during(self, step: int) -> None:
        """Export the weights of ``step`` finished steps where that is due, and drop the oldest beyond ``keep``."""
        every, root = self._section.every, self._run.run_dir / EXPORTS
        if not every or step % every:
            return
        self.to(root / f"step-{step:08d}", step)
        if self._run.world.is_first:
            _drop_oldest(root, keep=self._section.keep)
        dist.barrier()

    def best(self, step: int) -> None:
        """Export the weights of ``step`` finished steps as the best so far."""
        if self._section.best:
            self.to(self._run.run_dir / EXPORTS / BEST, step)

    def at_the_end(self, step: int) -> None:
        """Export what the configuration requests of the trained student, after ``step`` steps."""
        if self._section.hf is not None:
            self.to(self._section.hf, step)
        if self._section.adapter is not None:
            self._adapter(self._section.adapter)
        if self._section.megatron is not None:
            self._megatron(self._section.megatron)

    def _adapter(self, target: Path) -> None:
        """Write the student's adapters as `peft` reads them."""
        student, held = self._run.student, dict[str, Tensor]()
        assert student.adapters is not None
        with Phase(f"exporting to {target}") as phase:
            for name, tensor in phase.watch(adapter_tensors(student)):
                if self._run.world.is_first:
                    held[name] = tensor.cpu()
            if self._run.world.is_first:
                write_peft(target, held, student.adapters.spec, base=self._base)

    def _megatron(self, target: Path) -> None:
        """Write the student as other trainers on Megatron-Core load it, each rank its own shards."""
        if self._run.world.is_first:
            target.parent.mkdir(parents=True, exist_ok=True)
        layout, companions = self._section.megatron_layout, companions_of(self._companions)
        with Phase(f"exporting to {target}"):
            save_for_megatron(target, self._run.student, layout=layout, companions=companions)

    def to(self, target: Path, step: int) -> None:
        """Write the student as a Hugging Face directory, with the tokenizer and config it came with."""
        run = self._run
        writer, shapes = None, hf_shapes(run.student.architecture)
        if run.world.is_first:
            target.parent.mkdir(parents=True, exist_ok=True)
            writer = HFWriter(
                target,
                companions_from=self._companions,
                tensors=shapes,
                dtype=run.student.dtype,
                end_ids=run.method.end_ids,
                card=self._card(step),
            )
        with Phase(f"exporting to {target}", total=sum(map(math.prod, shapes.values()))) as phase:
            for name, first, rows in hf_rows(run.student):
                if writer is not None:
                    writer.write_rows(name, first, rows)
                phase.advance(rows.numel())
            if writer is not None:
                writer.finish()


def _drop_oldest(root: Path, *, keep: int) -> None:
    """Remove all exports of steps but the newest; one that has something of somebody else's in it stays."""
    for old in sorted(path for path in root.iterdir() if _OF_STEP.fullmatch(path.name))[:-keep]:
        try:
            remove_owned(old)
        except StorageError as error:
            say(f"{error} It is one more than export.keep = {keep}.")
