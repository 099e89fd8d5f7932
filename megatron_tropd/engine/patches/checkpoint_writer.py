"""Spare Megatron the manager process that it starts to collect what a checkpoint's writers have written."""

from __future__ import annotations

import queue

from megatron.core.dist_checkpointing.strategies import filesystem_async


def collect_writes_in_process() -> None:
    """Let writer and collector be one process: saving is synchronous here.

    The manager takes seconds to start on every rank, imports ``__main__`` again, and outlives a rank that is killed:
    each kill and restart would leave some behind.
    """
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
