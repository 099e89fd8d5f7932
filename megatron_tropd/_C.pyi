"""Compiled twins of functions of ``data.packing.reference`` and ``data.packing.forest``; same contract and numbers."""

import numpy as np
import numpy.typing as npt

_Int64Array = npt.NDArray[np.int64]

INTERFACE: int

def assign_packs(
    lengths: _Int64Array, sequence_ids: _Int64Array, *, capacity: int, num_replicas: int, linear_work: int
) -> tuple[_Int64Array, _Int64Array]: ...
def assign_items(
    sizes: _Int64Array, works: _Int64Array, ids: _Int64Array, *, capacity: int, num_replicas: int
) -> tuple[_Int64Array, _Int64Array]: ...
def trie_order(
    tokens: _Int64Array, lengths: _Int64Array, sequence_ids: _Int64Array
) -> tuple[_Int64Array, _Int64Array]: ...
def find_rows(
    tokens: _Int64Array, lengths: _Int64Array, pack_offsets: _Int64Array, token_offsets: _Int64Array
) -> tuple[_Int64Array, _Int64Array]: ...
def build_stream(
    tokens: _Int64Array,
    regions: npt.NDArray[np.uint8],
    rows: _Int64Array,
    pack_offsets: _Int64Array,
    *,
    multiple_of: int,
) -> tuple[
    _Int64Array,
    _Int64Array,
    _Int64Array,
    npt.NDArray[np.uint8],
    _Int64Array,
    npt.NDArray[np.int32],
    _Int64Array,
    _Int64Array,
    _Int64Array,
]: ...
