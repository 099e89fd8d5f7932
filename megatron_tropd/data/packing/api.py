"""Pack whole sequences into fixed-budget streams and assign them to replicas.

Every replica gets the same number of packs and nearly the same work, where a sequence of L tokens costs
``L * (linear_work + L)``: what every token costs in the matrix products, plus attention. Packs hold as many sequences
as fit (best-fit decreasing), but never stay fuller than the number of packs demands: what room the rounding to
``num_replicas`` leaves is spread over all of them.

With ``share_prefixes`` a pack is a forest: tokens with equal histories are one row (``packing.forest``), budgets and
balance count rows and the keys along their paths, sequences that share go to one pack, and each pack says which row
computes each of its tokens. The sequences lie in it whole, one after the other, as ever.

The loops run compiled (``megatron_tropd._C``) when the extension was built, and plain otherwise, with the same
result; ``backend()`` says which. ``MEGATRON_TROPD_REQUIRE_COMPILED=1`` makes a missing extension an ImportError.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from megatron_tropd.data.packing import reference as packing_reference
from megatron_tropd.data.packing.forest import Bundles, Trie, bundles_of, join_prefixes, split_evenly
from megatron_tropd.data.packing.validate import (
    FlatSequences,
    as_int64,
    check_boundaries,
    check_budget,
    check_sequences,
    flatten,
)
from megatron_tropd.types import LOSS_REGIONS, Int64Array, Pack, Rollout, UInt8Array

# A transformer layer of hidden size D spends about 24 D**2 operations per token in matrix products and 2 D L**2 per
# sequence in causal attention, so a token weighs 12 D times a unit of L**2. This is D = 2048.
LINEAR_WORK = 12 * 2048

# With so many bundles to a replica, whole ones balance.
_ENOUGH_BUNDLES = 8

_INTERFACE = 3  # of csrc/bindings.cpp
_log = logging.getLogger(__name__)

__all__ = ["LINEAR_WORK", "FlatSequences", "backend", "pack", "pack_flat", "pack_work", "shared_lengths"]


class _Core(Protocol):
    """The functions that both twins offer."""

    def assign_packs(
        self, lengths: Int64Array, sequence_ids: Int64Array, *, capacity: int, num_replicas: int, linear_work: int
    ) -> tuple[Int64Array, Int64Array]: ...

    def assign_items(
        self, sizes: Int64Array, works: Int64Array, ids: Int64Array, *, capacity: int, num_replicas: int
    ) -> tuple[Int64Array, Int64Array]: ...

    def trie_order(
        self, tokens: Int64Array, lengths: Int64Array, sequence_ids: Int64Array
    ) -> tuple[Int64Array, Int64Array]: ...

    def find_rows(
        self, tokens: Int64Array, lengths: Int64Array, pack_offsets: Int64Array, token_offsets: Int64Array
    ) -> tuple[Int64Array, Int64Array]: ...

    def build_stream(
        self, tokens: Int64Array, regions: UInt8Array, rows: Int64Array, pack_offsets: Int64Array, *, multiple_of: int
    ) -> packing_reference.StreamArrays: ...


def _load_core() -> tuple[_Core, Literal["compiled", "python"]]:
    try:
        return _load_extension(), "compiled"
    except ImportError as error:  # no compiler at install time: slower, same answer
        if os.environ.get("MEGATRON_TROPD_REQUIRE_COMPILED", "0") not in ("", "0"):
            raise ImportError(
                f"MEGATRON_TROPD_REQUIRE_COMPILED is set, but the extension megatron_tropd._C cannot be imported "
                f"({error}). Build it with `pip install -e . --no-build-isolation` or, in a checkout, `python setup.py "
                f"build_ext --inplace` (needs a C++17 compiler), or unset the variable to run the slower plain twin."
            ) from error
        return packing_reference, "python"


def _load_extension() -> _Core:
    from megatron_tropd import _C

    built = getattr(_C, "INTERFACE", 1)
    if built != _INTERFACE:
        stale = f"it was built from other sources: interface {built}, not {_INTERFACE}"
        _log.warning("megatron_tropd._C is not used, %s. Packing runs in plain Python until it is built again.", stale)
        raise ImportError(stale)
    return _C


_CORE, _BACKEND = _load_core()


def backend() -> Literal["compiled", "python"]:
    """Say which twin ``pack`` runs."""
    return _BACKEND


class _Stream(NamedTuple):
    """All packs, one after the other, and where each begins."""

    token_T: Int64Array
    target_T: Int64Array
    position_T: Int64Array
    region_T: UInt8Array
    sequence_T: Int64Array
    cu_seqlens: npt.NDArray[np.int32]
    num_valid: Int64Array
    token_offsets: Int64Array
    cu_offsets: Int64Array


def pack(
    sequences: Sequence[Rollout],
    *,
    max_tokens: int,
    multiple_of: int = 1,
    num_replicas: int = 1,
    linear_work: int = LINEAR_WORK,
    share_prefixes: bool = False,
) -> list[list[Pack]]:
    """Pack ``sequences`` and assign the packs to replicas: the outer list has one entry per replica.

    Deterministic, and independent of the order of ``sequences``: ties are broken by sequence id. Within a replica the
    packs come with most work first (a run that cannot fit fails on its first pack), so form minibatches before
    packing, not by cutting this list. With too few sequences to go round, the missing packs are ``multiple_of`` tokens
    of padding with ``num_valid`` 0. The arrays of all packs are views of shared buffers.

    Args:
        sequences: at least one; read are ``token_ids``, ``region_L`` and ``sequence_id``.
        max_tokens: budget of a pack, rounded down to a multiple of ``multiple_of``.
        multiple_of: every pack's length is rounded up to a multiple of this (tensor and context parallel sizes).
        num_replicas: data-parallel replicas that work in step.
        linear_work: cost of a token relative to one unit of L**2; 12 x hidden size fits a dense transformer.
        share_prefixes: make forests: ``max_tokens`` then limits the rows of a pack and its predictions that carry loss,
            not its tokens; packs come with most work first but for what sequences share across bundles.

    Raises:
        DataError: a sequence is empty, too long for a pack, of a wrong dtype, has negative or duplicate ids or regions
            that do not fit it (``types.Region``); or an argument is out of range.
    """
    return pack_flat(
        flatten(sequences),
        max_tokens=max_tokens,
        multiple_of=multiple_of,
        num_replicas=num_replicas,
        linear_work=linear_work,
        share_prefixes=share_prefixes,
    )


def pack_flat(
    flat: FlatSequences,
    *,
    max_tokens: int,
    multiple_of: int = 1,
    num_replicas: int = 1,
    linear_work: int = LINEAR_WORK,
    share_prefixes: bool = False,
) -> list[list[Pack]]:
    """Pack sequences as ``pack`` does that already lie in flat arrays. Arguments, result and errors as there."""
    capacity = check_budget(
        max_tokens=max_tokens, multiple_of=multiple_of, num_replicas=num_replicas, linear_work=linear_work
    )
    flat = as_int64(flat)
    check_sequences(flat, capacity=capacity, linear_work=linear_work, max_tokens=max_tokens)
    assign = _assign_forests if share_prefixes else _assign_streams
    order, pack_offsets = assign(flat, capacity=capacity, num_replicas=num_replicas, linear_work=linear_work)
    packs = pack_in_order(flat, order, pack_offsets, multiple_of=multiple_of, share_prefixes=share_prefixes)
    share = len(packs) // num_replicas
    return [packs[replica * share : (replica + 1) * share] for replica in range(num_replicas)]


def pack_in_order(
    flat: FlatSequences, order: Int64Array, pack_offsets: Int64Array, *, multiple_of: int, share_prefixes: bool
) -> list[Pack]:
    """Build packs of which it is known who goes where: pack p has ``order[pack_offsets[p]:pack_offsets[p + 1]]``.

    With ``share_prefixes`` a sequence shares rows with the one before it, so that in the order of their trie equal
    histories are one row, and in any other order some are computed again.
    """
    check_boundaries(_sums(flat.lengths[order], pack_offsets))
    starts = np.cumsum(flat.lengths) - flat.lengths
    table = (starts, flat.lengths, flat.sequence_ids)
    rows = np.stack([column[order] for column in table], axis=1)
    stream = _Stream(*_CORE.build_stream(flat.tokens, flat.regions, rows, pack_offsets, multiple_of=multiple_of))
    packs = _cut(stream, sequence_ids=flat.sequence_ids[order], pack_offsets=pack_offsets)
    if share_prefixes:
        lengths = flat.lengths[order]
        found = _CORE.find_rows(stream.token_T, lengths, pack_offsets, stream.token_offsets)
        packs = _with_rows(packs, *found, tokens_P=_sums(lengths, pack_offsets), multiple_of=multiple_of)
    return packs


def _assign_streams(
    flat: FlatSequences, *, capacity: int, num_replicas: int, linear_work: int
) -> tuple[Int64Array, Int64Array]:
    """Return the order of the sequences, and where in it each pack begins."""
    return _CORE.assign_packs(
        flat.lengths, flat.sequence_ids, capacity=capacity, num_replicas=num_replicas, linear_work=linear_work
    )


def _assign_forests(
    flat: FlatSequences, *, capacity: int, num_replicas: int, linear_work: int
) -> tuple[Int64Array, Int64Array]:
    """Return the same for packs whose sequences stand in the order of their trie."""
    order, common = _CORE.trie_order(flat.tokens, flat.lengths, flat.sequence_ids)
    carries = np.isin(flat.regions, LOSS_REGIONS).astype(np.int64)
    valid = np.add.reduceat(carries, np.cumsum(flat.lengths) - flat.lengths)
    trie = Trie(length_S=flat.lengths[order], common_S=common, valid_S=valid[order], linear_work=linear_work)
    best: tuple[int, Int64Array] | None = None  # the heaviest replica's work, and the pack of every sequence
    num_packs = 0
    for bundles in _candidates(trie, capacity=capacity, num_replicas=num_replicas):
        ids = flat.sequence_ids[order[bundles.offsets[:-1]]]
        items, offsets = _CORE.assign_items(
            bundles.size, bundles.work, ids, capacity=capacity, num_replicas=num_replicas
        )
        load = int(_sums(bundles.work[items], offsets).reshape(num_replicas, -1).sum(axis=1).max())
        pack_of_bundle = np.empty(len(items), np.int64)
        pack_of_bundle[items] = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        pack_S = np.repeat(pack_of_bundle, np.diff(bundles.offsets))
        if best is None or load < best[0]:
            num_packs, best = len(offsets) - 1, (load, pack_S)
    assert best is not None
    members = np.bincount(best[1], minlength=num_packs).astype(np.int64)
    return order[np.argsort(best[1], kind="stable")], np.concatenate([[0], np.cumsum(members)])


def _candidates(trie: Trie, *, capacity: int, num_replicas: int) -> Iterator[Bundles]:
    """Yield ways to bundle; the one whose heaviest replica has least work is taken.

    Where there are few bundles to a replica, whole ones may leave replicas idle: then halves, parts and single
    sequences are tried, which compute again what they share.
    """
    offsets = join_prefixes(trie, capacity=capacity)
    whole = bundles_of(trie, offsets)
    yield whole
    if num_replicas == 1 or len(whole.size) >= _ENOUGH_BUNDLES * num_replicas:
        return
    share = -(-int(whole.work.sum()) // num_replicas)
    for most_work in (share, -(-share // 2)):
        yield bundles_of(trie, split_evenly(trie, offsets, most_work=most_work))
    yield bundles_of(trie, np.arange(len(trie.length_S) + 1))


def _with_rows(
    packs: Sequence[Pack], row: Int64Array, num_rows: Int64Array, *, tokens_P: Int64Array, multiple_of: int
) -> list[Pack]:
    """Give every pack that shares anything its map from tokens to rows."""
    found, start = [], 0
    for one, rows, tokens in zip(packs, num_rows.tolist(), tokens_P.tolist(), strict=True):
        end = start + len(one.token_T)
        padded = max(-(-rows // multiple_of), 1) * multiple_of
        found.append(one if rows == tokens else replace(one, row_T=row[start:end], num_rows=padded))
        start = end
    return found


def _sums(values: Int64Array, offsets: Int64Array) -> Int64Array:
    """Sum up each stretch, which may be empty."""
    return np.diff(np.concatenate([[0], np.cumsum(values)])[offsets])


def pack_work(pack: Pack, *, linear_work: int = LINEAR_WORK) -> int:
    """Compute the work of a pack for the balancing: the sum of ``L * (linear_work + L)`` over its sequences, of which
    what they share counts once."""
    lengths = np.diff(pack.cu_seqlens)[: len(pack.sequence_ids)].astype(np.int64)
    shared = shared_lengths(pack)
    return int(((lengths - shared) * linear_work + lengths**2 - shared**2).sum())


def shared_lengths(pack: Pack) -> Int64Array:
    """Count, for each sequence, the tokens with which it begins that an earlier one of the pack has already."""
    if pack.row_T is None:
        return np.zeros(len(pack.sequence_ids), np.int64)
    most = np.maximum.accumulate(np.concatenate([[-1], pack.row_T]))[:-1]
    again = (pack.row_T <= most) & (pack.row_T >= 0)
    return _sums(again.astype(np.int64), pack.cu_seqlens[: len(pack.sequence_ids) + 1].astype(np.int64))


def _cut(stream: _Stream, *, sequence_ids: Int64Array, pack_offsets: Int64Array) -> list[Pack]:
    tokens, boundaries, ids = stream.token_offsets.tolist(), stream.cu_offsets.tolist(), pack_offsets.tolist()
    packs = []
    for p, num_valid in enumerate(stream.num_valid.tolist()):
        here = slice(tokens[p], tokens[p + 1])
        packs.append(
            Pack(
                token_T=stream.token_T[here],
                target_T=stream.target_T[here],
                position_T=stream.position_T[here],
                region_T=stream.region_T[here],
                sequence_T=stream.sequence_T[here],
                cu_seqlens=stream.cu_seqlens[boundaries[p] : boundaries[p + 1]],
                sequence_ids=sequence_ids[ids[p] : ids[p + 1]],
                num_valid=num_valid,
            )
        )
    return packs
