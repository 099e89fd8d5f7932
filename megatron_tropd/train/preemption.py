"""Leaving in good order when the machines are wanted back: SIGTERM and SIGUSR1 mean "write a checkpoint and go".

The signal may reach one rank or all of them, at any moment. Ranks agree at fixed places of the loop, so none is left in
a collective that another will never enter. A step whose rollouts were still being written is abandoned (its prompts
and random numbers are drawn again, so the run that resumes repeats it exactly); a later one is finished.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from megatron_tropd.engine.checkpoint import find_checkpoint, read_state
from megatron_tropd.parallel.leaving import leave
from megatron_tropd.parallel.wakeup import hearing
from megatron_tropd.setup.build import Run
from megatron_tropd.train.loop import save
from megatron_tropd.train.rollout_queue import RolloutQueue

# EX_TEMPFAIL of sysexits.h: not done, worth another try; what job scripts requeue on
EXIT_PREEMPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_GRACE_S = 0.5  # in which the main thread comes to a handler unless it waits in a library


class Preempted(Exception):
    """The run was asked to stop and has a checkpoint to resume from. Not an error, so not one of ``errors``."""


class StopRequest:
    """Hear ``SIGNALS`` while it is entered: then the process ends at once with ``EXIT_PREEMPTED``.

    Before the first step nothing is lost by that, and after the last one there is a checkpoint. In between, within
    ``deferred``, the signal is only remembered, for ``agreed``. Outside the main thread nothing is heard.

    A rank that waits for others in a library hears them as well, and Ctrl-C: outside ``deferred`` at once, within it
    the second time.
    """

    def __init__(self) -> None:
        self._heard: signal.Signals | None = None
        self._deferring = False
        self._others: Callable[[], int] | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._waiting = hearing(self._hear_while_waiting)
        self._interrupts = 0
        self._seen, self._answered = 0, 0  # signals, by the thread that hears them and by their handler

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        self._waiting.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._waiting.__exit__(None, None, None)
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Have signals within the block wait for the next ``agreed``."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        self.leave_if_heard()

    @property
    def heard(self) -> signal.Signals | None:
        """Return the signal that this rank has heard, if any."""
        return self._heard

    def listen_to(self, others: Callable[[], int]) -> None:
        """Listen to ``others``, too: the signal that ranks with no part in ``agreed`` have heard; 0 for none."""
        self._others = others

    def leave_if_heard(self) -> None:
        """End the process when there was a signal."""
        if self._heard is not None:
            _leave_at_once(self._heard)

    def _hear_while_waiting(self, number: int) -> None:
        """Handle a signal from a thread, where the main thread has not come to its handler after a while."""
        if number in SIGNALS:
            self._seen += 1
            until = time.monotonic() + _GRACE_S
            while self._answered < self._seen and time.monotonic() < until:
                time.sleep(0.01)
            if self._answered < self._seen:
                self._handle(number, None)
        elif number == signal.SIGINT:
            self._interrupts += 1
            if not self._deferring or self._interrupts > 1:
                _leave_at_once(signal.SIGINT)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._answered += 1
        self._heard = self._heard or signal.Signals(number)
        if not self._deferring:
            _leave_at_once(self._heard)

    def agreed(self) -> signal.Signals | None:
        """Return the signal that some rank has heard, None when none has; the same on every rank. Collective."""
        # on the CPU, where it waits for no kernel
        heard = torch.tensor(int(self._heard or (self._others() if self._others is not None else 0)))
        dist.all_reduce(heard, op=dist.ReduceOp.MAX)
        number = int(heard)
        return signal.Signals(number) if number else None


def _leave_at_once(heard: signal.Signals) -> None:
    # no cleaning up: that could wait for ranks that have left already
    os.write(2, f"stopped by {heard.name} outside of training\n".encode())
    leave(EXIT_PREEMPTED if heard in SIGNALS else 128 + heard)


def leave_if_requested(run: Run, queue: RolloutQueue, stop: StopRequest, steps: int, *, first_step: int) -> None:
    """Save and raise when any rank was asked to stop; the weights are those of ``steps`` finished steps.

    Collective. ``first_step``: what this session resumed from, which needs no checkpoint of its own.

    Raises:
        Preempted: the run was asked to stop.
    """
    heard = stop.agreed()
    if heard is None:
        return
    if steps > first_step and not _is_saved(run, steps):
        save(run, queue, steps)
    newest = f"the checkpoint is in {run.run_dir / 'checkpoints'}" if steps else "nothing was learned yet"
    again = "" if run.checkpoint.resume == "auto" else " with checkpoint.resume=auto"
    raise Preempted(
        f"stopped by {heard.name} after {steps} of {run.train.steps} steps; {newest}. "
        f"Start the same command again{again} to resume."
    )


def _is_saved(run: Run, steps: int) -> bool:
    """Say whether the newest checkpoint is of ``steps`` steps. One rank looks for all."""
    newest: Path | None = None
    if run.world.is_first:
        newest = find_checkpoint(run.run_dir / "checkpoints")
    saved = torch.tensor(int(newest is not None and read_state(newest)["step"] == steps))
    dist.broadcast(saved, src=0)
    return bool(saved)
