"""The packer: every token once, aligned with its target and region; equal shares; both twins the same numbers."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import megatron_tropd
from megatron_tropd.benchmarks.packing import fewest_packs, first_fit_scan, first_fit_tree, long_tail_lengths
from megatron_tropd.data.packing import FlatSequences, pack, pack_flat, pack_work
from megatron_tropd.data.packing import api as packing
from megatron_tropd.data.packing import reference as packing_reference
from megatron_tropd.errors import DataError
from megatron_tropd.types import Int64Array, Pack, Region, Rollout, UInt8Array, regions_of, single_turn

try:
    from megatron_tropd import _C
except ImportError:  # plain installation: only the twin can be tested
    _C = None  # type: ignore[assignment]

needs_extension = pytest.mark.skipif(_C is None, reason="megatron_tropd._C was not built")


@pytest.fixture(params=["compiled", "plain"])
def core(request):
    if request.param == "compiled" and _C is None:
        pytest.skip("megatron_tropd._C was not built")
    return _C if request.param == "compiled" else packing_reference


def rollout(sequence_id: int, length: int, *, prompt: int = 1, prefix: int = 0, seed: int = 0) -> Rollout:
    tokens = np.random.default_rng([seed, sequence_id]).integers(0, 1000, length)
    prompt = min(prompt, length)
    empty = np.empty(0, np.float32)
    return Rollout(
        sequence_id=sequence_id,
        prompt_index=0,
        token_ids=tokens,
        region_L=single_turn(prompt=prompt, prefix=prefix, continuation=length - prompt - prefix),
        sampling_logprob=empty,
        model_logprob=empty,
        finished=True,
    )


AFTER_PROMPT = (Region.PREFIX, Region.CONTINUATION, Region.OBSERVATION)


def regions(*values: int) -> UInt8Array:
    return np.array(values, np.uint8)


@st.composite
def batches(draw: st.DrawFn, max_length: int = 40, max_count: int = 60) -> list[Rollout]:
    count = draw(st.integers(1, max_count))
    ids = draw(st.lists(st.integers(0, 10_000), min_size=count, max_size=count, unique=True))
    result = []
    for sequence_id in ids:
        length = draw(st.integers(1, max_length))
        prompt = draw(st.integers(1, length))
        one = rollout(sequence_id, length, prompt=prompt, prefix=draw(st.integers(0, length - prompt)))
        if draw(st.booleans()):  # several turns: every region but the prompt's anywhere, loss in many stretches
            later = draw(st.lists(st.sampled_from(AFTER_PROMPT), min_size=length - prompt, max_size=length - prompt))
            one = replace(one, region_L=np.array([Region.PROMPT] * prompt + later, np.uint8))
        result.append(one)
    return result


layouts = st.fixed_dictionaries(
    {"max_tokens": st.integers(40, 90), "multiple_of": st.integers(1, 20), "num_replicas": st.integers(1, 9)}
).filter(lambda layout: layout["max_tokens"] // layout["multiple_of"] * layout["multiple_of"] >= 40)


def all_packs(replicas: Sequence[Sequence[Pack]]) -> list[Pack]:
    return list(chain.from_iterable(replicas))


def arrays_of(packed: Pack) -> dict[str, Any]:
    return {name: getattr(packed, name) for name in Pack.__dataclass_fields__}


def assert_same_packs(actual: Sequence[Sequence[Pack]], expected: Sequence[Sequence[Pack]]) -> None:
    assert [len(packs) for packs in actual] == [len(packs) for packs in expected]
    for one, other in zip(all_packs(actual), all_packs(expected), strict=True):
        for name, value in arrays_of(other).items():
            np.testing.assert_array_equal(arrays_of(one)[name], value, err_msg=name)
            assert np.asarray(arrays_of(one)[name]).dtype == np.asarray(value).dtype, name


def tokens_by_definition(sequence: Rollout) -> list[tuple[int, int, int, int, int]]:
    """(token, target, position, region, sequence) of every position, straight from the text of ``types.py``."""
    ids, rows = sequence.token_ids.tolist(), []
    for t, token in enumerate(ids):
        target, region = 0, Region.PAD
        if t + 1 < len(ids):
            target, region = ids[t + 1], Region(sequence.region_L[t + 1])
        rows.append((token, target, t, int(region), sequence.sequence_id))
    return rows


def assert_pack_holds(packed: Pack, by_id: dict[int, Rollout], *, capacity: int, multiple_of: int) -> None:
    rows = list(
        zip(
            packed.token_T.tolist(),
            packed.target_T.tolist(),
            packed.position_T.tolist(),
            packed.region_T.tolist(),
            packed.sequence_T.tolist(),
            strict=True,
        )
    )
    expected: list[tuple[int, int, int, int, int]] = []
    ends = [0]
    for sequence_id in packed.sequence_ids.tolist():
        expected += tokens_by_definition(by_id[sequence_id])
        ends.append(len(expected))
    used = len(expected)
    size = max(-(-used // multiple_of), 1) * multiple_of
    expected += [(0, 0, t, int(Region.PAD), -1) for t in range(size - used)]
    assert rows == expected
    assert packed.cu_seqlens.tolist() == ends + [size] * (size > used)
    assert packed.num_valid == sum(row[3] in (Region.PREFIX, Region.CONTINUATION) for row in expected)
    assert size <= capacity


# --------------------------------------------------------------------------- structure


def test_pack_matches_arrays_worked_out_by_hand():
    guided = replace(rollout(7, 5, prompt=2, prefix=2), token_ids=np.array([11, 12, 13, 14, 15]))
    only_prompt = replace(rollout(3, 2, prompt=2), token_ids=np.array([21, 22]))
    [[packed]] = pack([only_prompt, guided], max_tokens=10, multiple_of=4)
    assert packed.token_T.tolist() == [11, 12, 13, 14, 15, 21, 22, 0]
    assert packed.target_T.tolist() == [12, 13, 14, 15, 0, 22, 0, 0]
    assert packed.position_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 0]
    assert packed.region_T.tolist() == [0, 1, 1, 2, 3, 0, 3, 3]
    assert packed.sequence_T.tolist() == [7, 7, 7, 7, 7, 3, 3, -1]
    assert packed.cu_seqlens.tolist() == [0, 5, 7, 8]
    assert packed.sequence_ids.tolist() == [7, 3]
    assert packed.num_valid == 3
    assert {
        name: np.asarray(value).dtype
        for name, value in arrays_of(packed).items()
        if name not in ("num_valid", "teacher", "row_T", "num_rows", "teacher_pack")
    } == {
        "token_T": np.int64,
        "target_T": np.int64,
        "position_T": np.int64,
        "region_T": np.uint8,
        "sequence_T": np.int64,
        "cu_seqlens": np.int32,
        "sequence_ids": np.int64,
    }


def test_observations_between_continuation_tokens_carry_no_loss_by_hand():
    turns = replace(
        rollout(5, 9),
        token_ids=np.arange(31, 40),
        region_L=regions_of(
            (Region.PROMPT, 2),
            (Region.CONTINUATION, 2),
            (Region.OBSERVATION, 2),
            (Region.PREFIX, 1),
            (Region.CONTINUATION, 1),
            (Region.OBSERVATION, 1),
        ),
    )
    assert turns.region_L.tolist() == [0, 0, 2, 2, 4, 4, 1, 2, 4]
    [[packed]] = pack([turns], max_tokens=10, multiple_of=5)
    assert packed.target_T.tolist() == [32, 33, 34, 35, 36, 37, 38, 39, 0, 0]
    assert packed.region_T.tolist() == [0, 2, 2, 4, 4, 1, 2, 4, 3, 3]
    assert packed.num_valid == 4
    assert (turns.prompt_length, turns.response_length, turns.count(Region.OBSERVATION)) == (2, 4, 3)


@settings(max_examples=120, deadline=None)
@given(batches(), layouts)
def test_every_token_appears_once_aligned_and_counts_are_equal(sequences, layout):
    replicas = pack(sequences, **layout)
    by_id = {sequence.sequence_id: sequence for sequence in sequences}
    capacity = layout["max_tokens"] // layout["multiple_of"] * layout["multiple_of"]
    assert len(replicas) == layout["num_replicas"]
    assert len({len(packs) for packs in replicas}) == 1
    seen: list[int] = []
    for packed in all_packs(replicas):
        assert_pack_holds(packed, by_id, capacity=capacity, multiple_of=layout["multiple_of"])
        seen += packed.sequence_ids.tolist()
    assert sorted(seen) == sorted(by_id)


@settings(max_examples=60, deadline=None)
@given(batches(), layouts, st.randoms(use_true_random=False))
def test_packs_do_not_depend_on_the_order_of_the_input(sequences, layout, random):
    shuffled = list(sequences)
    random.shuffle(shuffled)
    assert_same_packs(pack(shuffled, **layout), pack(sequences, **layout))


@settings(max_examples=60, deadline=None)
@given(batches(), layouts)
def test_packs_are_empty_only_when_sequences_run_out(sequences, layout):
    packs = all_packs(pack(sequences, **layout))
    empty = [packed for packed in packs if len(packed.sequence_ids) == 0]
    assert len(empty) == max(0, len(packs) - len(sequences))
    for packed in empty:
        assert packed.num_valid == 0 and len(packed.token_T) == layout["multiple_of"]


def test_missing_packs_are_padding_of_one_block():
    replicas = pack([rollout(5, 7)], max_tokens=16, multiple_of=4, num_replicas=3)
    assert sorted(len(packs[0].token_T) for packs in replicas) == [4, 4, 8]
    empty = next(packs[0] for packs in replicas if packs[0].num_valid == 0)
    assert empty.cu_seqlens.tolist() == [0, 4]
    assert empty.region_T.tolist() == [Region.PAD] * 4
    assert empty.position_T.tolist() == [0, 1, 2, 3]
    assert empty.sequence_T.tolist() == [-1] * 4
    assert empty.sequence_ids.tolist() == []


def test_max_tokens_is_rounded_down_to_the_multiple():
    assert len(pack([rollout(0, 5), rollout(1, 5)], max_tokens=11, multiple_of=4)[0]) == 2
    assert len(pack([rollout(0, 5), rollout(1, 3)], max_tokens=11, multiple_of=4)[0]) == 1


# --------------------------------------------------------------------------- quality


def test_complementary_pairs_fill_every_pack():
    lengths = [*range(51, 100), *range(1, 50)]  # 51 + 49, 52 + 48, ...: 49 packs of exactly 100
    packs = all_packs(pack([rollout(i, length) for i, length in enumerate(lengths)], max_tokens=100))
    assert [len(packed.token_T) for packed in packs] == [100] * 49


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("replicas", [1, 8])
def test_long_tail_fill_and_balance_budgets_hold_at_100k(core, seed, replicas):
    lengths = long_tail_lengths(100_000, max_tokens=8192, seed=seed)
    order, offsets = core.assign_packs(
        lengths, np.arange(len(lengths)), capacity=8192, num_replicas=replicas, linear_work=packing.LINEAR_WORK
    )
    tokens, squares = (
        np.diff(np.concatenate([[0], np.cumsum(value[order])])[offsets]) for value in (lengths, lengths**2)
    )
    assert tokens.max() <= 8192
    assert lengths.sum() / 8192 / len(tokens) >= 0.99
    for share in (tokens, squares, packing.LINEAR_WORK * tokens + squares):
        per_replica = share.reshape(replicas, -1).sum(axis=1)
        assert per_replica.max() <= 1.01 * per_replica.mean()


@pytest.mark.parametrize("replicas", [2, 7, 8, 16])
def test_replicas_of_one_training_batch_are_within_one_percent(replicas):
    lengths = long_tail_lengths(640, max_tokens=4096, seed=3)
    flat = flat_of(lengths)
    work = [sum(map(pack_work, packs)) for packs in pack_flat(flat, max_tokens=4096, num_replicas=replicas)]
    assert max(work) <= 1.01 * np.mean(work)
    assert sum(work) == int((lengths * (packing.LINEAR_WORK + lengths)).sum())


def test_room_left_by_rounding_up_is_shared_by_all_packs():
    # 9 x 100 tokens fit 3 packs of 300; two replicas need 4, which then hold 2 or 3 sequences each.
    packs = all_packs(pack([rollout(i, 100) for i in range(9)], max_tokens=300, num_replicas=2))
    assert sorted(len(packed.sequence_ids) for packed in packs) == [2, 2, 2, 3]


def test_packs_of_a_replica_come_with_most_work_first():
    for packs in pack_flat(flat_of(long_tail_lengths(300, max_tokens=512)), max_tokens=512, num_replicas=3):
        work = [pack_work(packed) for packed in packs]
        assert work == sorted(work, reverse=True)


def test_linear_work_decides_between_equal_tokens_and_equal_squares():
    # One sequence of 64 against 32 of 2. Weighing squares only, the long one (4096) outweighs all others (128).
    sequences = [rollout(0, 64), *(rollout(i, 2) for i in range(1, 33))]
    by_squares = pack(sequences, max_tokens=128, num_replicas=2, linear_work=0)
    by_tokens = pack(sequences, max_tokens=128, num_replicas=2, linear_work=10**6)
    assert sorted(len(packs[0].sequence_ids) for packs in by_squares) == [1, 32]
    assert sorted(len(packs[0].token_T) for packs in by_tokens) == [64, 64]
    mixed = [rollout(0, 64), rollout(1, 48), *(rollout(i, 2) for i in range(2, 20))]
    replicas = pack(mixed, max_tokens=128, num_replicas=2, linear_work=0)
    squares = sorted(sum(pack_work(packed, linear_work=0) for packed in packs) for packs in replicas)
    assert squares == [48**2 + 18 * 4, 64**2]  # by hand: everything small goes to the lighter side


def test_one_pack_is_split_when_all_are_too_full_to_spread(core, monkeypatch):
    # 63 packs of 60 + 40 are exactly full; two replicas need 64 packs, so one of them is cut in two.
    monkeypatch.setattr(packing, "_CORE", core)
    sequences = [rollout(i, 60 if i % 2 else 40) for i in range(126)]
    packs = all_packs(pack(sequences, max_tokens=100, num_replicas=2))
    assert sorted(len(packed.token_T) for packed in packs) == [40, 60] + [100] * 62


def test_balancing_does_not_empty_a_pack(core, monkeypatch):
    # Squares: 10000 + 400 against 3600 + 3600. Moving the 20 would narrow the gap and leave an empty pack behind.
    monkeypatch.setattr(packing, "_CORE", core)
    sequences = [rollout(i, length) for i, length in enumerate([100, 60, 60, 20])]
    packs = all_packs(pack(sequences, max_tokens=100, num_replicas=2, linear_work=0))
    assert sorted(len(packed.token_T) for packed in packs) == [20, 60, 60, 100]


def test_spreading_returns_to_a_pack_that_was_too_full_for_a_longer_sequence(core, monkeypatch):
    # By squares: 75 | 70 | 30 30 30; the fourth 30 only fits beside the 70; the 10 exactly fills the lightest pack.
    monkeypatch.setattr(packing, "_CORE", core)
    sequences = [rollout(i, length) for i, length in enumerate([75, 70, 30, 30, 30, 30, 10])]
    packs = all_packs(pack(sequences, max_tokens=100, num_replicas=3, linear_work=0))
    assert sorted(np.diff(packed.cu_seqlens).tolist() for packed in packs) == [[30, 30, 30, 10], [70, 30], [75]]


# --------------------------------------------------------------------------- twins


@pytest.mark.skipif(
    os.environ.get("MEGATRON_TROPD_REQUIRE_COMPILED", "0") in ("", "0"), reason="the extension is optional here"
)
def test_the_extension_is_present_where_it_is_required():
    assert _C is not None and packing.backend() == "compiled"


@needs_extension
@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(1, 64), min_size=1, max_size=80),
    st.integers(64, 200),
    st.integers(1, 12),
    st.sampled_from([0, 1, 24_576]),
    st.randoms(use_true_random=False),
)
def test_twins_assign_identically(lengths, capacity, num_replicas, linear_work, random):
    ids = list(range(3, 3 + len(lengths)))
    random.shuffle(ids)
    arguments = (np.array(lengths), np.array(ids))
    options = {"capacity": capacity, "num_replicas": num_replicas, "linear_work": linear_work}
    compiled, plain = _C.assign_packs(*arguments, **options), packing_reference.assign_packs(*arguments, **options)
    np.testing.assert_array_equal(compiled[0], plain[0])
    np.testing.assert_array_equal(compiled[1], plain[1])


@needs_extension
@pytest.mark.parametrize("replicas", [1, 3, 8, 61])
@pytest.mark.parametrize(
    "draw",
    [
        lambda rng, n: rng.lognormal(5.0, 1.0, n),
        lambda rng, n: rng.uniform(1, 4096, n),
        lambda rng, n: rng.choice([1, 64, 2048, 2049, 4096], n),
    ],
    ids=["lognormal", "uniform", "few-distinct"],
)
def test_twins_assign_identically_at_scale(draw: Callable[..., Any], replicas):
    rng = np.random.default_rng(replicas)
    for count in (5, 97, 997, 9973):
        lengths = np.clip(draw(rng, count), 1, 4096).astype(np.int64)
        ids = rng.permutation(count)
        options = {"capacity": 4096, "num_replicas": replicas, "linear_work": packing.LINEAR_WORK}
        compiled, plain = (
            _C.assign_packs(lengths, ids, **options),
            packing_reference.assign_packs(lengths, ids, **options),
        )
        np.testing.assert_array_equal(compiled[0], plain[0])
        np.testing.assert_array_equal(compiled[1], plain[1])


@needs_extension
@settings(max_examples=80, deadline=None)
@given(batches(), layouts)
def test_twins_build_identical_packs(sequences, layout):
    compiled = pack(sequences, **layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_CORE", packing_reference)
        assert_same_packs(compiled, pack(sequences, **layout))


@needs_extension
def test_compiled_functions_refuse_to_convert_dtypes():
    with pytest.raises(TypeError):
        _C.assign_packs(np.array([1.5]), np.array([0]), capacity=4, num_replicas=1, linear_work=0)


def test_a_missing_extension_falls_back_or_fails_as_asked(monkeypatch):
    monkeypatch.delattr(megatron_tropd, "_C", raising=False)
    monkeypatch.setitem(sys.modules, "megatron_tropd._C", None)
    monkeypatch.delenv("MEGATRON_TROPD_REQUIRE_COMPILED", raising=False)
    assert packing._load_core() == (packing_reference, "python")
    monkeypatch.setenv("MEGATRON_TROPD_REQUIRE_COMPILED", "1")
    with pytest.raises(ImportError, match=r"MEGATRON_TROPD_REQUIRE_COMPILED is set.*pip install"):
        packing._load_core()


@pytest.mark.parametrize("older", [{}, {"INTERFACE": 1}])
def test_an_extension_built_from_older_sources_is_not_used_and_said_so(older, monkeypatch, caplog):
    stale = SimpleNamespace(build_stream=None, assign_packs=None, **older)
    monkeypatch.setattr(megatron_tropd, "_C", stale, raising=False)
    monkeypatch.setitem(sys.modules, "megatron_tropd._C", stale)
    monkeypatch.delenv("MEGATRON_TROPD_REQUIRE_COMPILED", raising=False)
    assert packing._load_core() == (packing_reference, "python")
    assert "built from other sources: interface 1, not 3" in caplog.text
    monkeypatch.setenv("MEGATRON_TROPD_REQUIRE_COMPILED", "1")
    with pytest.raises(ImportError, match=r"interface 1, not 3.*build_ext --inplace"):
        packing._load_core()


# --------------------------------------------------------------------------- the flat door, and errors


def flat_of(lengths: Int64Array) -> FlatSequences:
    return FlatSequences(
        tokens=np.arange(int(lengths.sum())),
        lengths=lengths,
        regions=np.concatenate([single_turn(prompt=1, continuation=length - 1) for length in lengths.tolist()]),
        sequence_ids=np.arange(len(lengths)),
    )


@settings(max_examples=30, deadline=None)
@given(batches(), layouts)
def test_flat_arrays_of_any_integer_dtype_give_the_same_packs(sequences, layout):
    flat = FlatSequences(
        tokens=np.concatenate([sequence.token_ids for sequence in sequences]).astype(np.int32),
        lengths=np.array([len(sequence.token_ids) for sequence in sequences], np.uint16),
        regions=np.concatenate([sequence.region_L for sequence in sequences]),
        sequence_ids=np.array([sequence.sequence_id for sequence in sequences], np.int32),
    )
    assert_same_packs(pack_flat(flat, **layout), pack(sequences, **layout))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"token_ids": np.arange(17)},
            r"Sequence 4 has 17 tokens, but a pack holds 16 \(max_tokens=19.*Raise max_tokens",
        ),
        ({"token_ids": np.empty(0, np.int64)}, "Sequence 4 is empty"),
        ({"token_ids": np.empty(0)}, "Sequence 4 is empty"),
        ({"token_ids": np.array([1, -100, 2])}, "Sequence 4 holds the negative token id -100"),
        ({"token_ids": np.array([-100, 1, 2])}, "Sequence 4 holds the negative token id -100"),
        ({"token_ids": np.array([1.0, 2.0])}, "token_ids of sequence 4 is a 1-d array of float64"),
        ({"token_ids": np.array([True, False])}, "token_ids of sequence 4 is a 1-d array of bool"),
        ({"token_ids": np.ones((2, 2), np.int64)}, "token_ids of sequence 4 is a 2-d array"),
        ({"sequence_id": -1}, "Sequence -1 has a negative id"),
        ({"sequence_id": 0}, "Sequence id 0 occurs more than once"),
        ({"sequence_id": 1.5}, "sequence_id has the value 1.5 of type float"),
        ({"region_L": regions(0, 0, 2, 2, 2)}, r"region_L of sequence 4 .* of shape \(5,\) for 6 tokens"),
        ({"region_L": regions(0, 0, 2, 2, 2, 2)[None]}, r"region_L of sequence 4 .* of shape \(1, 6\) for 6 tokens"),
        ({"region_L": np.array([0, 0, 2, 2, 2, 2])}, "region_L of sequence 4 is an array of int64.*one uint8"),
        ({"region_L": np.zeros(6, np.bool_)}, "region_L of sequence 4 is an array of bool"),
        ({"region_L": regions(0, 2, 3, 2, 3, 2)}, r"Token 2 of sequence 4 has region 3 \(PAD\).*2 such tokens in all"),
        ({"region_L": regions(0, 2, 2, 2, 2, 5)}, r"Token 5 of sequence 4 has region 5 \(unknown\)"),
        ({"region_L": regions(0, 255, 2, 2, 2, 2)}, r"Token 1 of sequence 4 has region 255 \(unknown\)"),
        (
            {"region_L": regions(2, 2, 2, 2, 2, 2)},
            r"Token 0 of sequence 4 has region 2 \(CONTINUATION\).*begins with PROMPT",
        ),
        ({"region_L": regions(4, 0, 2, 2, 2, 2)}, r"Token 0 of sequence 4 has region 4 \(OBSERVATION\), but nothing"),
        (
            {"region_L": regions(0, 2, 2, 0, 0, 2)},
            r"Token 3 of sequence 4 has region 0 \(PROMPT\), after.*is OBSERVATION",
        ),
        ({"region_L": regions(0, 4, 0, 2, 2, 2)}, r"Token 2 of sequence 4 has region 0 \(PROMPT\), after"),
    ],
)
def test_a_bad_sequence_is_named_with_its_value_and_the_fix(change, message):
    good = [rollout(i, 6) for i in range(4)]
    if "token_ids" in change:  # the only fault
        change = {"region_L": single_turn(prompt=change["token_ids"].shape[0]), **change}
    bad = replace(rollout(4, 6), **change)
    with pytest.raises(DataError, match=message) as caught:
        pack([*good, bad], max_tokens=19, multiple_of=4)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0. Pass an integer of at least 1"),
        ({"max_tokens": 64.0}, "max_tokens is 64.0"),
        ({"max_tokens": 64, "multiple_of": 0}, "multiple_of is 0"),
        ({"max_tokens": 64, "num_replicas": 0}, "num_replicas is 0"),
        ({"max_tokens": 64, "num_replicas": True}, "num_replicas is True"),
        ({"max_tokens": 64, "linear_work": -1}, "linear_work is -1. Pass an integer of at least 0"),
        ({"max_tokens": 64, "linear_work": 2**62}, "linear_work=.* is too large"),
        ({"max_tokens": 7, "multiple_of": 8}, "max_tokens=7 is below multiple_of=8"),
        ({"max_tokens": 2**31}, "32-bit cu_seqlens"),
    ],
)
def test_a_bad_budget_is_refused(options, message):
    with pytest.raises(DataError, match=message):
        pack([rollout(0, 6)], **options)


def test_nothing_to_pack_is_refused():
    with pytest.raises(DataError, match="no sequences"):
        pack([], max_tokens=64)


def test_flat_arrays_that_disagree_are_refused():
    flat = flat_of(np.array([3, 4]))
    with pytest.raises(DataError, match="lengths add up to 7, but there are 6 tokens"):
        pack_flat(replace(flat, tokens=np.arange(6)), max_tokens=64)
    with pytest.raises(DataError, match="lengths add up to 7, but there are 8 tokens"):
        pack_flat(replace(flat, tokens=np.arange(8)), max_tokens=64)
    with pytest.raises(DataError, match="lengths add up to 7, but there are 8 regions"):
        pack_flat(replace(flat, regions=np.zeros(8, np.uint8)), max_tokens=64)
    with pytest.raises(DataError, match=r"regions is a 1-d array of int64\. Pass a 1-d array of uint8"):
        pack_flat(replace(flat, regions=np.zeros(7, np.int64)), max_tokens=64)
    with pytest.raises(DataError, match="'sequence_ids': 1"):
        pack_flat(replace(flat, sequence_ids=np.arange(1)), max_tokens=64)
    with pytest.raises(DataError, match="lengths is a 1-d array of float64"):
        pack_flat(replace(flat, lengths=np.array([3.0, 4.0])), max_tokens=64)


# --------------------------------------------------------------------------- the benchmark's own parts


def optimum(lengths: list[int], capacity: int) -> int:
    """Fewest packs by exhaustive search."""

    def search(rest: list[int], rooms: tuple[int, ...]) -> int:
        if not rest:
            return len(rooms)
        options = [search(rest[1:], (*rooms, capacity - rest[0]))]
        for at in range(len(rooms)):
            if rooms[at] >= rest[0]:
                options.append(search(rest[1:], (*rooms[:at], rooms[at] - rest[0], *rooms[at + 1 :])))
        return min(options)

    return search(lengths, ())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_lower_bound_never_exceeds_the_optimum_and_packs_never_undercut_it(lengths):
    best = optimum(lengths, 20)
    assert fewest_packs(np.array(lengths), 20) <= best
    _, offsets = packing._CORE.assign_packs(
        np.array(lengths), np.arange(len(lengths)), capacity=20, num_replicas=1, linear_work=1
    )
    # Johnson's theorem for decreasing heuristics: at most 11/9 of the optimum, plus 6/9
    assert best <= len(offsets) - 1 <= 11 / 9 * best + 6 / 9


def test_lower_bound_sees_sequences_that_cannot_share_a_pack():
    assert fewest_packs(np.array([6, 6, 6]), 10) == 3  # 18 tokens alone would need 2
    assert fewest_packs(np.array([9, 9, 2, 2, 2, 2, 2]), 10) == 3  # the nines leave no room: 2 + ceil(10 / 10)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=50))
def test_both_first_fit_rivals_make_the_same_packs(lengths):
    assert first_fit_scan(lengths, 30) == first_fit_tree(lengths, 30)
