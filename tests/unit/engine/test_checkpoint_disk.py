"""A disk that is full is said to be full, whatever the libraries in between make of it."""

from __future__ import annotations

import errno
from collections import namedtuple
from multiprocessing.process import BaseProcess
from traceback import StackSummary

import pytest
from megatron.core.dist_checkpointing.strategies import filesystem_async
from torch.distributed.checkpoint.api import CheckpointException

from megatron_tropd.engine import checkpoint
from megatron_tropd.engine.patches.checkpoint_writer import write_in_process
from megatron_tropd.errors import StorageError

Usage = namedtuple("Usage", "total used free")
SHORT_WRITE = RuntimeError("Worker failure: [enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")


def of_ranks(error: Exception) -> CheckpointException:
    """What torch makes of an error in saving: no Exception, but a BaseException."""
    return CheckpointException("write", {0: (error, StackSummary())})


def failing(error: BaseException, target, *, free: int, monkeypatch) -> None:
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: Usage(10**9, 0, free))
    with checkpoint._saying_why(target):
        raise error


@pytest.mark.parametrize(
    ("error", "free"),
    [
        (of_ranks(SHORT_WRITE), 0),  # a tmpfs of 2 MB
        (of_ranks(SHORT_WRITE), 10**8),  # a quota
        (RuntimeError("PytorchStreamWriter failed writing file data/0"), 0),
        (OSError(errno.ENOSPC, "No space left on device"), 10**8),
    ],
)
def test_a_full_disk_is_an_error_of_ours(tmp_path, monkeypatch, error: BaseException, free: int):
    target = tmp_path / "checkpoints" / "step-00000002"
    with pytest.raises(StorageError, match=r"cannot write .*step-00000002: No space left on device"):
        failing(error, target, free=free, monkeypatch=monkeypatch)


def test_another_failure_keeps_its_own_message(tmp_path, monkeypatch):
    with pytest.raises(CheckpointException):
        failing(
            of_ranks(RuntimeError("no")),
            tmp_path,
            free=10**8,
            monkeypatch=monkeypatch,
        )


def test_writers_are_threads_and_the_first_error_is_collected(tmp_path, monkeypatch):
    monkeypatch.setattr(BaseProcess, "start", lambda process: pytest.fail("a process that could be killed alone"))
    monkeypatch.setattr(filesystem_async, "_results_queue", None)
    monkeypatch.setattr(
        filesystem_async.FileSystemWriterAsync,
        "write_preloaded_data_multiproc",
        filesystem_async.FileSystemWriterAsync.write_preloaded_data_multiproc,
    )
    write_in_process()
    write = filesystem_async.FileSystemWriterAsync.write_preloaded_data_multiproc
    collected = filesystem_async._get_write_results_queue()

    def bucket(name: str) -> tuple:
        return tmp_path / name, name, ([], [])

    write([], False, 0, [bucket("one"), bucket("two")], collected)
    assert collected.get_nowait() == {0: [], 1: []}
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}
    write([], False, 0, [bucket("three"), bucket("nowhere/four")], collected)
    assert isinstance(collected.get_nowait(), FileNotFoundError)
    assert collected.empty()
