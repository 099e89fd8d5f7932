"""Files appear whole or not at all; directories are replaced only where this program wrote all that is in them."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from functools import partialmethod
from pathlib import Path
from typing import BinaryIO

import pytest

from megatron_tropd.errors import ConfigError, StorageError
from megatron_tropd.storage import owned
from megatron_tropd.storage import write_aside as module
from megatron_tropd.storage.checksums import record_files
from megatron_tropd.storage.owned import (
    MARKER,
    beside,
    check_target,
    discard_unfinished,
    mark_directory,
    replace_directory,
    start_unfinished,
    why_not_ours,
)
from megatron_tropd.storage.write_aside import (
    abandoned_partials,
    make_directory,
    remove_partials,
    sync_tree,
    write_aside,
)

ROOT = Path(__file__).resolve().parents[3]


def tree(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# --------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("content", "written"),
    [("grün\n", b"gr\xc3\xbcn\n"), (b"\x00\xff", b"\x00\xff"), (lambda file: file.write(b"made"), b"made")],
    ids=["text", "bytes", "function"],
)
def test_what_is_written_replaces_what_was_there_and_leaves_nothing_aside(content, written, tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    assert write_aside(path, content) == path
    assert tree(tmp_path) == {"file": written}


def test_a_full_disk_is_an_error_of_ours_and_the_old_content_stays(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def half(file: BinaryIO) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(StorageError, match=r"cannot write .*file: No space left on device. Make room there"):
        write_aside(path, half)
    assert tree(tmp_path) == {"file": b"old"}


def test_a_file_and_the_name_of_it_are_synced_before_and_after_the_rename(tmp_path, monkeypatch):
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        done.append("directory" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        sync(handle)

    monkeypatch.setattr(module.os, "fsync", fsync)
    monkeypatch.setattr(module.os, "replace", lambda *pair: (done.append("rename"), replace(*pair)))
    write_aside(tmp_path / "file", "new")
    assert done == ["file", "rename", "directory"]


def test_two_writers_of_one_file_do_not_write_into_each_other(tmp_path):
    path = tmp_path / "file"

    def outer(file: BinaryIO) -> None:
        file.write(b"outer, ")
        write_aside(path, "inner")
        file.write(b"whole")

    write_aside(path, outer)
    assert tree(tmp_path) == {"file": b"outer, whole"}


WRITES = """
import os, signal, sys
from megatron_tropd.storage.write_aside import write_aside
def stall(file):
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
write_aside(sys.argv[1], stall)
"""


def killed_while_writing(path: Path) -> list[str]:
    """A process that is killed in the midst of ``path``; the names that it leaves."""
    before = {entry.name for entry in path.parent.iterdir()}
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", WRITES, str(path)], env=environment, timeout=120, check=False)
    assert ended.returncode == -9
    return sorted({entry.name for entry in path.parent.iterdir()} - before)


def test_what_a_killed_writer_leaves_is_removed_by_the_next_run_and_nothing_else(tmp_path):
    path = tmp_path / "scores.parquet"
    users = ("scores.parquet.partial", "notes.12-abc.partial", "x.partial")
    for name in users:
        (tmp_path / name).write_text("mine")
    old = tmp_path / "old.4194304-0123abcd.partial"  # of a version that did not write the host; no such process
    old.write_text("half")
    (left,) = killed_while_writing(path)

    def write_and_look(file: BinaryIO) -> None:
        file.write(b"whole")
        file.flush()
        assert [entry.name for entry in abandoned_partials(tmp_path)] == [left]  # not the one being written

    write_aside(path, write_and_look)
    os.utime(old, (time.time() - 7200,) * 2)
    assert sorted(entry.name for entry in remove_partials(tmp_path)) == sorted([left, old.name])
    assert tree(tmp_path) == {"scores.parquet": b"whole", **dict.fromkeys(users, b"mine")}


def test_new_directories_last_and_so_do_their_names(tmp_path, monkeypatch):
    synced: list[Path] = []
    sync = os.fsync
    monkeypatch.setattr(
        module.os, "fsync", lambda handle: (synced.append(Path(os.readlink(f"/proc/self/fd/{handle}"))), sync(handle))
    )
    assert make_directory(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert set(synced) == {tmp_path, tmp_path / "a"}
    synced.clear()
    make_directory(tmp_path / "a" / "b")
    assert synced == []


def test_files_that_a_library_has_written_are_synced_when_they_are_recorded(tmp_path, monkeypatch):
    """Megatron's common.pt and metadata.json, an export's config and tokenizer: none goes through ``write_aside``."""
    (tmp_path / "ahead").mkdir()
    names = ["common.pt", "metadata.json", "ahead/scores.npz"]
    for name in names:
        (tmp_path / name).write_text(name)
    synced: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")))
    record_files(tmp_path, names)
    assert synced == [str(tmp_path / name) for name in names]
    synced.clear()
    sync_tree(tmp_path)
    assert set(synced) == {str(tmp_path), str(tmp_path / "ahead")}


# --------------------------------------------------------------------------- directories


def ours(directory: Path, **files: str) -> Path:
    directory.mkdir(parents=True)
    for name, text in files.items():
        (directory / name).write_text(text)
    mark_directory(directory, kind="test")
    return directory


def test_a_directory_of_ours_is_replaced_in_one_rename_with_nothing_left(tmp_path):
    target = ours(tmp_path / "out", old="1", gone="2")
    replace_directory(ours(tmp_path / "out.partial", old="3"), target)
    assert {name: text for name, text in tree(tmp_path).items() if MARKER not in name} == {"out/old": b"3"}


def test_removing_what_was_left_half_done_can_be_cut_short_anywhere(tmp_path, monkeypatch):
    """Killed between two removals, the next process still knows that the rest is this program's."""
    removals = {name: getattr(Path, name) for name in ("unlink", "rmdir")}
    for most in range(6):  # three files, a folder, the note, the directory
        place = tmp_path / f"{most}.partial"
        start_unfinished(place, "a checkpoint")
        (place / "hf").mkdir()
        for name in (".hidden", "common.pt", "hf/config.json"):
            (place / name).write_text(name)
        done: list[Path] = []

        def remove(path: Path, name: str, *, most: int = most, done: list[Path] = done, **options: bool) -> None:
            if len(done) == most:
                raise KeyboardInterrupt
            removals[name](path, **options)
            done.append(path)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            for name in removals:
                patch.setattr(Path, name, partialmethod(remove, name))
            discard_unfinished(place, lambda name: True)
        assert len(done) == most
        check_target(tmp_path / str(most), name="the target", protected={})
        discard_unfinished(place, lambda name: True)
        assert not place.exists() or not any(place.iterdir())


