"""Write a checkpoint within the process that saves it, where Megatron starts a manager and two writers per rank."""

from __future__ import annotations

import queue
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async


def write_in_process() -> None:
    """Let threads of this process write, and hand over what they have written: saving is synchronous here.

    The manager takes seconds to start on every rank, imports ``__main__`` again, and outlives a rank that is killed:
    each kill and restart would leave some behind. A writer that is killed alone, as by a kernel out of memory, is
    waited for for ever; and a fork takes the locks of the threads it leaves behind.
    """
    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
    filesystem_async.FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(_write_by_threads)


def _write_by_threads(
    transforms: list[Any], use_msc: bool, rank: int, buckets: list[Any], collected: queue.Queue[Any]
) -> None:
    """Write each bucket to its file, and put the results by bucket, or the first error, where Megatron collects them.

    The signature is that of ``FileSystemWriterAsync.write_preloaded_data_multiproc``.
    """
    with ThreadPoolExecutor(max(1, len(buckets)), thread_name_prefix="write-checkpoint") as pool:
        written = list(pool.map(lambda bucket: _write(transforms, use_msc, bucket), buckets))
    errors = [result for result in written if isinstance(result, Exception)]
    collected.put(errors[0] if errors else dict(enumerate(written)))


def _write(transforms: list[Any], use_msc: bool, bucket: Any) -> Any:
    """Return the results of one bucket, or the error that its writing ended with, as Megatron's writers do."""
    results: queue.Queue[Any] = queue.Queue()
    unfinished: queue.Queue[Any] = queue.Queue()
    unfinished.put(None)
    filesystem_async.FileSystemWriterAsync.write_preloaded_data(
        transforms, 0, bucket, results, unfinished, use_fsync=True, use_msc=use_msc
    )
    return results.get_nowait()[1]
