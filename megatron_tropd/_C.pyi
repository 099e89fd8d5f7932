"""Compiled twins of the functions in ``megatron_tropd.data.packing.reference``; same contract, same numbers."""

import numpy as np
import numpy.typing as npt

_Int64Array = npt.NDArray[np.int64]

INTERFACE: int

def assign_packs(
    lengths: _Int64Array, sequence_ids: _Int64Array, *, capacity: int, num_replicas: int, linear_work: int
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
