"""Names and buckets of what the sampler's log-probs differ by from the trainer's."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

MEAN, LARGEST = "logprob_gap_mean", "logprob_gap_max"
# a bucket of positions in the sequence starts at each; the last has no end
STARTS = (0, 64, 256, 1024, 4096, 16384)
BUCKETS = (*(f"{start}-{end - 1}" for start, end in pairwise(STARTS)), f"{STARTS[-1]}+")


def bucket_of(position_T: Tensor) -> Tensor:
    """Return the index into ``BUCKETS`` of each position; ``[T]``."""
    return torch.bucketize(position_T, position_T.new_tensor(STARTS[1:]), right=True)
