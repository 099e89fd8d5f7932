"""Name files that are not what they are taken for, by their first bytes: pointers, archives, web pages, tables."""

from __future__ import annotations

import gzip
import os
import zlib
from pathlib import Path

GZIP = b"\x1f\x8b"
_HEAD = 4096
_LFS = b"version https://git-lfs.github.com/spec/"
_ARCHIVES = {
    GZIP: ("compressed with gzip", "gunzip {path}"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "unzstd {path}"),
    b"BZh": ("compressed with bzip2", "bunzip2 {path}"),
    b"\xfd7zXZ\x00": ("compressed with xz", "unxz {path}"),
    b"PK\x03\x04": ("a zip archive (an Excel sheet is one, too)", "unzip {path}"),
}
# read by no program of ours, whatever is in them
_OTHERS = {
    b"SQLite format 3\x00": "an SQLite database. Write the rows of its table as JSON lines.",
    b"\x80\x02": "a pickle, which is never loaded. Save its rows as JSON lines.",
    b"\x80\x03": "a pickle, which is never loaded. Save its rows as JSON lines.",
    b"\x80\x04": "a pickle, which is never loaded. Save its rows as JSON lines.",
    b"\x80\x05": "a pickle, which is never loaded. Save its rows as JSON lines.",
    b"Obj\x01": "an Avro file. Save its rows as JSON lines, or as Parquet.",
}
_TAR, _TAR_AT = b"ustar", 257
_TABLES = {b"PAR1": (".parquet", "Parquet"), b"ARROW1": (".arrow", "Arrow")}


def head_of(path: Path) -> bytes:
    """Read the first bytes of a file; none where it cannot be read."""
    try:
        # of a pipe that nobody writes to there is nothing, and no waiting
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with os.fdopen(handle, "rb") as file:
            return file.read(_HEAD) or b""
    except OSError:
        return b""


def foreign_kind(path: Path) -> str | None:
    """Say what a file is that no reader here reads, and what to do about it; None where nothing stands out.

    The sentence completes "PATH is ".
    """
    head = head_of(path)
    if head.startswith(_LFS):
        return "a Git LFS pointer, not the file itself. Run `git lfs pull` in its repository, or download it."
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start[:14].lower().startswith((b"<!doctype html", b"<html")):
        return "a web page: the download went wrong, perhaps for want of a login. Download it again."
    for magic, (what, command) in _ARCHIVES.items():
        if head.startswith(magic):
            return f"{what}. Unpack it: `{command.format(path=path)}`."
    return None


def foreign_rows(path: Path) -> str | None:
    """Return ``foreign_kind`` of a file of rows; also tables and texts of other kinds. Gzip is none."""
    head = head_of(path)
    kind = None if head.startswith(GZIP) else foreign_kind(path)
    if kind is not None:
        return kind
    if other := _other_content(path, head):
        return other
    if path.suffix in {suffix for suffix, _ in _TABLES.values()} or head.startswith(GZIP):
        return None
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\x00" in head[:64]:
        return (
            "text in UTF-16, or no text at all. Convert it: "
            f"`iconv -f UTF-16 -t UTF-8 {path} > {path.with_suffix('.utf8.jsonl').name}`."
        )
    if path.suffix.lower() in (".csv", ".tsv") or _looks_like_csv(head):
        separator = ", sep='\\t'" if path.suffix.lower() == ".tsv" or b"\t" in head.split(b"\n")[0] else ""
        return (
            'a CSV table, not JSON lines. Convert it: `python -c "import pandas; '
            f"pandas.read_csv('{path}', dtype=str{separator})"
            f".to_json('{path.with_suffix('.jsonl').name}', orient='records', lines=True)\"`."
        )
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if path.suffix.lower() in (".yaml", ".yml", ".toml", ".xml") and not start.startswith((b"{", b"[")):
        return "no JSON lines, by its name and its first character. Save its rows as JSON lines."
    if start.startswith(b"{") and start.split(b"\n", 1)[0].strip() == b"{":
        return f"JSON over several lines, not one object per line. Convert it: `jq -c . {path} > rows.jsonl`."
    return None


def _other_content(path: Path, head: bytes) -> str | None:
    """Return what ``foreign_rows`` says of databases, pickles, archives, and tables under another name."""
    if is_tar(path):
        return f"a tar archive. Unpack it: `tar xf {path}`."
    named = {magic: what for magic, what in _OTHERS.items() if head.startswith(magic)}
    for magic, (suffix, what) in _TABLES.items():
        if head.startswith(magic) and path.suffix != suffix:
            named[magic] = f"a table in {what}'s format. Give it the ending {suffix}."
    return next(iter(named.values()), None)


def is_tar(path: Path) -> bool:
    """Say whether a file, which may be compressed with gzip, is a tar archive."""
    head = head_of(path)
    if head.startswith(GZIP):
        try:
            with gzip.open(path) as stream:
                head = stream.read(_TAR_AT + len(_TAR))
        except (OSError, EOFError, zlib.error):
            return False
    return head[_TAR_AT : _TAR_AT + len(_TAR)] == _TAR


def _looks_like_csv(head: bytes) -> bool:
    """Look for two lines with separators and without any JSON."""
    lines = [line.strip() for line in head.split(b"\n")[:2] if line.strip()]
    return len(lines) == 2 and all(b"{" not in line and b"[" not in line and b"," in line for line in lines)


def adapter_base(directory: Path) -> str | None:
    """Say what a directory with a LoRA adapter alone is, and what to do; None where it is not one."""
    if not (directory / "adapter_config.json").is_file() or (directory / "config.json").is_file():
        return None
    merge = f"M.from_pretrained('{directory}').merge_and_unload().save_pretrained('merged')"
    return (
        'a LoRA adapter, not a whole model. Merge it into its base model first: `python -c "from peft import '
        f"AutoPeftModelForCausalLM as M; {merge}\"` (and copy the tokenizer's files there). A student starts from it "
        f"with its base model as student.model and student.lora.path={directory}."
    )
