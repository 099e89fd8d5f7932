"""The order in which training walks through its prompts: shuffled, mixed by weight, the same after any restart."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from itertools import zip_longest
from math import lcm

import numpy as np

from megatron_tropd.errors import ConfigError, DataError
from megatron_tropd.types import Int64Array, Prompt


@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """The rows of one source, and how often it comes up next to the others."""

    rows_N: Int64Array  # places in ``PromptStream.prompts``
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class StepPlaces:
    """The places of the walk that each step asks, one after the other over all steps.

    A run that resumes with another number of prompts per step continues at the next place: what was asked before counts
    in prompts, not in steps, so that nothing is skipped or comes twice.
    """

    changes: tuple[tuple[int, int, int], ...]  # ascending: a step, its first place, prompts per step from then on

    @classmethod
    def of(cls, size: int) -> StepPlaces:
        """Return those of a run that asks ``size`` prompts in every step."""
        return cls(((0, 0, size),))

    def places(self, step: int) -> range:
        """Return the places of ``step`` (from 0)."""
        first, place, size = next(change for change in reversed(self.changes) if change[0] <= step)
        start = place + (step - first) * size
        return range(start, start + size)

    def changed(self, step: int, size: int) -> StepPlaces:
        """Return the same places before ``step``, and ``size`` of them per step from there on."""
        earlier = tuple(change for change in self.changes if change[0] < step)
        if earlier and earlier[-1][2] == size:
            return StepPlaces(earlier)
        return StepPlaces((*earlier, (step, self.places(step).start, size)))


@dataclass(frozen=True, slots=True)
class PromptStream:
    """An endless walk through the prompts; every epoch of a source visits each of its prompts once, in a new order.

    What stands at a place of the walk is a pure function of seed, prompts and weights. Which places a step has follows
    from its number and from how many prompts a step asks (``StepPlaces``, where that has changed on resuming).
    """

    prompts: Sequence[Prompt]
    seed: int
    shuffle: bool = True
    shares: tuple[Share, ...] = ()  # none: all prompts are one source
    _turns: Turns = field(init=False, repr=False, compare=False)
    _orders: dict[int, tuple[int, Int64Array]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.prompts:
            raise DataError("a prompt stream needs at least one prompt, got none.")
        if not 0 <= self.seed < 2**64:
            raise ConfigError(f"seed is {self.seed}: give an integer in 0..2^64-1.")
        if not self.shares:
            object.__setattr__(self, "shares", (Share(np.arange(len(self.prompts))),))
        if any(len(share.rows_N) == 0 for share in self.shares):
            raise DataError("a source of the mixture has no prompt.")
        object.__setattr__(self, "_orders", {})
        object.__setattr__(self, "_turns", Turns([share.weight for share in self.shares]))

    def batch(self, step: int, size: int) -> list[Prompt]:
        """Return the prompts of step ``step`` (from 0). A batch may span the end of one epoch and the next one's start.

        ``size`` may exceed the number of prompts; then prompts repeat within the batch.
        """
        if step < 0 or size < 1:
            raise ValueError(f"step {step} must be >= 0 and size {size} >= 1.")
        return self.at(StepPlaces.of(size).places(step))

    def at(self, places: Iterable[int]) -> list[Prompt]:
        """Return the prompts at places of the walk, counted from 0 over all epochs."""
        return [self.prompts[self._row(place)] for place in places]

    def first(self, count: int) -> list[Prompt]:
        """Return the first prompts of the data, sources in turn."""
        rows = [
            int(row)
            for turn in zip_longest(*(share.rows_N[:count] for share in self.shares))
            for row in turn
            if row is not None
        ]
        return [self.prompts[row] for row in rows[:count]]

    def epochs(self, step: int, size: int) -> tuple[float, ...]:
        """Count the epochs of every source before ``step``; a whole number when one has just ended."""
        done = self._turns.counts(step * size)
        return tuple(count / len(share.rows_N) for count, share in zip(done, self.shares, strict=True))

    def _row(self, place: int) -> int:
        source, turn = self._turns.at(place)
        rows_N = self.shares[source].rows_N
        epoch, offset = divmod(turn, len(rows_N))
        return int(rows_N[self._order(epoch, source, len(rows_N))[offset] if self.shuffle else offset])

    def _order(self, epoch: int, source: int, count: int) -> Int64Array:
        """Return the order of a source's epoch; the last one of every source is kept, so each is drawn once."""
        kept = self._orders.get(source)
        if kept is None or kept[0] != epoch:
            kept = self._orders[source] = (epoch, _order(self.seed, epoch, source, count))
        return kept[1]


