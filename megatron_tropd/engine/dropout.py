"""Dropout of what enters an adapter: which numbers are dropped follows from the token's history, not from the layout.

A mask is a hash of the run's seed, the update, the tokens up to the row, the matrix and the column. So rows that are
computed once for several tokens, other packs, and other layouts drop the same, and recomputing a layer needs no state
of a generator.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from megatron_tropd.engine.rows import computed_rows, row_of
from megatron_tropd.types import Int64Array, Pack

# SplitMix64 (Steele, Lea, Flood 2014)
_STEP, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_BITS = 53  # of a hash that are compared with the share to drop
_STRIP = 1 << 24  # hashes that are in memory at a time


def row_histories(pack: Pack) -> Int64Array:
    """Return ``[R]`` a hash of the tokens up to each row that a model computes for the pack; padding's say nothing."""
    with np.errstate(over="ignore"):
        token_T = pack.token_T.astype(np.uint64) << np.uint64(32) | pack.position_T.astype(np.uint64)
        sum_T = np.cumsum(_mix_array(token_T), dtype=np.uint64)
        starts = pack.cu_seqlens[:-1].astype(np.int64)
        before = np.where(starts > 0, sum_T[starts - 1], np.uint64(0))
        history_T = _mix_array(sum_T - np.repeat(before, np.diff(pack.cu_seqlens)))
    history_R = np.zeros(computed_rows(pack), np.uint64)
    row_T = row_of(pack)
    history_R[row_T[row_T >= 0]] = history_T[row_T >= 0]
    return history_R.view(np.int64)


def _mix_array(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(_STEP)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(_FIRST)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(_SECOND)
    mixed: np.ndarray = x ^ (x >> np.uint64(31))
    return mixed


def key_of(*parts: object) -> int:
    """Return a key, 64 bits with a sign, that stands for these parts."""
    digest = hashlib.sha256(" ".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)


@torch.no_grad()
def kept(history_r: Tensor, key: int, columns: range, share: float) -> Tensor:
    """Return ``[r, columns]`` bool: what is not dropped. Each number is dropped with probability ``share``."""
    least = int(share * 2**_BITS)
    row_r = _mix(history_r ^ key)
    column_c = torch.arange(columns.start, columns.stop, device=history_r.device) * _signed(_STEP)
    strips = row_r.split(max(_STRIP // len(columns), 1))
    return torch.cat([_top_bits(_mix(strip[:, None] + column_c)) >= least for strip in strips])


def _mix(x: Tensor) -> Tensor:
    """Hash int64, as SplitMix64 does its unsigned numbers; products wrap."""
    x = x + _signed(_STEP)
    x = (x ^ _shifted(x, 30)) * _signed(_FIRST)
    x = (x ^ _shifted(x, 27)) * _signed(_SECOND)
    return x ^ _shifted(x, 31)


def _top_bits(x: Tensor) -> Tensor:
    return _shifted(x, 64 - _BITS)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift right, zeros coming in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >= 1 << 63 else x
