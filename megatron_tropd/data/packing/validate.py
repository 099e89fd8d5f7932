"""Gather sequences into flat arrays for the packer, and refuse what cannot be packed, before work is lost."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from megatron_tropd.errors import DataError
from megatron_tropd.types import Int64Array, Region, Rollout, UInt8Array


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatSequences:
    """Sequences as four integer arrays: what ``pack_flat`` takes, and the quickest way in.

    Sequence s owns ``lengths[s]`` of the ``tokens`` and of the ``regions``, which follow each other without gaps.
    """

    tokens: Int64Array  # [sum of lengths]
    regions: UInt8Array  # [sum of lengths] Region of every token
    lengths: Int64Array  # [S] >= 1
    sequence_ids: Int64Array  # [S] distinct, >= 0


def flatten(sequences: Sequence[Rollout]) -> FlatSequences:
    """Gather rollouts into flat arrays; refuse what is not a 1-d integer array or an integer, regions that are not
    uint8, and any other number of them than there are tokens."""
    if len(sequences) == 0:
        raise DataError("There are no sequences to pack. Check that the sampler returned any, or skip the step.")
    token_ids = [np.asarray(sequence.token_ids) for sequence in sequences]
    if any(ids.ndim != 1 or (ids.dtype.kind not in "iu" and ids.size > 0) for ids in token_ids):
        _reject_token_ids(sequences, token_ids)
    regions = [np.asarray(sequence.region_L) for sequence in sequences]
    if any(
        region_L.dtype != np.uint8 or region_L.shape != ids.shape
        for region_L, ids in zip(regions, token_ids, strict=True)
    ):
        _reject_regions(sequences, token_ids, regions)
    return FlatSequences(
        # Integers only by now; a uint64 beyond int64 turns negative and is refused as such.
        tokens=np.concatenate(token_ids, dtype=np.int64, casting="unsafe"),
        regions=np.concatenate(regions),
        lengths=np.fromiter(map(len, token_ids), dtype=np.int64, count=len(token_ids)),
        sequence_ids=_column("sequence_id", (sequence.sequence_id for sequence in sequences)),
    )


def _reject_token_ids(sequences: Sequence[Rollout], token_ids: Sequence[npt.NDArray[np.generic]]) -> NoReturn:
    for sequence, ids in zip(sequences, token_ids, strict=True):
        if ids.ndim != 1 or (ids.dtype.kind not in "iu" and ids.size > 0):
            raise DataError(
                f"token_ids of sequence {sequence.sequence_id} is a {ids.ndim}-d array of {ids.dtype}. "
                f"Pass a 1-d array of integers."
            )
    raise AssertionError("called without an offender")


def _reject_regions(
    sequences: Sequence[Rollout],
    token_ids: Sequence[npt.NDArray[np.generic]],
    regions: Sequence[npt.NDArray[np.generic]],
) -> NoReturn:
    for sequence, ids, region_L in zip(sequences, token_ids, regions, strict=True):
        if region_L.dtype != np.uint8 or region_L.shape != ids.shape:
            raise DataError(
                f"region_L of sequence {sequence.sequence_id} is an array of {region_L.dtype} of shape "
                f"{region_L.shape} for {len(ids)} tokens. Pass one uint8 (types.Region) per token."
            )
    raise AssertionError("called without an offender")


def _column(name: str, values: Iterable[int]) -> Int64Array:
    listed = list(values)
    for kind in set(map(type, listed)):
        if not issubclass(kind, int | np.integer) or issubclass(kind, bool):
            offender = next(value for value in listed if type(value) is kind)
            raise DataError(f"{name} has the value {offender!r} of type {kind.__name__}. Pass integers.")
    return _int64(name, np.array(listed))


def as_int64(flat: FlatSequences) -> FlatSequences:
    """Return the same arrays as contiguous int64, and regions as contiguous uint8, which the compiled twin insists on.

    Refuse floats and booleans, and regions of any other type.
    """
    if np.ndim(flat.regions) != 1 or np.asarray(flat.regions).dtype != np.uint8:
        found = np.asarray(flat.regions)
        raise DataError(f"regions is a {found.ndim}-d array of {found.dtype}. Pass a 1-d array of uint8.")
    return FlatSequences(
        tokens=_int64("tokens", flat.tokens),
        regions=np.ascontiguousarray(flat.regions),
        lengths=_int64("lengths", flat.lengths),
        sequence_ids=_int64("sequence_ids", flat.sequence_ids),
    )


def _int64(name: str, array: npt.ArrayLike) -> Int64Array:
    values = np.asarray(array)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise DataError(f"{name} is a {values.ndim}-d array of {values.dtype}. Pass a 1-d array of integers.")
    return np.ascontiguousarray(values, dtype=np.int64)


def check_budget(*, max_tokens: int, multiple_of: int, num_replicas: int, linear_work: int) -> int:
    """Check the arguments of ``pack`` and return the capacity of a pack in tokens."""
    for name, value, least in (
        ("max_tokens", max_tokens, 1),
        ("multiple_of", multiple_of, 1),
        ("num_replicas", num_replicas, 1),
        ("linear_work", linear_work, 0),
    ):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
            raise DataError(f"{name} is {value!r}. Pass an integer of at least {least}.")
    capacity = int(max_tokens) // int(multiple_of) * int(multiple_of)
    if capacity == 0:
        raise DataError(
            f"max_tokens={max_tokens} is below multiple_of={multiple_of}: no pack could hold a token. "
            f"Raise max_tokens to {multiple_of} or more."
        )
    if capacity > np.iinfo(np.int32).max:
        raise DataError(f"max_tokens={max_tokens} does not fit the 32-bit cu_seqlens. Lower it below 2**31.")
    return capacity


def check_boundaries(tokens_P: Int64Array) -> None:
    """Refuse packs whose tokens 32-bit boundaries cannot count: rows have a budget, their tokens need not."""
    if int(tokens_P.max()) > np.iinfo(np.int32).max:
        raise DataError(
            f"a pack has {int(tokens_P.max())} tokens that share rows, more than 32-bit cu_seqlens can count. Lower "
            "max_tokens (train.pack_tokens), or pack without sharing (train.share_prefixes)."
        )


def check_sequences(flat: FlatSequences, *, capacity: int, linear_work: int, max_tokens: int) -> None:
    """Refuse, by name of the first offender, every sequence that cannot be packed. Vectorized over sequences."""
    _check_shapes(flat)
    _refuse(flat.lengths < 1, flat, "is empty", "Drop it before packing.")
    _refuse(
        flat.lengths > capacity,
        flat,
        f"has {{length}} tokens, but a pack holds {capacity} (max_tokens={max_tokens}, rounded down to multiple_of)",
        "Raise max_tokens (train.pack_tokens), or lower the limits on prompt and response length.",
    )
    _refuse(flat.sequence_ids < 0, flat, "has a negative id; -1 marks padding", "Number sequences from 0.")
    for name, count in (("tokens", len(flat.tokens)), ("regions", len(flat.regions))):
        if int(flat.lengths.sum()) != count:
            raise DataError(
                f"lengths add up to {int(flat.lengths.sum())}, but there are {count} {name}. Make them agree."
            )
    _check_token_ids(flat)
    check_regions(flat.regions, flat.lengths, flat.sequence_ids)
    _check_distinct(flat.sequence_ids)
    # Sums of work, doubled for comparisons, are computed in 64-bit integers.
    if len(flat.tokens) * (int(linear_work) + int(flat.lengths.max())) >= 2**61:
        raise DataError(f"linear_work={linear_work} is too large for {len(flat.tokens)} tokens. Lower it.")


def _check_shapes(flat: FlatSequences) -> None:
    sizes = {name: len(getattr(flat, name)) for name in ("lengths", "sequence_ids")}
    if len(set(sizes.values())) != 1 or sizes["lengths"] == 0:
        raise DataError(f"The per-sequence arrays have {sizes} entries. Pass equally many, and at least one.")


def _refuse(bad_S: npt.NDArray[np.bool_], flat: FlatSequences, problem: str, fix: str) -> None:
    """Refuse the marked sequences: name the first and count the others."""
    if not bad_S.any():
        return
    first = int(bad_S.argmax())
    problem = problem.format(length=flat.lengths[first])
    others = int(bad_S.sum()) - 1
    raise DataError(f"Sequence {flat.sequence_ids[first]} {problem}{f' (and {others} more)' if others else ''}. {fix}")


def _check_token_ids(flat: FlatSequences) -> None:
    if flat.tokens.min() >= 0:
        return
    at = int((flat.tokens < 0).argmax())
    first, _ = _place(flat.lengths, at)
    raise DataError(
        f"Sequence {flat.sequence_ids[first]} holds the negative token id {flat.tokens[at]}. "
        f"Remove padding and ignore markers before packing."
    )


def _place(length_S: Int64Array, at: int) -> tuple[int, int]:
    """Return the sequence that token ``at`` of all is in, and its number there."""
    end_S = np.cumsum(length_S)
    sequence = int(np.searchsorted(end_S, at, side="right"))
    return sequence, at - int(end_S[sequence] - length_S[sequence])


def check_regions(regions: UInt8Array, length_S: Int64Array, sequence_ids: Int64Array) -> None:
    """Refuse what ``types.Region`` does not allow: PAD, other numbers, a PROMPT that is not what begins a sequence.

    Args:
        regions: of all tokens of all sequences, one after the other.

    Raises:
        DataError: for the first such token.
    """
    begins = np.zeros(len(regions), np.bool_)
    begins[np.cumsum(length_S) - length_S] = True
    is_prompt = regions == Region.PROMPT
    returns = is_prompt & ~begins
    returns[1:] &= ~is_prompt[:-1]
    # beyond OBSERVATION there are none
    for bad, problem in (
        ((regions == Region.PAD) | (regions > Region.OBSERVATION), "which no token of a sequence has"),
        (begins & ~is_prompt, "but nothing comes before it that could predict it: a sequence begins with PROMPT"),
        (returns, "after tokens that are not: what comes later and neither model wrote is OBSERVATION"),
    ):
        if bad.any():
            sequence, number = _place(length_S, int(bad.argmax()))
            value = int(regions[bad.argmax()])
            name = {region.value: region.name for region in Region}.get(value, "unknown")
            raise DataError(
                f"Token {number} of sequence {sequence_ids[sequence]} has region {value} ({name}), {problem} "
                f"({int(bad.sum())} such tokens in all). Regions: PROMPT first, then PREFIX, CONTINUATION and "
                "OBSERVATION in any order (types.Region)."
            )


def _check_distinct(sequence_ids: Int64Array) -> None:
    sorted_ids = np.sort(sequence_ids)
    repeated = sorted_ids[1:][sorted_ids[1:] == sorted_ids[:-1]]
    if len(repeated) > 0:
        raise DataError(
            f"Sequence id {repeated[0]} occurs more than once ({len(repeated)} repetitions in all). "
            f"Ids key a sequence's random numbers: make them unique within the step."
        )
