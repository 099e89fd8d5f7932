"""Checksums of a Parquet part, in a place that Parquet's readers skip: between its data and its footer.

Parquet has checksums of pages, but none of the pages' headers or of the footer, and a bit that flips there may change
what is read. A part is::

    column chunks | CRC-32 of every chunk | their number, CRC-32 of all that follows and of these | magic | footer

CRC-32 notices every single bit that flips, and any damage within 32 bits of one another. Parts of versions before 0.2
have none; a damaged magic makes a part look like one of them, and is harmless: nothing else is damaged then.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

import pyarrow.parquet as pq

_MAGIC = b"TROPDSUM"
_HEAD = struct.Struct("<II8s")  # number of chunks, checksum, magic
_END = struct.Struct("<I4s")  # Parquet's own: length of the footer, "PAR1"


@dataclass(frozen=True, slots=True)
class Seal:
    """Hold what a part says of itself: its footer, and the checksums of its chunks by row group and column."""

    metadata: pq.FileMetaData
    chunks: tuple[int, ...] | None  # None where an older version wrote the part

    def check(self, file: BinaryIO, group: int, column: int) -> None:
        """Raise ValueError when a chunk is not what was written."""
        if self.chunks is not None:
            number = group * self.metadata.num_columns + column
            if _checksum(file, *_span(self.metadata, group, column)) != self.chunks[number]:
                raise ValueError("a checksum does not match")


def seal(file: BinaryIO) -> None:
    """Put the checksums into a part that has just been written; ``file`` can be read, too."""
    footer = _footer(file)
    metadata = pq.read_metadata(io.BytesIO(footer))
    crcs = [_checksum(file, *span) for span in _spans(metadata)]
    listed = struct.pack(f"<{len(crcs)}I", *crcs)
    file.seek(-len(footer), io.SEEK_END)
    file.write(listed + _HEAD.pack(len(crcs), _whole(listed, footer), _MAGIC) + footer)


def read_seal(file: BinaryIO) -> Seal:
    """Read a part's footer, and compare it with its checksum.

    Raises:
        ValueError, OSError, pyarrow.ArrowException: it is damaged, or no Parquet file.
    """
    footer = _footer(file)
    place = file.seek(0, io.SEEK_END) - len(footer) - _HEAD.size
    crcs: tuple[int, ...] | None = None
    if place >= 0:
        file.seek(place)
        count, checksum, magic = _HEAD.unpack(file.read(_HEAD.size))
        if magic == _MAGIC:
            if 4 * count > place:
                raise ValueError("a checksum does not match")
            file.seek(place - 4 * count)
            listed = file.read(4 * count)
            if _whole(listed, footer) != checksum:
                raise ValueError("the checksum of its footer does not match")
            crcs = struct.unpack(f"<{count}I", listed)
    metadata = pq.read_metadata(io.BytesIO(footer))
    if crcs is not None and len(crcs) != metadata.num_row_groups * metadata.num_columns:
        raise ValueError("it has another number of chunks than of checksums")
    return Seal(metadata, crcs)


def _footer(file: BinaryIO) -> bytes:
    """Read the footer, with its length and the magic at its end."""
    size = file.seek(0, io.SEEK_END)
    if size < _END.size:
        raise ValueError("it ends too early")
    file.seek(size - _END.size)
    length, magic = _END.unpack(file.read(_END.size))
    if magic != b"PAR1" or length + _END.size > size:
        raise ValueError("it does not end as a Parquet file")
    file.seek(size - length - _END.size)
    return file.read(length + _END.size)


def _whole(listed: bytes, footer: bytes) -> int:
    return zlib.crc32(footer, zlib.crc32(listed))


def _spans(metadata: pq.FileMetaData) -> Iterator[tuple[int, int]]:
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            yield _span(metadata, group, column)


def _span(metadata: pq.FileMetaData, group: int, column: int) -> tuple[int, int]:
    """Return where a chunk begins, and how many bytes it has."""
    chunk = metadata.row_group(group).column(column)
    first = chunk.data_page_offset
    if chunk.dictionary_page_offset is not None:
        first = min(first, chunk.dictionary_page_offset)
    return first, chunk.total_compressed_size


def _checksum(file: BinaryIO, first: int, size: int) -> int:
    file.seek(first)
    return zlib.crc32(file.read(size))
