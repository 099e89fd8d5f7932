"""Counter-based random numbers: the same draw for the same token under every layout, rank and batch split."""

from __future__ import annotations

from enum import IntEnum

import numpy as np

from megatron_tropd.types import Float32Array


class Stream(IntEnum):
    """Independent uses of randomness for one sequence."""

    SAMPLING = 0
    GATE = 1


def uniforms(*, seed: int, step: int, sequence_id: int, stream: Stream, count: int) -> Float32Array:
    """Draw ``[count]`` numbers in [0, 1), a pure function of the arguments (Philox keyed by seed, step and sequence).

    Element ``i`` does not depend on ``count``, so a longer budget keeps the draws of a shorter one.
    """
    key = [seed & 0xFFFFFFFFFFFFFFFF, (step << 32 | sequence_id) & 0xFFFFFFFFFFFFFFFF]
    generator = np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, int(stream)]))
    return generator.random(count, dtype=np.float32)
