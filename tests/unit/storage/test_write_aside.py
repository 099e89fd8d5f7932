"""Files appear whole or not at all; directories are replaced only where this program wrote all that is in them."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import BinaryIO

import pytest

from megatron_tropd.errors import ConfigError, StorageError
from megatron_tropd.storage import owned
from megatron_tropd.storage import write_aside as module
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
from megatron_tropd.storage.write_aside import write_aside


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
