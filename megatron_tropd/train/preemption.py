"""Leaving in good order: SIGTERM, SIGUSR1, SIGHUP and Ctrl-C mean "write a checkpoint and go".

The signal may reach one rank or all of them, at any moment. Ranks agree at fixed places of the loop, so none is left in
a collective that another will never enter. A step whose rollouts were still being written is abandoned (its prompts
and random numbers are drawn again, so the run that resumes repeats it exactly); a later one is finished.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from megatron_tropd.engine.checkpoint import find_checkpoint, read_state
from megatron_tropd.parallel.leaving import leave
from megatron_tropd.parallel.stopping import Repeats, handlers, write_word
from megatron_tropd.parallel.wakeup import hearing
from megatron_tropd.setup.build import Run
from megatron_tropd.train.loop import save
from megatron_tropd.train.rollout_queue import RolloutQueue

# EX_TEMPFAIL of sysexits.h: not done, worth another try; what job scripts requeue on
EXIT_PREEMPTED = 75
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)
_BY_HAND = (signal.SIGHUP, signal.SIGINT)  # a scheduler repeats the others, and kills when it has lost patience
_AGAIN = "Start the same command again to resume from the newest checkpoint."
_GRACE_S = 0.5  # in which the main thread comes to a handler unless it waits in a library


class Preempted(Exception):
    """The run was asked to stop and has a checkpoint to resume from. Not an error, so not one of ``errors``."""

    def __init__(self, text: str, *, status: int = EXIT_PREEMPTED) -> None:
        super().__init__(text)
        self.status = status


class StopRequest:
    """Hear ``SIGNALS`` while it is entered: then the process ends at once with ``EXIT_PREEMPTED``, or 130 on Ctrl-C.

    Before the first step nothing is lost by that, and after the last one there is a checkpoint. In between, within
    ``deferred``, the signal is only remembered, for ``agreed``, with a word of the first rank; Ctrl-C or SIGHUP after
    that ends the process at once. Outside the main thread nothing is heard.

    A rank that waits for others in a library hears them as well.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, raises: bool = False) -> None:
        """Hear nothing yet.

        Args:
            raises: where Ctrl-C would end the process at once, raise KeyboardInterrupt: the process is a user's own.
        """
        self._raises = raises
        self._heard: signal.Signals | None = None
        self._deferring = False
        self._others: Callable[[], int] | None = None
        self._stack = ExitStack()
        self._repeats = Repeats(clock)
        self._seen, self._answered = 0, 0  # signals, by the thread that hears them and by their handler

    def __enter__(self) -> StopRequest:
        self._stack.enter_context(handlers(SIGNALS, self._handle))
        self._stack.enter_context(hearing(self._hear_while_waiting))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

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
            if self._raises and self._heard == signal.SIGINT:
                raise KeyboardInterrupt
            _leave_at_once(self._heard)

    def _hear_while_waiting(self, number: int) -> None:
        """Handle a signal from a thread, where the main thread has not come to its handler after a while.

        It is here that signals are counted: a handler may run much later than its signal came.
        """
        if number not in SIGNALS:
            return
        if self._raises and number == signal.SIGINT:
            return  # what is raised is raised in the main thread alone
        if self._repeats.is_again() and number in _BY_HAND:
            _leave_at_once(signal.Signals(number), deferring=self._deferring)
        self._seen += 1
        until = time.monotonic() + _GRACE_S
        while self._answered < self._seen and time.monotonic() < until:
            time.sleep(0.01)
        if self._answered < self._seen:
            self._handle(number, None)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._answered += 1
        if self._raises and number == signal.SIGINT and (self._heard is not None or not self._deferring):
            raise KeyboardInterrupt
        first, self._heard = self._heard is None, self._heard or signal.Signals(number)
        if not self._deferring:
            _leave_at_once(self._heard)
        elif first and os.environ.get("RANK", "0") == "0":
            write_word(f"{self._heard.name}: a checkpoint is written before the run stops; Ctrl-C now stops it at once")

    def agreed(self) -> signal.Signals | None:
        """Return the signal that some rank has heard, None when none has; the same on every rank. Collective."""
        # on the CPU, where it waits for no kernel
        heard = torch.tensor(int(self._heard or (self._others() if self._others is not None else 0)))
        dist.all_reduce(heard, op=dist.ReduceOp.MAX)
        number = int(heard)
        return signal.Signals(number) if number else None


def _leave_at_once(heard: signal.Signals, *, deferring: bool = False) -> None:
    # no cleaning up: that could wait for ranks that have left already
    if os.environ.get("RANK", "0") == "0":
        write_word(f"stopped by {heard.name} {'at once' if deferring else 'outside of training'}. {_AGAIN}")
    leave(_status(heard))


def _status(heard: signal.Signals) -> int:
    """Return the exit status: nobody puts a run back into the queue that was stopped by hand."""
    return 128 + heard if heard == signal.SIGINT else EXIT_PREEMPTED


def leave_if_requested(
    run: Run,
    queue: RolloutQueue,
    stop: StopRequest,
    steps: int,
    *,
    first_step: int,
    saved: Callable[[int, Path], None] = lambda *_: None,
) -> None:
    """Save and raise when any rank was asked to stop; the weights are those of ``steps`` finished steps.

    Collective. ``first_step``: what this session resumed from, which needs no checkpoint of its own. ``saved`` is told
    of the checkpoint.

    Raises:
        Preempted: the run was asked to stop.
    """
    heard = stop.agreed()
    if heard is None:
        return
    if steps > first_step and not _is_saved(run, steps):
        saved(steps, save(run, queue, steps))
    newest = f"the checkpoint is in {run.run_dir / 'checkpoints'}" if steps else "nothing was learned yet"
    again = "" if run.checkpoint.resume == "auto" else " with checkpoint.resume=auto"
    raise Preempted(
        f"stopped by {heard.name} after {steps} of {run.train.steps} steps; {newest}. "
        f"Start the same command again{again} to resume.",
        status=_status(heard),
    )


def _is_saved(run: Run, steps: int) -> bool:
    """Say whether the newest checkpoint is of ``steps`` steps. One rank looks for all."""
    newest: Path | None = None
    if run.world.is_first:
        newest = find_checkpoint(run.run_dir / "checkpoints")
    saved = torch.tensor(int(newest is not None and read_state(newest)["step"] == steps))
    dist.broadcast(saved, src=0)
    return bool(saved)
