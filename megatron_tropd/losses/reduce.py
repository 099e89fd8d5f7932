"""From per-token losses to one number: weights, kept tokens and quantiles of a whole global batch, on the host.

The engine computes ``sum(weight * loss) / sum(weight)`` with both sums global. Everything here must therefore be called
with the tokens of *all* packs of the (mini)batch, on all replicas, concatenated in any order.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_tropd.errors import ConfigError
from megatron_tropd.types import Float32Array, Int64Array, Region

Normalization = Literal["token", "sequence", "region"]
NORMALIZATIONS: tuple[Normalization, ...] = ("token", "sequence", "region")

BoolArray = npt.NDArray[np.bool_]


def valid_mask(region_T: npt.NDArray[np.integer]) -> BoolArray:
    """Mark where a prediction carries loss: PREFIX and CONTINUATION."""
    return np.isin(region_T, (Region.PREFIX, Region.CONTINUATION))


def token_weights(
    region_T: npt.NDArray[np.integer],
    sequence_T: Int64Array,
    *,
    normalization: Normalization = "token",
    keep_T: BoolArray | None = None,
) -> Float32Array:
    """Return the weight of every token's loss; sums to N, the number of valid and kept tokens, so that the loss is
    their sum / N.

    token: 1 each. sequence: the mean over sequences of the mean over each sequence's tokens, ``N / (S n_s)``.
    region: the mean over the regions present of each region's mean, ``N / (R n_r)``.

    Args:
        region_T: Region of every prediction of the global batch.
        sequence_T: sequence id, unique within the batch; -1 for padding.
        normalization: which mean.
        keep_T: False removes a valid token from the loss and from the counts (special tokens); None keeps all.

    Raises:
        ConfigError: unknown normalization.
    """
    valid_T = valid_mask(region_T) if keep_T is None else valid_mask(region_T) & keep_T
    weight_T = np.zeros(len(region_T), dtype=np.float32)
    match normalization:
        case "token":
            weight_T[valid_T] = 1.0
            return weight_T
        case "sequence":
            group_N = sequence_T[valid_T]
        case "region":
            group_N = region_T[valid_T].astype(np.int64)
        case _:
            raise ConfigError(f"normalization={normalization!r} must be one of {', '.join(NORMALIZATIONS)}.")
    _, index_N, count_G = np.unique(group_N, return_inverse=True, return_counts=True)
    weight_T[valid_T] = len(group_N) / (len(count_G) * count_G[index_N])
    return weight_T


def special_token_keep(
    target_T: Int64Array,
    sequence_T: Int64Array,
    region_T: npt.NDArray[np.integer],
    *,
    special_ids: Iterable[int],
    first_only: bool = False,
) -> BoolArray:
    """Mask special tokens: False on their valid predictions, True everywhere else.

    With ``first_only`` each special id loses only its first valid occurrence in each sequence (stream order).
    Source: local support matching, arXiv 2603.25562.
    """
    special_T = valid_mask(region_T) & np.isin(target_T, np.fromiter(special_ids, dtype=np.int64))
    if not first_only:
        return ~special_T
    hit_N = np.flatnonzero(special_T)
    pairs_N2 = np.stack((sequence_T[hit_N], target_T[hit_N]), axis=-1)
    _, first_M = np.unique(pairs_N2, axis=0, return_index=True)
    keep_T = np.ones(len(target_T), dtype=np.bool_)
    keep_T[hit_N[first_M]] = False
    return keep_T


def entropy_threshold(entropy_N: Float32Array, *, fraction: float) -> float:
    """Find the entropy (nats) above which a share ``fraction`` of the tokens lies; 0 for an empty batch.

    The threshold is itself one of the values, so the answer does not depend on interpolation or token order.
    """
    if not 0.0 < fraction < 1.0:
        raise ConfigError(f"entropy fraction {fraction} must lie in (0, 1).")
    if len(entropy_N) == 0:
        return 0.0
    above = min(round(fraction * len(entropy_N)), len(entropy_N) - 1)
    return float(np.partition(entropy_N, len(entropy_N) - 1 - above)[len(entropy_N) - 1 - above])
