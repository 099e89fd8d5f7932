"""Stop a command that a signal asks to: with a word, with what is done kept, and at once when it asks again.

Training has more to lose, and a handler of its own (``train.preemption``).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from megatron_tropd.parallel.leaving import leave
from megatron_tropd.parallel.wakeup import hearing

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Ctrl-C reaches a process from the terminal and from its launcher, SIGHUP from the terminal and from the shell: what
# comes so soon after the first is the first
SAME_S = 2.0
_GRACE_S = (
    5.0  # in which the main thread comes to a handler unless it waits in a library; a busy machine takes its time
)
_TIDYING_S = 20.0  # for what a command does on its way out


class Stopped(BaseException):
    """A signal has asked the command to stop. No error, and nothing that a library may catch."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Repeats:
    """Distinguish a signal that comes again from one that is delivered twice."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first: float | None = None

    def is_again(self) -> bool:
        """Take note of a signal; say whether one came before it, and not just now."""
        now = self._clock()
        if self._first is None:
            self._first = now
        return now - self._first > SAME_S


def is_ignored(number: int) -> bool:
    """Say whether whoever started this process wants the signal ignored, as ``nohup`` does SIGHUP."""
    return signal.getsignal(number) is signal.SIG_IGN


@contextmanager
def handlers(numbers: Sequence[int], handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Handle these signals within the block, but for those that are to be ignored. Outside the main thread none."""
    main = threading.current_thread() is threading.main_thread()
    wanted = [number for number in numbers if main and not is_ignored(number)]
    before = {number: signal.signal(number, handler) for number in wanted}
    try:
        yield
    finally:
        for number, previous in before.items():
            if previous is not None:  # None: not one of Python's
                signal.signal(number, previous)


@contextmanager
def stoppable(word: Callable[[int], str], *, spoken: bool = True) -> Iterator[None]:
    """Raise Stopped in the main thread when a signal asks to stop; end the process where that takes too long.

    Args:
        word: what to say when the process has to be ended from here.
        spoken: whether this rank is the one that says it.
    """
    answered, repeats = threading.Event(), Repeats()

    def end(number: int) -> None:
        if spoken:
            os.write(2, f"{word(number)}\n".encode())
        leave(128 + number)

    def handle(number: int, frame: FrameType | None) -> None:
        if not answered.is_set():
            answered.set()
            raise Stopped(number)

    def hear(number: int) -> None:  # from a thread
        # whoever has put a handler of its own in place of ours, such as torchrun or a server, knows what to do
        if number not in SIGNALS or signal.getsignal(number) is not handle:
            return
        if repeats.is_again() or not answered.wait(_GRACE_S):
            end(number)
        tidying = threading.Timer(_TIDYING_S, end, (number,))
        tidying.daemon = True
        tidying.start()

    with hearing(hear), handlers(SIGNALS, handle):
        yield


def write_word(text: str) -> None:
    """Write a line to the terminal from a signal's handler, below a progress bar if there is one."""
    start = "\n" if sys.stderr.isatty() else ""
    os.write(2, f"{start}{text}\n".encode())