class Turns:
    """Turns of sources in exact proportion to their weights, at every moment of the walk.

    After ``p`` places source ``i`` has had ``c`` of them with ``|c - p w_i| <= 1 - 1/(2n-2)``, where ``w`` are the
    weights over their sum and ``n`` sources take part: no order does better in the worst case. Weights are taken as the
    decimal fractions they are written as, so nothing is ever rounded, and the order repeats once every source has had
    its exact share.

    Source: Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980).
    """

    def __init__(self, weights: Sequence[float]) -> None:
        if not weights or any(not 0 < weight < float("inf") for weight in weights):
            raise ConfigError(f"weights of sources are {list(weights)}: give one number above 0 for each.")
        exact = [Fraction(repr(float(weight))) for weight in weights]
        scale = lcm(*(weight.denominator for weight in exact))
        whole = [int(weight * scale) for weight in exact]
        common = int(np.gcd.reduce(np.array(whole, dtype=object)))
        self._weights = [weight // common for weight in whole]
        self._period = sum(self._weights)
        self._sources = array("q")  # of the first places, as far as anyone has looked
        self._turn = array("q")  # how many turns the source had before
        self._counts = [0] * len(weights)

    def at(self, place: int) -> tuple[int, int]:
        """Return the source of a place, and how many turns it had before."""
        period, offset = divmod(place, self._period)
        self._extend(offset + 1)
        source = self._sources[offset]
        return source, period * self._weights[source] + self._turn[offset]

    def counts(self, places: int) -> list[int]:
        """Count how many of the first ``places`` every source has."""
        period, offset = divmod(places, self._period)
        self._extend(offset)
        found = np.bincount(np.array(self._sources[:offset]), minlength=len(self._weights))
        return [period * weight + int(count) for weight, count in zip(self._weights, found, strict=True)]

    def _extend(self, places: int) -> None:
        while len(self._sources) < places:
            source = self._next(len(self._sources) + 1)
            self._sources.append(source)
            self._turn.append(self._counts[source])
            self._counts[source] += 1

    def _next(self, places: int) -> int:
        """Choose the source that must have a turn soonest, of those that may have the next without getting ahead."""
        period, two = self._period, max(2 * len(self._weights) - 2, 1)
        behind = [
            two * (weight * places - period * had) for weight, had in zip(self._weights, self._counts, strict=True)
        ]
        may = [i for i, late in enumerate(behind) if late >= period] or range(len(behind))
        return min(may, key=lambda i: (Fraction((two - 1) * period - behind[i], self._weights[i]), i))


@lru_cache(maxsize=16)
def _order(seed: int, epoch: int, source: int, count: int) -> Int64Array:
    """Draw a permutation of 0..count-1: the ranks of raw Philox words.

    Sorting the words of the bit generator, rather than calling ``Generator.permutation``, keeps the order the same
    over numpy versions: only bit streams are promised not to change.
    """
    key, counter = np.array([seed, epoch], dtype=np.uint64), np.array([0, 0, source, 0], dtype=np.uint64)
    order = np.argsort(np.random.Philox(key=key, counter=counter).random_raw(count), kind="stable")
    order.setflags(write=False)
    return order
