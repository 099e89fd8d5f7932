"""A lock is one process's, is gone with it however it ends, and never takes a user's file for one of its own."""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tropd.errors import StorageError
from megatron_tropd.storage import locks
from megatron_tropd.storage.locks import HeldLock, Process, take_lock

ROOT = Path(__file__).resolve().parents[3]
HOLDS = """
import os, sys, time
from pathlib import Path
from megatron_tropd.storage.locks import take_lock
lock = take_lock(Path(sys.argv[1]), name="run_dir = 'a'", fix="")
child = os.fork()
if child:  # the child, such as a worker, outlives it
    print(child, flush=True)
time.sleep(300)
"""


def take(path: Path) -> HeldLock:
    return take_lock(path, name="run_dir = 'a'", fix="Name another.")


def test_a_lock_names_its_holder_and_is_free_once_that_is_killed_whatever_it_has_forked(tmp_path: Path):
    path = tmp_path / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert holder.stdout is not None
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(StorageError) as refused:
            take(path)
        found = re.match(
            r"run_dir = 'a' is in use by process (\d+) on (\S+) since \S+\. Name another\.", str(refused.value)
        )
        assert found and found.groups() == (str(holder.pid), socket.gethostname())
        holder.kill()
        holder.wait(timeout=60)
        lock = take(path)
        assert json.loads(path.read_text())["pid"] == os.getpid()
        lock.release()
        lock.release()
        assert not path.exists()
    finally:
        holder.kill()
        os.kill(child, 9)
        holder.communicate(timeout=60)


def test_one_process_holds_a_lock_once(tmp_path: Path):
    lock = take(tmp_path / "lock")
    with pytest.raises(StorageError, match="in use by process"):
        take(tmp_path / "lock")
    lock.release()
    take(tmp_path / "lock").release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["notes of mine", "[]", '{"pid": 1}', '{"written_by": "somebody"}', "\xff"])
def test_a_file_of_the_users_is_no_lock_and_stays(content: str, tmp_path: Path):
    path = tmp_path / "lock"
    path.write_text(content)
    with pytest.raises(StorageError, match="is no lock of this program"):
        take(path)
    assert path.read_text() == content


def test_a_link_is_not_followed(tmp_path: Path):
    (tmp_path / "notes").write_text("")
    (tmp_path / "lock").symlink_to(tmp_path / "notes")
    with pytest.raises(StorageError, match="cannot write"):
        take(tmp_path / "lock")
    assert (tmp_path / "notes").read_text() == "" and (tmp_path / "lock").is_symlink()


def test_where_a_file_system_has_no_locks_the_content_must_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def none(*_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    path, now = tmp_path / "lock", Process.current()

    def left(**changes: object) -> None:
        facts = {"host": now.host, "pid": now.pid, "started": now.started, "ticks": now.ticks, **changes}
        path.write_text(json.dumps({"written_by": "megatron_tropd", **facts}))

    left()
    with pytest.raises(StorageError, match=rf"in use by process {now.pid}"):
        take(path)
    left(ticks=now.ticks - 1)  # its number is another process's now
    with pytest.warns(UserWarning, match="has no locks: a second run there is noticed on this host alone"):
        take(path).release()
    left(host="elsewhere", pid=77)
    with pytest.warns(UserWarning, match=r"process 77 on elsewhere since \S+ has used it last, and may still"):
        take(path).release()
