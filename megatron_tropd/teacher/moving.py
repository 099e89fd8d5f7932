"""A student that is its own teacher, by the weights that it has at every step, or by their moving average.

Both score in the trainer's own layout and on its own ranks. What they say of a step is asked before its first update,
and the output weight that full-vocabulary divergences multiply with is of that moment, too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_tropd.engine.model import Model


@dataclass(frozen=True, slots=True, kw_only=True)
class MovingTeacher:
    """The weights that follow the student's. ``average`` None: they are the student's own."""

    student: Model
    average: Model | None = None  # fp32, laid out as the student
    scoring: Model | None = None  # the average in the student's dtype: ``average`` itself where that is fp32
    decay: float = 0.0
    every: int = 1

    @property
    def model(self) -> Model:
        """Return the model that scores."""
        return self.student if self.scoring is None else self.scoring

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """Take up the student's weights after ``step`` finished steps, where that is due.

        ``average = decay * average + (1 - decay) * student``, element by element in fp32; nothing is communicated.
        """
        if self.average is None or step % self.every:
            return
        self.student.finish_pending_gathers()
        for mine, theirs in zip(_parameters(self.average), _parameters(self.student), strict=True):
            mine.mul_(self.decay).add_(theirs.float(), alpha=1.0 - self.decay)
        self.restored()

    @torch.no_grad()
    def restored(self) -> None:
        """Bring the average into the dtype that scores."""
        if self.average is None or self.scoring is None or self.scoring is self.average:
            return
        with self.scoring.present():
            for scored, mine in zip(_parameters(self.scoring), _parameters(self.average), strict=True):
                scored.copy_(mine)

    def output_weight(self) -> Tensor | None:
        """Copy, ``[v, D]``, the output weight as it is now; None off the last stage.

        A copy, since the student's changes between the minibatches that are learned from by one scoring.
        """
        model = self.model
        if not model.groups.is_last_stage:
            return None
        with model.present():
            return model.chunks[-1].output_weight().detach().clone()


def _parameters(model: Model) -> Iterator[Tensor]:
    for chunk in model.chunks:
        yield from chunk.parameters()
