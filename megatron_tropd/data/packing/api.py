"""Pack whole sequences into fixed-budget streams and assign them to replicas.

Every replica gets the same number of packs and nearly the same work, where a sequence of L tokens costs
``L * (linear_work + L)``: what every token costs in the matrix products, plus attention. Packs hold as many sequences
as fit (best-fit decreasing), but never stay fuller than the number of packs demands: what room the rounding to
``num_replicas`` leaves is spread over all of them.

The loops run compiled (``megatron_tropd._C``) when the extension was built, and plain otherwise, with the same
result; ``backend()`` says which. ``MEGATRON_TROPD_REQUIRE_COMPILED=1`` makes a missing extension an ImportError.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from megatron_tropd.data.packing import reference as packing_reference
from megatron_tropd.data.packing.validate import FlatSequences, as_int64, check_budget, check_sequences, flatten
from megatron_tropd.types import Int64Array, Pack, Rollout, UInt8Array

# A transformer layer of hidden size D spends about 24 D**2 operations per token in matrix products and 2 D L**2 per
# sequence in causal attention, so a token weighs 12 D times a unit of L**2. This is D = 2048.
LINEAR_WORK = 12 * 2048

_INTERFACE = 2  # of csrc/bindings.cpp
_log = logging.getLogger(__name__)

__all__ = ["LINEAR_WORK", "FlatSequences", "backend", "pack", "pack_flat", "pack_work"]


class _Core(Protocol):
    """The functions that both twins offer."""

    def assign_packs(
        self, lengths: Int64Array, sequence_ids: Int64Array, *, capacity: int, num_replicas: int, linear_work: int
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
    )


def pack_flat(
    flat: FlatSequences,
    *,
    max_tokens: int,
    multiple_of: int = 1,
    num_replicas: int = 1,
    linear_work: int = LINEAR_WORK,
) -> list[list[Pack]]:
    """Pack sequences as ``pack`` does that already lie in flat arrays. Arguments, result and errors as there."""
    capacity = check_budget(
        max_tokens=max_tokens, multiple_of=multiple_of, num_replicas=num_replicas, linear_work=linear_work
    )
    flat = as_int64(flat)
    check_sequences(flat, capacity=capacity, linear_work=linear_work, max_tokens=max_tokens)
    order, pack_offsets = _CORE.assign_packs(
        flat.lengths, flat.sequence_ids, capacity=capacity, num_replicas=num_replicas, linear_work=linear_work
    )
    starts = np.cumsum(flat.lengths) - flat.lengths
    table = (starts, flat.lengths, flat.sequence_ids)
    rows = np.stack([column[order] for column in table], axis=1)
    stream = _Stream(*_CORE.build_stream(flat.tokens, flat.regions, rows, pack_offsets, multiple_of=multiple_of))
    packs = _cut(stream, sequence_ids=flat.sequence_ids[order], pack_offsets=pack_offsets)
    share = len(packs) // num_replicas
    return [packs[replica * share : (replica + 1) * share] for replica in range(num_replicas)]


def pack_work(pack: Pack, *, linear_work: int = LINEAR_WORK) -> int:
    """Compute the work of a pack for the balancing: the sum of ``L * (linear_work + L)`` over its sequences."""
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
