"""The order of training: whole epochs, exact shares of several sources, the same after any restart."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_tropd.data import stream as streaming
from megatron_tropd.data.stream import PromptStream, Share, StepPlaces, Turns
from megatron_tropd.errors import ConfigError, DataError
from megatron_tropd.types import Prompt


def stream(count: int, seed: int = 3, **options: Any) -> PromptStream:
    prompts = [Prompt(index=i, token_ids=np.array([i]), text=str(i)) for i in range(count)]
    return PromptStream(prompts, seed, **options)


def walk(source: PromptStream, steps: range, size: int) -> list[int]:
    return [prompt.index for step in steps for prompt in source.batch(step, size)]


def test_every_epoch_visits_each_prompt_once_in_an_order_of_its_own():
    order = walk(stream(13), range(5 * 13), 5)  # 25 epochs; batches straddle their ends
    epochs = [tuple(order[start : start + 13]) for start in range(0, len(order), 13)]
    assert all(sorted(epoch) == list(range(13)) for epoch in epochs)
    assert len(set(epochs)) == len(epochs)


def test_the_order_ranks_raw_philox_words_keyed_by_seed_and_epoch():
    words = np.random.Philox(key=np.array([3, 2], dtype=np.uint64)).random_raw(7)
    assert walk(stream(7), range(2, 3), 7) == sorted(range(7), key=lambda row: words[row])


def test_a_batch_depends_on_seed_and_step_only():
    whole = walk(stream(11), range(20), 4)
    assert walk(stream(11), range(9, 20), 4) == whole[36:]  # a resumed run
    shared = stream(11)
    assert walk(shared, range(19, 20), 4) + walk(shared, range(0, 1), 4) == whole[76:] + whole[:4]
    assert walk(stream(11, seed=4), range(20), 4) != whole


def test_another_number_of_prompts_per_step_begins_at_the_next_place():
    five = StepPlaces.of(5)
    assert [five.places(step) for step in (0, 2)] == [range(0, 5), range(10, 15)]
    three = five.changed(4, 3)  # after four steps of five
    assert [three.places(step) for step in (3, 4, 6)] == [range(15, 20), range(20, 23), range(26, 29)]
    seven = three.changed(6, 7)
    assert [seven.places(step) for step in (5, 6, 7)] == [range(23, 26), range(26, 33), range(33, 40)]
    assert seven.changed(9, 7) == seven and three.changed(4, 5) == five  # as many as before; the change taken back
    assert three.changed(2, 4).places(5) == range(22, 26)  # from an earlier checkpoint, before the change


def test_prompts_of_changed_steps_are_visited_once_per_epoch_of_every_source():
    source = mixed([5, 8], [5, 8])
    steps = StepPlaces.of(5).changed(1, 2).changed(3, 4)  # 5 + 2 + 2 + 4 = 13 prompts, an epoch
    order = [prompt.index for step in range(4) for prompt in source.at(steps.places(step))]
    assert sorted(order) == list(range(13)) and order == walk(source, range(13), 1)


def test_first_places_are_uniform_over_prompts():
    first = Counter(stream(5, seed=seed).batch(0, 1)[0].index for seed in range(2000))
    assert all(count == pytest.approx(400, abs=90) for count in first.values())  # 5 standard deviations


def test_batches_larger_than_the_data_and_unshuffled_walks_work():
    assert walk(stream(3, shuffle=False), range(2), 4) == [0, 1, 2, 0, 1, 2, 0, 1]
    assert Counter(walk(stream(3), range(1), 6)) == {0: 2, 1: 2, 2: 2}
    assert stream(8).epochs(3, 4) == (1.5,)


def test_empty_streams_and_impossible_arguments_are_refused():
    with pytest.raises(DataError, match="at least one prompt"):
        stream(0)
    with pytest.raises(ConfigError, match="seed is -1"):
        stream(3, seed=-1)
    with pytest.raises(ValueError, match="step -1"):
        stream(3).batch(-1, 2)


# --------------------------------------------------------------------------- several sources


def mixed(sizes: list[int], weights: list[float], seed: int = 3, **options: Any) -> PromptStream:
    """Prompts numbered through all sources, which follow each other."""
    prompts = [Prompt(index=i, token_ids=np.array([i]), text=str(i)) for i in range(sum(sizes))]
    starts = np.cumsum([0, *sizes])
    shares = [
        Share(np.arange(start, start + size), weight)
        for start, size, weight in zip(starts, sizes, weights, strict=False)
    ]
    return PromptStream(prompts, seed, shares=tuple(shares), **options)


def test_three_to_one_is_three_to_one_in_every_four_prompts():
    order = walk(mixed([5, 7], [3, 1]), range(100), 4)
    for start in range(0, 400, 4):
        assert sum(row < 5 for row in order[start : start + 4]) == 3


@settings(max_examples=150, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=6), st.sampled_from([1.0, 0.1, 0.25, 7.0]))
@example([7, 1, 1, 1, 1, 1], 1.0)
@example([999, 1], 1.0)
def test_no_source_is_ever_a_whole_prompt_ahead_or_behind(weights: list[int], unit: float):
    turns = Turns([weight * unit for weight in weights])
    total, n = sum(weights), len(weights)
    bound = 1 - Fraction(1, 2 * n - 2) if n > 1 else Fraction(0)
    had = [0] * n
    for place in range(2 * total + 3):
        source, turn = turns.at(place)
        assert turn == had[source]
        had[source] += 1
        for count, weight in zip(had, weights, strict=True):
            assert abs(count - Fraction(weight * (place + 1), total)) <= bound
        assert turns.counts(place + 1) == had


def test_weights_are_the_decimals_they_are_written_as():
    # as binary fractions 0.1 and 0.7 are neither in the ratio 1 to 7 nor add up to 1 with 0.2
    assert Turns([0.1, 0.7, 0.2]).counts(10**15) == [10**14, 7 * 10**14, 2 * 10**14]
    assert Turns([1 / 3, 1.0]).counts(4 * 10**5)[0] == pytest.approx(10**5, abs=1)


def test_each_source_goes_through_its_own_epochs():
    source = mixed([4, 6, 3], [1, 2, 5])
    order = walk(source, range(48), 5)
    for rows in (range(4), range(4, 10), range(10, 13)):
        own = [row for row in order if row in rows]
        whole = [own[start : start + len(rows)] for start in range(0, len(own) - len(rows) + 1, len(rows))]
        assert len(whole) > 5 and all(sorted(epoch) == list(rows) for epoch in whole)
        assert len({tuple(epoch) for epoch in whole}) > 2
    assert source.epochs(48, 5) == (30 / 4, 60 / 6, 150 / 3)


def test_a_mixture_resumes_anywhere_and_depends_on_the_seed():
    whole = walk(mixed([11, 5], [0.7, 0.3]), range(40), 3)
    for step in (39, 7, 23):
        assert walk(mixed([11, 5], [0.7, 0.3]), range(step, step + 1), 3) == whole[3 * step : 3 * step + 3]
    assert walk(mixed([11, 5], [0.7, 0.3], seed=4), range(40), 3) != whole
    # whose turn it is does not depend on it
    assert [row < 11 for row in walk(mixed([11, 5], [0.7, 0.3], seed=4), range(40), 3)] == [row < 11 for row in whole]


def test_sources_of_equal_size_are_not_shuffled_alike():
    order = walk(mixed([8, 8], [1, 1]), range(1), 16)
    first, second = ([row % 8 for row in order if row // 8 == half] for half in (0, 1))
    assert sorted(first) == sorted(second) == list(range(8)) and first != second


def test_the_first_prompts_are_of_all_sources_in_turn_and_go_on_where_one_ends():
    source = mixed([5, 2, 3], [1, 9, 1])  # rows 0 to 4, 5 and 6, 7 to 9
    assert [prompt.index for prompt in source.first(9)] == [0, 5, 7, 1, 6, 8, 2, 9, 3]
    assert [prompt.index for prompt in source.first(2)] == [0, 5]
    assert [prompt.index for prompt in stream(3).first(7)] == [0, 1, 2]


def test_mixtures_that_cannot_be_are_refused():
    with pytest.raises(DataError, match="a source of the mixture has no prompt"):
        mixed([3, 0], [1, 1])
    for weight in (0.0, -1.0, float("inf"), float("nan")):
        with pytest.raises(ConfigError, match="one number above 0 for each"):
            Turns([1.0, weight])


@pytest.mark.parametrize("count", [16, 17, 40])
def test_an_epoch_s_order_is_drawn_once_however_many_sources_there_are(count, monkeypatch):
    drawn: list[tuple[int, int]] = []
    real = streaming._order

    def draw(seed: int, epoch: int, source: int, size: int) -> Any:
        drawn.append((source, epoch))
        return real(seed, epoch, source, size)

    monkeypatch.setattr(streaming, "_order", draw)
    shares = tuple(Share(np.arange(7 * i, 7 * i + 7)) for i in range(count))
    seen = walk(stream(7 * count, shares=shares), range(14), count)  # two epochs of every source
    assert sorted(drawn) == [(source, epoch) for source in range(count) for epoch in range(2)]
    assert sorted(seen) == sorted([*range(7 * count)] * 2)
