"""Packs as forests: sequences that begin alike, and the rows that remain when equal histories are one.

What a model computes at a token depends on the tokens before it alone, so two tokens whose sequences are equal up to
them are one *row*, a node of the trie over all sequences. Sequences come here in the order in which a walk through
the trie meets them: what one of them shares with any before it, it shares with the last.

``trie_order`` and ``find_rows`` are the plain twins of ``csrc/forest.cpp``; the rest runs over sequences, not tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_tropd.types import Int64Array

# A sequence joins those before it when it shares at least this part of itself with them: for less it is not worth to
# give up the freedom of packing it elsewhere. What is shared with whoever is in the same pack is one row in any case.
_JOIN = 16
# Where a bundle is full, it ends at the least that neighbors share within this part of its room.
_LOOK_BACK = 8


def trie_order(tokens: Int64Array, lengths: Int64Array, sequence_ids: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Order sequences by their tokens, one before those that continue it, equal ones by id.

    Args:
        tokens: of all sequences, one after the other.

    Returns:
        ``order`` [S], and ``common`` [S]: with how many tokens each begins like the one before it; 0 for the first.
    """
    sequences = np.split(tokens, np.cumsum(lengths)[:-1])
    listed = [sequence.tolist() for sequence in sequences]
    order = sorted(range(len(lengths)), key=lambda i: (listed[i], int(sequence_ids[i])))
    common = np.zeros(len(order), np.int64)
    for at in range(1, len(order)):
        common[at] = _agreement(sequences[order[at - 1]], sequences[order[at]])
    return np.array(order, np.int64), common


def find_rows(
    tokens: Int64Array, lengths: Int64Array, pack_offsets: Int64Array, token_offsets: Int64Array
) -> tuple[Int64Array, Int64Array]:
    """Number the rows of every pack, in the order of first appearance.

    Args:
        tokens: the stream of all packs, padding included.
        lengths: [S] of the sequences in the order of the stream; within each pack, that of the trie.
        pack_offsets: [P+1] sequences of pack p are ``pack_offsets[p]`` to ``pack_offsets[p+1]``.
        token_offsets: [P+1] its tokens likewise.

    Returns:
        The row of every token, -1 for padding, and the rows [P] of every pack.
    """
    row, num_rows = np.full(len(tokens), -1, np.int64), np.zeros(len(pack_offsets) - 1, np.int64)
    for pack in range(len(num_rows)):
        start, before, rows = int(token_offsets[pack]), slice(0, 0), 0
        for length in lengths[pack_offsets[pack] : pack_offsets[pack + 1]].tolist():
            here = slice(start, start + length)
            common = _agreement(tokens[before], tokens[here])
            row[start : start + common] = row[before.start : before.start + common]
            row[start + common : here.stop] = np.arange(rows, rows + length - common)
            rows, before, start = rows + length - common, here, here.stop
        num_rows[pack] = rows
    return row, num_rows


def _agreement(one: Int64Array, other: Int64Array) -> int:
    """Count the tokens with which both begin."""
    most = min(len(one), len(other))
    differs = one[:most] != other[:most]
    return int(differs.argmax()) if differs.any() else most


# --------------------------------------------------------------------------- bundles: what goes to one pack together


@dataclass(frozen=True, slots=True, kw_only=True)
class Trie:
    """Sequences in the order of their trie, and what a token of theirs costs."""

    length_S: Int64Array
    common_S: Int64Array  # tokens that each shares with the one before it
    valid_S: Int64Array  # predictions that carry loss
    linear_work: int  # of a row, relative to one unit of L**2

    def work(self, which: Int64Array, shared: Int64Array) -> Int64Array:
        """Return the work of each of these sequences beyond its first ``shared`` tokens.

        A row costs ``linear_work`` and a query the keys along its path, so that a sequence by itself costs
        ``L * (linear_work + L)``.
        """
        length = self.length_S[which]
        work: Int64Array = (length - shared) * self.linear_work + length**2 - shared**2
        return work


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundles:
    """Runs of sequences that go to one pack together: run b holds ``offsets[b]`` to ``offsets[b+1]``."""

    offsets: Int64Array
    size: Int64Array  # rows, or predictions that carry loss where there are more
    work: Int64Array


def join_prefixes(trie: Trie, *, capacity: int) -> Int64Array:
    """Return the offsets of runs that share enough of themselves and fit a pack, in rows and in predictions."""
    length, common, valid = trie.length_S.tolist(), trie.common_S.tolist(), trie.valid_S.tolist()
    offsets, at = [0], 1
    rows, predictions = length[0], valid[0]
    while at < len(length):
        joined, loss = rows + length[at] - common[at], predictions + valid[at]
        if common[at] * _JOIN >= length[at] and max(joined, loss) <= capacity:
            rows, predictions, at = joined, loss, at + 1
            continue
        if common[at] * _JOIN >= length[at]:
            at = _cheapest_end(length, common, first=offsets[-1], end=at, room=capacity // _LOOK_BACK)
        offsets.append(at)
        rows, predictions, at = length[at], valid[at], at + 1
    return np.array([*offsets, len(length)], np.int64)


def _cheapest_end(length: list[int], common: list[int], *, first: int, end: int, room: int) -> int:
    """Find where to end a full run: where neighbors share least, and last of such places."""
    best, passed = end, 0
    for at in range(end - 1, first, -1):
        passed += length[at] - common[at]
        if passed > room:
            break
        if common[at] < common[best]:
            best = at
    return best


def split_evenly(trie: Trie, offsets: Int64Array, *, most_work: int) -> Int64Array:
    """Split every run of more than ``most_work`` into runs of nearly equal work.

    Each part computes again what the run shares, so it is the rest that is divided.
    """
    first, last = offsets[:-1], offsets[1:]
    work = bundles_of(trie, offsets).work
    shared = trie.common_S.copy()
    shared[first] = np.where(last - first > 1, trie.common_S[np.minimum(first + 1, len(shared) - 1)], 0)
    rest = np.cumsum(trie.work(np.arange(len(shared)), shared))
    ends: list[int] = offsets.tolist()
    for run in np.flatnonzero(work > most_work).tolist():
        start, stop = int(first[run]), int(last[run])
        pieces = min(-(-int(work[run]) // most_work), stop - start)
        before = int(rest[start - 1]) if start else 0
        wanted = before + (int(rest[stop - 1]) - before) * np.arange(1, pieces) // pieces
        ends += (start + 1 + np.searchsorted(rest[start:stop], wanted)).clip(max=stop).tolist()
    return np.unique(np.array(ends, np.int64))


def bundles_of(trie: Trie, offsets: Int64Array) -> Bundles:
    """Sum up every run: of its first sequence all rows count, of the others those that are new."""
    first = offsets[:-1]
    shared = trie.common_S.copy()
    shared[first] = 0
    rows, valid = (np.add.reduceat(value, first) for value in (trie.length_S - shared, trie.valid_S))
    work = np.add.reduceat(trie.work(np.arange(len(shared)), shared), first)
    return Bundles(offsets=offsets, size=np.maximum(rows, valid), work=work)
