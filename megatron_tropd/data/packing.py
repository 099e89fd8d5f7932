"""Packs whole sequences into fixed-budget streams and deals them to replicas.

Every replica gets the same number of packs and nearly the same work, where a sequence of L tokens costs
``L * (linear_work + L)``: what every token costs in the matrix products, plus attention. Packs hold as many sequences
as fit (best-fit decreasing), but never stay fuller than the number of packs demands: what room the rounding to
``num_replicas`` leaves is spread over all of them.

The loops run compiled (``megatron_tropd._C``) when the extension was built, and plain otherwise, with the same
result; ``backend()`` says which. ``MEGATRON_TROPD_REQUIRE_COMPILED=1`` makes a missing extension an ImportError.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, NoReturn, Protocol

import numpy as np
import numpy.typing as npt

from megatron_tropd.data import packing_reference
from megatron_tropd.errors import DataError
from megatron_tropd.types import Int64Array, Pack, Rollout

# A transformer layer of hidden size D spends about 24 D**2 operations per token in matrix products and 2 D L**2 per
# sequence in causal attention, so a token weighs 12 D times a unit of L**2. This is D = 2048.
LINEAR_WORK = 12 * 2048


class _Core(Protocol):
    """What both twins offer."""

    def assign_packs(
        self, lengths: Int64Array, sequence_ids: Int64Array, *, capacity: int, num_replicas: int, linear_work: int
    ) -> tuple[Int64Array, Int64Array]: ...

    def build_stream(
        self, tokens: Int64Array, rows: Int64Array, pack_offsets: Int64Array, *, multiple_of: int
    ) -> packing_reference.StreamArrays: ...


def _load_core() -> tuple[_Core, Literal["compiled", "python"]]:
    try:
        from megatron_tropd import _C
    except ImportError as error:  # no compiler at install time: slower, same answer
        if os.environ.get("MEGATRON_TROPD_REQUIRE_COMPILED", "0") not in ("", "0"):
            raise ImportError(
                f"MEGATRON_TROPD_REQUIRE_COMPILED is set, but the extension megatron_tropd._C cannot be imported "
                f"({error}). Build it with `pip install -e . --no-build-isolation` (needs a C++17 compiler), or unset "
                f"the variable to run the slower plain twin."
            ) from error
        return packing_reference, "python"
    return _C, "compiled"


_CORE, _BACKEND = _load_core()


def backend() -> Literal["compiled", "python"]:
    """Which twin ``pack`` runs."""
    return _BACKEND


@dataclass(frozen=True, slots=True, kw_only=True)
class FlatSequences:
    """Sequences as five integer arrays: what ``pack_flat`` takes, and the quickest way in.

    Sequence s owns ``lengths[s]`` of the ``tokens``, which follow each other without gaps.
    """

    tokens: Int64Array  # [sum of lengths]
    lengths: Int64Array  # [S] prompt + prefix + continuation, >= 1
    prompt_lengths: Int64Array  # [S] >= 1
    prefix_lengths: Int64Array  # [S] >= 0
    sequence_ids: Int64Array  # [S] distinct, >= 0


class _Stream(NamedTuple):
    """All packs, one after the other, and where each begins."""

    token_T: Int64Array
    target_T: Int64Array
    position_T: Int64Array
    region_T: npt.NDArray[np.uint8]
    sequence_T: Int64Array
    cu_seqlens: npt.NDArray[np.int32]
    num_valid: Int64Array
    token_offsets: Int64Array
    cu_offsets: Int64Array


# --------------------------------------------------------------------------- the door


def pack(
    sequences: Sequence[Rollout],
    *,
    max_tokens: int,
    multiple_of: int = 1,
    num_replicas: int = 1,
    linear_work: int = LINEAR_WORK,
) -> list[list[Pack]]:
    """Packs ``sequences`` and deals the packs to replicas: the outer list has one entry per replica.

    Deterministic, and independent of the order of ``sequences``: ties are broken by sequence id. Within a replica the
    packs come with most work first (a run that cannot fit fails on its first pack), so form minibatches before
    packing, not by cutting this list. With too few sequences to go round, the missing packs are ``multiple_of`` tokens
    of padding with ``num_valid`` 0. The arrays of all packs are views of shared buffers.

    Args:
        sequences: at least one; read are ``token_ids``, ``prompt_length``, ``prefix_length`` and ``sequence_id``.
        max_tokens: budget of a pack, rounded down to a multiple of ``multiple_of``.
        multiple_of: every pack's length is rounded up to a multiple of this (tensor and context parallel sizes).
        num_replicas: data-parallel replicas that work in step.
        linear_work: cost of a token relative to one unit of L**2; 12 x hidden size fits a dense transformer.

    Raises:
        DataError: a sequence is empty, too long for a pack, of a wrong dtype, has negative or duplicate ids or regions
            that do not fit it; or an argument is out of range.
    """
    return pack_flat(
        _flatten(sequences),
        max_tokens=max_tokens,
        multiple_of=multiple_of,
        num_replicas=num_replicas,
        linear_work=linear_work,
    )


def pack_flat(
    flat: FlatSequences,
    *,
    max_tokens: int,
    multiple_of: int = 1,
    num_replicas: int = 1,
    linear_work: int = LINEAR_WORK,
) -> list[list[Pack]]:
    """``pack`` for sequences that already lie in flat arrays. Arguments, result and errors as there."""
    capacity = _check_budget(
        max_tokens=max_tokens, multiple_of=multiple_of, num_replicas=num_replicas, linear_work=linear_work
    )
    flat = _as_int64(flat)
    _check_sequences(flat, capacity=capacity, linear_work=linear_work, max_tokens=max_tokens)
    order, pack_offsets = _CORE.assign_packs(
        flat.lengths, flat.sequence_ids, capacity=capacity, num_replicas=num_replicas, linear_work=linear_work
    )
    starts = np.cumsum(flat.lengths) - flat.lengths
    table = (starts, flat.lengths, flat.prompt_lengths, flat.prefix_lengths, flat.sequence_ids)
    rows = np.stack([column[order] for column in table], axis=1)
    stream = _Stream(*_CORE.build_stream(flat.tokens, rows, pack_offsets, multiple_of=multiple_of))
    packs = _cut(stream, sequence_ids=flat.sequence_ids[order], pack_offsets=pack_offsets)
    share = len(packs) // num_replicas
    return [packs[replica * share : (replica + 1) * share] for replica in range(num_replicas)]


def pack_work(pack: Pack, *, linear_work: int = LINEAR_WORK) -> int:
    """Work of a pack as the balancing counts it: the sum of ``L * (linear_work + L)`` over its sequences."""
    lengths = np.diff(pack.cu_seqlens)[: len(pack.sequence_ids)].astype(np.int64)
    return int((lengths * (linear_work + lengths)).sum())


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


# --------------------------------------------------------------------------- validation


def _flatten(sequences: Sequence[Rollout]) -> FlatSequences:
    if len(sequences) == 0:
        raise DataError("There are no sequences to pack. Check that the sampler returned any, or skip the step.")
    token_ids = [np.asarray(sequence.token_ids) for sequence in sequences]
    if any(ids.ndim != 1 or (ids.dtype.kind not in "iu" and ids.size > 0) for ids in token_ids):
        _reject_token_ids(sequences, token_ids)
    return FlatSequences(
        # Integers only by now; a uint64 beyond int64 turns negative and is refused as such.
        tokens=np.concatenate(token_ids, dtype=np.int64, casting="unsafe"),
        lengths=np.fromiter(map(len, token_ids), dtype=np.int64, count=len(token_ids)),
        prompt_lengths=_column("prompt_length", (sequence.prompt_length for sequence in sequences)),
        prefix_lengths=_column("prefix_length", (sequence.prefix_length for sequence in sequences)),
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


def _column(name: str, values: Iterable[int]) -> Int64Array:
    listed = list(values)
    wrong = {type(value) for value in listed} - {int, np.int64, np.int32}
    offender = next((kind for kind in wrong if not issubclass(kind, int | np.integer) or kind is bool), None)
    if offender is not None:
        value = next(value for value in listed if type(value) is offender)
        raise DataError(f"{name} has the value {value!r} of type {offender.__name__}. Pass integers.")
    return _int64(name, np.array(listed))


def _as_int64(flat: FlatSequences) -> FlatSequences:
    return FlatSequences(
        tokens=_int64("tokens", flat.tokens),
        lengths=_int64("lengths", flat.lengths),
        prompt_lengths=_int64("prompt_lengths", flat.prompt_lengths),
        prefix_lengths=_int64("prefix_lengths", flat.prefix_lengths),
        sequence_ids=_int64("sequence_ids", flat.sequence_ids),
    )


def _int64(name: str, array: npt.ArrayLike) -> Int64Array:
    values = np.asarray(array)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise DataError(f"{name} is a {values.ndim}-d array of {values.dtype}. Pass a 1-d array of integers.")
    return np.ascontiguousarray(values, dtype=np.int64)


def _check_budget(*, max_tokens: int, multiple_of: int, num_replicas: int, linear_work: int) -> int:
    """Returns the capacity of a pack in tokens."""
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


def _check_sequences(flat: FlatSequences, *, capacity: int, linear_work: int, max_tokens: int) -> None:
    _check_shapes(flat)
    _refuse(flat.lengths < 1, flat, "is empty", "Drop it before packing.")
    _refuse(
        flat.lengths > capacity,
        flat,
        f"has {{length}} tokens, but a pack holds {capacity} (max_tokens={max_tokens}, rounded down to multiple_of)",
        "Raise max_tokens (train.pack_tokens), or lower the limits on prompt and response length.",
    )
    _refuse(flat.sequence_ids < 0, flat, "has a negative id; -1 marks padding", "Number sequences from 0.")
    _refuse(
        (flat.prompt_lengths < 1)
        | (flat.prefix_lengths < 0)
        | (flat.prompt_lengths + flat.prefix_lengths > flat.lengths),
        flat,
        "has {length} tokens, prompt_length={prompt} and prefix_length={prefix}",
        "prompt_length >= 1, prefix_length >= 0 and prompt_length + prefix_length <= tokens must hold.",
    )
    if int(flat.lengths.sum()) != len(flat.tokens):
        raise DataError(
            f"lengths add up to {int(flat.lengths.sum())}, but there are {len(flat.tokens)} tokens. Make them agree."
        )
    _check_token_ids(flat)
    _check_distinct(flat.sequence_ids)
    # Sums of work, doubled for comparisons, are computed in 64-bit integers.
    if len(flat.tokens) * (int(linear_work) + int(flat.lengths.max())) >= 2**61:
        raise DataError(f"linear_work={linear_work} is too large for {len(flat.tokens)} tokens. Lower it.")


def _check_shapes(flat: FlatSequences) -> None:
    sizes = {name: len(getattr(flat, name)) for name in ("lengths", "prompt_lengths", "prefix_lengths", "sequence_ids")}
    if len(set(sizes.values())) != 1 or sizes["lengths"] == 0:
        raise DataError(f"The per-sequence arrays have {sizes} entries. Pass equally many, and at least one.")


def _refuse(bad_S: npt.NDArray[np.bool_], flat: FlatSequences, problem: str, fix: str) -> None:
    """Names the first offender and counts the others."""
    if not bad_S.any():
        return
    first = int(bad_S.argmax())
    problem = problem.format(
        length=flat.lengths[first], prompt=flat.prompt_lengths[first], prefix=flat.prefix_lengths[first]
    )
    others = int(bad_S.sum()) - 1
    raise DataError(f"Sequence {flat.sequence_ids[first]} {problem}{f' (and {others} more)' if others else ''}. {fix}")


def _check_token_ids(flat: FlatSequences) -> None:
    if flat.tokens.min() >= 0:
        return
    at = int((flat.tokens < 0).argmax())
    first = int(np.searchsorted(np.cumsum(flat.lengths), at, side="right"))
    raise DataError(
        f"Sequence {flat.sequence_ids[first]} holds the negative token id {flat.tokens[at]}. "
        f"Remove padding and ignore markers before packing."
    )


def _check_distinct(sequence_ids: Int64Array) -> None:
    sorted_ids = np.sort(sequence_ids)
    repeated = sorted_ids[1:][sorted_ids[1:] == sorted_ids[:-1]]
    if len(repeated) > 0:
        raise DataError(
            f"Sequence id {repeated[0]} occurs more than once ({len(repeated)} repetitions in all). "
            f"Ids key a sequence's random numbers: make them unique within the step."
        )
