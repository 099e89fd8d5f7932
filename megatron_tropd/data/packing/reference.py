"""Plain twins of the compiled packer (``csrc/``): same contract, same numbers, used when no compiler was at hand.

All arithmetic is on integers and every tie is broken by a stated rule, so that two machines, or a compiled and a
plain rank of one job, arrive at the same packs. A sequence is known here by its *rank*: 0 is the longest.
Validation is the caller's (``validate.py``).
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_tropd.data.packing.forest import find_rows, trie_order
from megatron_tropd.types import LOSS_REGIONS, Int64Array, Region, UInt8Array

__all__ = ["StreamArrays", "assign_items", "assign_packs", "build_stream", "find_rows", "trie_order"]

StreamArrays = tuple[
    Int64Array,
    Int64Array,
    Int64Array,
    npt.NDArray[np.uint8],
    Int64Array,
    npt.NDArray[np.int32],
    Int64Array,
    Int64Array,
    Int64Array,
]

# Above this share of all room the even spread nearly always fails; trying it would only cost time.
_SPREAD_NUMERATOR, _SPREAD_DENOMINATOR = 31, 32
# Replicas are called equal when the heaviest and the lightest differ by less than this share of the heaviest.
_BALANCE_DENOMINATOR = 1000
_TRIALS_PER_REPLICA = 16


# --------------------------------------------------------------------------- stage one: who goes where


@dataclass(slots=True, kw_only=True)
class _Plan:
    """The packs while they are being made."""

    length: Int64Array  # [rank]
    work: Int64Array  # [rank]
    pack_of: Int64Array  # [rank]
    pack_work: Int64Array  # [pack]
    free: Int64Array  # [pack] tokens of room
    members: Int64Array  # [pack] number of sequences

    def move(self, rank: int, pack: int) -> None:
        for place, sign in ((self.pack_of[rank], -1), (pack, 1)):
            self.pack_work[place] += sign * self.work[rank]
            self.free[place] -= sign * self.length[rank]
            self.members[place] += sign
        self.pack_of[rank] = pack


def assign_packs(
    lengths: Int64Array, sequence_ids: Int64Array, *, capacity: int, num_replicas: int, linear_work: int
) -> tuple[Int64Array, Int64Array]:
    """Assign sequences to packs of at most ``capacity`` tokens, and packs to replicas, as many to each.

    Best-fit decreasing gives the number of packs, rounded up to a multiple of ``num_replicas``. With room to spare the
    sequences are then spread evenly over that many packs; otherwise the heaviest packs are split until there are
    enough. Packs are assigned in rounds, and single sequences and whole packs move until the replicas are equal.

    Args:
        lengths: [n] tokens of each sequence, 1 <= length <= capacity, n >= 1.
        sequence_ids: [n] distinct; breaks ties, so that the answer does not depend on the order of the input.
        linear_work: a sequence of L tokens costs ``L * (linear_work + L)``.

    Returns:
        ``order`` [n] and ``pack_offsets`` [P+1]: pack p holds ``order[pack_offsets[p]:pack_offsets[p+1]]`` (indices
        into the input), longest first; replica r owns packs r*P/R to (r+1)*P/R, most work first.
    """
    works = lengths * (linear_work + lengths)
    return assign_items(lengths, works, sequence_ids, capacity=capacity, num_replicas=num_replicas)


def assign_items(
    sizes: Int64Array, works: Int64Array, ids: Int64Array, *, capacity: int, num_replicas: int
) -> tuple[Int64Array, Int64Array]:
    """Assign as ``assign_packs`` items whose work is given, and need not follow from their size."""
    sorted_ = np.lexsort((ids, -sizes)).astype(np.int64)
    length, work = sizes[sorted_], works[sorted_]
    pack_of = _best_fit(length.tolist(), capacity)
    plan = _make_plan(length, work, pack_of, num_packs=int(pack_of.max()) + 1, capacity=capacity)
    if num_replicas > 1:
        plan = _open_packs(plan, count=-(-len(plan.free) // num_replicas) * num_replicas, capacity=capacity)
    replica_of, load = _assign_rounds(plan, num_replicas)
    _rebalance(plan, replica_of, load)
    return _number_packs(plan, replica_of, sorted_)


def _make_plan(length: Int64Array, work: Int64Array, pack_of: Int64Array, *, num_packs: int, capacity: int) -> _Plan:
    pack_work, used = np.zeros(num_packs, np.int64), np.zeros(num_packs, np.int64)
    np.add.at(pack_work, pack_of, work)
    np.add.at(used, pack_of, length)
    members = np.bincount(pack_of, minlength=num_packs)
    return _Plan(length=length, work=work, pack_of=pack_of, pack_work=pack_work, free=capacity - used, members=members)


def _best_fit(length: list[int], capacity: int) -> Int64Array:
    """Choose the pack with the least sufficient room, the one touched last when several have the same room."""
    rooms: list[int] = []  # sorted and distinct
    packs_with: dict[int, list[int]] = {}  # stack of packs per room
    pack_of: list[int] = []
    num_packs = 0
    for tokens in length:
        at = bisect_left(rooms, tokens)
        if at == len(rooms):
            room, pack, num_packs = capacity, num_packs, num_packs + 1
        else:
            room = rooms[at]
            pack = packs_with[room].pop()
            if not packs_with[room]:
                del rooms[at], packs_with[room]
        pack_of.append(pack)
        room -= tokens
        if room not in packs_with:
            packs_with[room] = []
            insort(rooms, room)
        packs_with[room].append(pack)
    return np.array(pack_of, dtype=np.int64)


def _open_packs(plan: _Plan, *, count: int, capacity: int) -> _Plan:
    """Put the same sequences into exactly ``count`` packs, as even as the room allows."""
    total = int(plan.length.sum())
    if total * _SPREAD_DENOMINATOR <= count * min(capacity, total) * _SPREAD_NUMERATOR:
        pack_of = _spread(plan.length.tolist(), plan.work.tolist(), count=count, capacity=capacity)
        if pack_of is not None:
            return _make_plan(plan.length, plan.work, pack_of, num_packs=count, capacity=capacity)
    missing = count - len(plan.free)
    plan.pack_work = np.append(plan.pack_work, np.zeros(missing, np.int64))
    plan.free = np.append(plan.free, np.full(missing, capacity, np.int64))
    plan.members = np.append(plan.members, np.zeros(missing, np.int64))
    for fresh in range(count - missing, count):
        _split_heaviest(plan, fresh)
    return plan


def _spread(length: list[int], work: list[int], *, count: int, capacity: int) -> Int64Array | None:
    """Assign the longest first, each to the pack of least work that has room. None when a sequence fits nowhere."""
    pack_work, free = [0] * count, [capacity] * count
    open_ = [(0, pack) for pack in range(count)]  # heap of (work, pack)
    parked: list[tuple[int, int]] = []  # heap of (-room, pack): too full at the moment
    pack_of = np.empty(len(length), np.int64)
    for rank, tokens in enumerate(length):
        while parked and -parked[0][0] >= tokens:
            pack = heapq.heappop(parked)[1]
            heapq.heappush(open_, (pack_work[pack], pack))
        while open_ and free[open_[0][1]] < tokens:
            pack = heapq.heappop(open_)[1]
            heapq.heappush(parked, (-free[pack], pack))
        if not open_:
            return None
        pack = open_[0][1]
        pack_of[rank] = pack
        pack_work[pack] += work[rank]
        free[pack] -= tokens
        heapq.heapreplace(open_, (pack_work[pack], pack))
    return pack_of


def _split_heaviest(plan: _Plan, fresh: int) -> None:
    """Move every second sequence of the pack with most work to ``fresh``, which stays empty if none can be split."""
    splittable = np.where(plan.members >= 2, plan.pack_work, -1)
    heaviest = int(splittable.argmax())
    if splittable[heaviest] >= 0:
        for rank in np.flatnonzero(plan.pack_of == heaviest)[1::2]:
            plan.move(int(rank), fresh)


def _assign_rounds(plan: _Plan, num_replicas: int) -> tuple[Int64Array, Int64Array]:
    """Assign rounds of one pack per replica, most work first: in each the lightest replica takes the heaviest."""
    load = np.zeros(num_replicas, np.int64)
    replica_of = np.empty(len(plan.free), np.int64)
    for packs in np.argsort(-plan.pack_work, kind="stable").reshape(-1, num_replicas):
        replicas = np.argsort(load, kind="stable")
        replica_of[packs] = replicas
        load[replicas] += plan.pack_work[packs]
    return replica_of, load


# A transfer of work between two replicas: |2 * moved work - gap| (0 halves their gap, which is best), the rank of a
# sequence or the pack that is given, and the pack that receives the sequence or is taken in exchange.
_Transfer = tuple[int, int, int]


def _rebalance(plan: _Plan, replica_of: Int64Array, load: Int64Array) -> None:
    """Relieve the heaviest replica, first in favor of the lightest, until they are equal or nothing helps."""
    trials = _TRIALS_PER_REPLICA * len(load)
    improved = True
    while improved:
        improved = False
        replicas = np.argsort(load, kind="stable").tolist()
        heavy = replicas[-1]
        for light in replicas:
            gap = int(load[heavy] - load[light])
            if gap <= int(load[heavy]) // _BALANCE_DENOMINATOR or trials <= 0:
                break
            trials -= 1
            moved = _transfer(plan, replica_of, heavy=heavy, light=light, gap=gap)
            if moved:
                load[heavy] -= moved
                load[light] += moved
                improved = True
                break


def _transfer(plan: _Plan, replica_of: Int64Array, *, heavy: int, light: int, gap: int) -> int:
    """Make the transfer that comes nearest to halving the gap; return the work moved, 0 when none narrows it."""
    light_packs, heavy_packs = np.flatnonzero(replica_of == light), np.flatnonzero(replica_of == heavy)
    exchange = _best_exchange(plan, heavy_packs, light_packs, gap)
    move = _best_move(plan, replica_of == heavy, light_packs, gap)
    if move is not None and (exchange is None or move[0] < exchange[0]):
        _, rank, pack = move
        plan.move(rank, pack)
        return int(plan.work[rank])
    if exchange is None:
        return 0
    _, give, take = exchange
    replica_of[give], replica_of[take] = light, heavy
    return int(plan.pack_work[give] - plan.pack_work[take])


def _best_exchange(plan: _Plan, heavy_packs: Int64Array, light_packs: Int64Array, gap: int) -> _Transfer | None:
    """Find the best exchange of two whole packs, which is always possible."""
    offers = sorted((int(plan.pack_work[pack]), int(pack)) for pack in light_packs)
    works = [work for work, _ in offers]
    best, best_miss = None, gap  # a miss below the gap: the moved amount is strictly between nothing and the gap
    for give in heavy_packs.tolist():
        given = int(plan.pack_work[give])
        above = bisect_left(works, given - gap // 2)
        for work, take in offers[max(above - 1, 0) : above + 1]:
            miss = abs(2 * (given - work) - gap)
            if miss < best_miss:
                best, best_miss = (miss, give, take), miss
    return best


def _best_move(plan: _Plan, is_heavy: npt.NDArray[np.bool_], light_packs: Int64Array, gap: int) -> _Transfer | None:
    """Find the best move of one sequence into the roomiest pack of the light replica; a pack is never emptied by it."""
    roomiest = int(light_packs[plan.free[light_packs].argmax()])
    may_move = (is_heavy & (plan.members >= 2))[plan.pack_of] & (plan.length <= plan.free[roomiest])
    miss = np.where(may_move, np.abs(2 * plan.work - gap), gap)
    rank = int(miss.argmin())
    return (int(miss[rank]), rank, roomiest) if miss[rank] < gap else None


def _number_packs(plan: _Plan, replica_of: Int64Array, sorted_: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Order packs by replica, most work first; sequences of a pack by rank."""
    packs = np.lexsort((-plan.pack_work, replica_of))
    number_of = np.empty(len(packs), np.int64)
    number_of[packs] = np.arange(len(packs))
    pack_offsets = np.zeros(len(packs) + 1, np.int64)
    np.cumsum(plan.members[packs], out=pack_offsets[1:])
    return sorted_[np.argsort(number_of[plan.pack_of], kind="stable")], pack_offsets


