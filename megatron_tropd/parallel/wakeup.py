"""Hear signals while the main thread waits inside a library.

Python runs a signal's handler between two instructions of the main thread. While that is inside a store or a collective
that waits for ranks which never come, there is none, for as long as the time limit is. The kernel's own handler writes
the number to a pipe at once, and a thread reads it there.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def hearing(on_signal: Callable[[int], None]) -> Iterator[None]:
    """Call ``on_signal``, within the block, with the number of every signal that has a Python handler.

    It is called from a thread, in addition to the handler. Outside the main thread no signal is received.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    thread = threading.Thread(target=_read, args=(reading, on_signal), daemon=True, name="signals")
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writing)
        thread.join()
        os.close(reading)


def _read(pipe: int, on_signal: Callable[[int], None]) -> None:
    while numbers := os.read(pipe, 64):
        for number in numbers:
            on_signal(number)


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C end the process at once within the block, as it does where nothing waits in a library."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