def spoil(directory: Path, how: str) -> str:
    """Changes a directory of ours; what is said of it."""
    if how == "another file":
        (directory / "notes.txt").write_text("mine")
        return "holds more than this program wrote there (notes.txt)"
    if how == "a folder":
        (directory / "sub").mkdir()
        (directory / "sub" / "notes.txt").write_text("mine")
        return "holds more than this program wrote there (sub/notes.txt)"
    if how == "changed":
        (directory / "old").write_text("9")
        return "has changed since this program wrote it: old has other content than was written"
    if how == "no marker":
        (directory / MARKER).unlink()
        return "holds what this program did not write (old)"
    if how == "a broken marker":
        (directory / MARKER).write_bytes(b"\xff{")
        return f"holds what this program did not write ({MARKER}, old)"
    (directory / MARKER).write_text('{"written_by": "somebody", "files": {}}')
    return f"holds what this program did not write ({MARKER}, old)"


@pytest.mark.parametrize(
    "how", ["another file", "a folder", "changed", "no marker", "a broken marker", "another's marker"]
)
def test_a_directory_with_anything_of_the_users_is_refused_and_left(how, tmp_path):
    target = ours(tmp_path / "out", old="1")
    said = spoil(target, how)
    aside = ours(tmp_path / "out.partial", new="2")
    before = tree(tmp_path)
    with pytest.raises(ConfigError) as refused:
        check_target(target, name="export.hf", protected={})
    assert said in str(refused.value)
    with pytest.raises(StorageError) as failed:
        replace_directory(aside, target)
    assert said in str(failed.value) and "elete" not in str(failed.value)
    assert tree(tmp_path) == before


def test_nothing_an_empty_directory_and_one_of_ours_may_be_written(tmp_path):
    (tmp_path / "empty").mkdir()
    ours(tmp_path / "ours", old="1")
    for name in ("new", "empty", "ours"):
        check_target(tmp_path / name, name="export.hf", protected={"run_dir": tmp_path / "run"})


def test_a_link_is_not_written_through(tmp_path):
    (tmp_path / "link").symlink_to(ours(tmp_path / "real", old="1"))
    with pytest.raises(ConfigError, match="is a symbolic link"):
        check_target(tmp_path / "link", name="export.hf", protected={})


@pytest.mark.parametrize("spelled", ["models", "models/student", "models/../models/student", ".", "other/../models/"])
def test_what_is_read_is_protected_however_it_is_spelled(spelled, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("models/student", "other"):
        Path(name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"student\.model"):
        check_target(Path(spelled), name="export.hf", protected={"student.model": Path("models/student")})


def test_a_link_to_what_is_read_is_protected(tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ConfigError, match=r"student\.model"):
        check_target(tmp_path / "student", name="x", protected={"student.model": tmp_path / "link" / "student"})


@pytest.mark.parametrize("suffix", ["partial", "replaced"])
def test_directories_of_the_user_beside_the_target_are_refused_too(suffix, tmp_path):
    place = beside(tmp_path / "out", suffix)
    place.mkdir()
    (place / "precious.txt").write_text("mine")
    with pytest.raises(ConfigError, match=rf"out\.{suffix} holds what this program did not write \(precious.txt\)"):
        check_target(tmp_path / "out", name="export.hf", protected={})


def test_a_writer_killed_just_before_the_last_rename_is_in_nobodys_way(tmp_path):
    """The note is gone by then, and the directory whole."""
    aside = ours(tmp_path / "out.partial", new="1")
    killed_while_writing(aside / MARKER)
    check_target(tmp_path / "out", name="export.hf", protected={})
    discard_unfinished(aside, lambda name: False)
    assert not aside.exists()
    place = tmp_path / "other.partial"
    place.mkdir()
    killed_while_writing(place / owned.UNFINISHED)  # killed before it had its note
    check_target(tmp_path / "other", name="export.hf", protected={})
    discard_unfinished(place, lambda name: False)
    start_unfinished(place, "a note")
    assert tree(tmp_path) == {f"other.partial/{owned.UNFINISHED}": b"a note"}


def test_what_was_left_half_done_goes_but_for_what_is_not_ours(tmp_path):
    place = tmp_path / "out.partial"
    start_unfinished(place, "a note")
    (place / "model.part").write_text("1")
    discard_unfinished(place, lambda name: name == "model.part")
    assert not place.exists()

    start_unfinished(place, "a note")
    (place / "precious.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"precious\.txt"):
        discard_unfinished(place, lambda name: name == "model.part")
    assert (place / "precious.txt").read_text() == "mine"
    assert why_not_ours(place) is not None and owned.unfinished_note(place) == "a note"