# --------------------------------------------------------------------------- stage two: the per-token arrays


def build_stream(
    tokens: Int64Array, regions: UInt8Array, rows: Int64Array, pack_offsets: Int64Array, *, multiple_of: int
) -> StreamArrays:
    """Write every per-token array of all packs, one pack after the other.

    Args:
        tokens: all sequences, one after the other.
        regions: the Region of every token.
        rows: [n, 3] one sequence per row in the order of the stream: start in ``tokens``, length, sequence id.
        pack_offsets: [P+1] rows of pack p are ``pack_offsets[p]`` to ``pack_offsets[p+1]``.

    Returns:
        token, target, position, region, sequence (conventions: ``types.py``), cu_seqlens (each pack's own), num_valid
        [P], then the offsets [P+1] of the packs in the per-token arrays and in cu_seqlens.
    """
    start_S, length_S, id_S = rows.T
    used_P = _sum_per_pack(length_S, pack_offsets)
    size_P = np.maximum(-(-used_P // multiple_of), 1) * multiple_of
    token_offsets = _offsets(size_P)
    # Stream position of every sequence: its pack's start plus the lengths of its predecessors in the pack.
    pack_S = np.repeat(np.arange(len(used_P)), np.diff(pack_offsets))
    stream_S = (_offsets(length_S)[:-1] - _offsets(used_P)[pack_S]) + token_offsets[pack_S]

    size = int(token_offsets[-1])
    position_N = np.arange(int(length_S.sum())) - np.repeat(_offsets(length_S)[:-1], length_S)  # N: not padding
    at_N = position_N + np.repeat(stream_S, length_S)
    token_T, target_T, sequence_T = np.zeros(size, np.int64), np.zeros(size, np.int64), np.full(size, -1, np.int64)
    region_T = np.full(size, Region.PAD, np.uint8)
    # Everything not overwritten below is padding, whose positions count from the end of its pack's last sequence.
    position_T = np.arange(size) - np.repeat(token_offsets[:-1] + used_P, size_P)
    read_N = position_N + np.repeat(start_S, length_S)
    token_T[at_N] = tokens[read_N]
    position_T[at_N] = position_N
    sequence_T[at_N] = np.repeat(id_S, length_S)

    predicts_N = position_N < np.repeat(length_S - 1, length_S)
    target_T[at_N[predicts_N]] = token_T[at_N[predicts_N] + 1]
    region_T[at_N[predicts_N]] = regions[read_N[predicts_N] + 1]

    cu_seqlens, cu_offsets = _boundaries(stream_S + length_S, pack_offsets, token_offsets, used_P)
    num_valid_P = np.diff(_offsets(np.isin(region_T, LOSS_REGIONS).astype(np.int64))[token_offsets])
    return token_T, target_T, position_T, region_T, sequence_T, cu_seqlens, num_valid_P, token_offsets, cu_offsets


def _boundaries(
    end_S: Int64Array, pack_offsets: Int64Array, token_offsets: Int64Array, used_P: Int64Array
) -> tuple[npt.NDArray[np.int32], Int64Array]:
    """Build cu_seqlens of every pack, concatenated: 0, the end of each sequence, and the end of the padding if any."""
    padded_P = np.diff(token_offsets) > used_P
    cu_offsets = _offsets(np.diff(pack_offsets) + 1 + padded_P)
    cu_seqlens = np.zeros(int(cu_offsets[-1]), np.int32)
    pack_S = np.repeat(np.arange(len(used_P)), np.diff(pack_offsets))
    index_S = np.arange(len(end_S)) - pack_offsets[pack_S]
    cu_seqlens[cu_offsets[pack_S] + 1 + index_S] = end_S - token_offsets[pack_S]
    cu_seqlens[(cu_offsets[1:] - 1)[padded_P]] = np.diff(token_offsets)[padded_P]
    return cu_seqlens, cu_offsets


def _offsets(sizes: Int64Array) -> Int64Array:
    offsets = np.zeros(len(sizes) + 1, np.int64)
    np.cumsum(sizes, out=offsets[1:])
    return offsets


def _sum_per_pack(value_S: Int64Array, pack_offsets: Int64Array) -> Int64Array:
    return np.diff(_offsets(value_S)[pack_offsets])
