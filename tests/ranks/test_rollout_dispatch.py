"""What is asked of a sampler, how it is dealt out, and that what comes back is put together as it was written."""

from __future__ import annotations

import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megatron_tropd.engine.decode import Continuation
from megatron_tropd.errors import ConfigError, DataError
from megatron_tropd.rollout import dispatch as spread
from megatron_tropd.rollout.guidance import make_requests
from megatron_tropd.types import Prompt, RolloutRequest, SamplingParams

RESPONSE = np.array([11, 12, 13, 14, 15, 16, 0])


def prompt(index: int, response: np.ndarray | None = RESPONSE) -> Prompt:
    return Prompt(index=index, token_ids=np.array([1, 2, index]), text="", response_ids=response)


def test_requests_are_numbered_prompt_by_prompt_and_only_guided_ones_have_a_prefix():
    requests = make_requests([prompt(5), prompt(3)], samples=2, guided=1, fraction=0.5, max_new_tokens=20)
    assert [(r.sequence_id, r.prompt_index, len(r.prefix_ids)) for r in requests] == [
        (0, 5, 0), (1, 5, 0), (2, 5, 3), (3, 3, 0), (4, 3, 0), (5, 3, 3),
    ]  # fmt: skip
    assert all(r.prompt_ids.tolist() == [1, 2, r.prompt_index] for r in requests)


@pytest.mark.parametrize(
    ("fraction", "budget", "prefix", "left"),
    [
        (0.0, 20, [], 20),
        (0.5, 20, [11, 12, 13], 17),  # floor(3.5)
        (0.99, 20, [11, 12, 13, 14, 15, 16], 14),
        (1.0, 20, RESPONSE.tolist(), 0),  # the whole response: nothing to continue
        (1.0, 7, RESPONSE.tolist(), 0),
        (1.0, 4, [11, 12, 13, 14], 0),  # cut by the budget, from its end
        (0.5, 3, [11, 12, 13], 0),
    ],
)
def test_a_prefix_is_the_start_of_the_response_and_counts_against_the_budget(fraction, budget, prefix, left):
    (request,) = make_requests([prompt(0)], samples=0, guided=1, fraction=fraction, max_new_tokens=budget)
    assert (request.prefix_ids.tolist(), request.max_new_tokens) == (prefix, left)


@pytest.mark.parametrize(("fraction", "left"), [(1.0, 14), (0.99, 15)])
def test_what_was_cut_off_may_be_continued_when_all_of_it_is_taken(fraction, left):
    cut = replace(prompt(0, RESPONSE[:-1]), response_finished=False)
    (request,) = make_requests([cut], samples=0, guided=1, fraction=fraction, max_new_tokens=20)
    assert request.max_new_tokens == left and len(request.prefix_ids) == 20 - left


def test_guidance_needs_a_response():
    with pytest.raises(DataError, match="prompt 4 has no teacher response"):
        make_requests([prompt(4, None)], samples=1, guided=1, fraction=0.5, max_new_tokens=9)
    assert len(make_requests([prompt(4, None)], samples=2, guided=0, fraction=0.5, max_new_tokens=9)) == 2


def request(**changes: Any) -> RolloutRequest:
    given = {"sequence_id": 3, "prompt_index": 8, "prompt_ids": np.array([1, 2]), "prefix_ids": np.array([5])}
    return RolloutRequest(**(given | {"max_new_tokens": 4} | changes))


def test_a_sequence_may_fill_the_positions_of_the_model_and_no_more():
    assert [context.tolist() for context in spread.contexts_of([request()], 7)] == [[1, 2, 5]]
    with pytest.raises(ConfigError, match=r"prompt 8: 3 tokens of prompt and prefix plus 4 new ones exceed .* 6 "):
        spread.contexts_of([request()], 6)


def test_the_costliest_work_is_dealt_first_and_to_the_least_loaded():
    # by hand, for two: 5 to A, 4 to B, 3 to B (7), 2 to A (7), 1 to A
    costs = [3.0, 1.0, 2.0, 5.0, 4.0]
    dealt = [spread.assigned_to(SimpleNamespace(num_replicas=2, replica=r), costs) for r in range(2)]
    assert dealt == [[3, 2, 1], [4, 0]]
    assert spread.assigned_to(SimpleNamespace(num_replicas=1, replica=0), costs) == [3, 4, 0, 2, 1]
    assert spread.assigned_to(SimpleNamespace(num_replicas=7, replica=6), costs) == []


def test_continuations_of_all_ranks_come_back_as_they_were_written(monkeypatch):
    def one(*tokens: int, finished: bool = True) -> Continuation:
        sampled = np.array([-0.5 * token for token in tokens], np.float32)
        return Continuation(np.array(tokens, dtype=np.int64), sampled, 3 * sampled, finished)

    done = [{4: one(7, 8, 9), 0: one(finished=False), 2: one(5, finished=False)}, {}, {3: one(6, 6), 1: one(1)}]
    gathered: list[list[np.ndarray]] = [[] for _ in range(3)]
    barrier, own = threading.Barrier(3, timeout=60), threading.local()

    def gather(array: np.ndarray, group: Any) -> list[np.ndarray]:
        gathered[own.rank] = array
        barrier.wait()
        found = list(gathered)
        barrier.wait()
        return found

    monkeypatch.setattr(spread, "all_gather_arrays", gather)
    results: list[dict[int, Continuation]] = [{}, {}, {}]

    def work(rank: int) -> None:
        own.rank = rank
        results[rank] = spread.exchange(done[rank], None)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = {number: item for part in done for number, item in part.items()}
    for found in results:
        assert found.keys() == expected.keys()
        for number, item in expected.items():
            assert found[number].finished is item.finished
            for name in ("token_ids", "sampling_logprob", "model_logprob"):
                np.testing.assert_array_equal(getattr(found[number], name), getattr(item, name), err_msg=name)


def test_a_response_that_is_all_prefix_is_finished_when_it_ends_in_a_stop_token():
    params = SamplingParams(max_new_tokens=4, stop_token_ids=(0, 9))
    for last, finished in ((9, True), (5, False)):
        whole = request(prefix_ids=np.array([5, last]), max_new_tokens=0)
        (context,) = spread.contexts_of([whole], 4)
        rollout = spread.to_rollout(whole, context, None, params, version=6)
        assert (rollout.finished, rollout.region_L.tolist()) == (finished, [0, 0, 1, 1])
        assert rollout.token_ids.tolist() == [1, 2, 5, last] and len(rollout.model_logprob) == 0
        assert spread.versions_of(rollout).tolist() == []


def test_every_token_of_a_continuation_has_the_version_that_wrote_it():
    said = Continuation(np.array([7, 8]), np.float32([-1, -2]), np.float32([-3, -4]), False)
    (context,) = spread.contexts_of([request()], 9)
    params = SamplingParams(max_new_tokens=4)
    rollout = spread.to_rollout(request(), context, said, params, version=6)
    assert rollout.token_ids.tolist() == [1, 2, 5, 7, 8] and (rollout.sequence_id, rollout.prompt_index) == (3, 8)
    assert (rollout.sampling_logprob.tolist(), rollout.model_logprob.tolist()) == ([-1, -2], [-3, -4])
    assert spread.versions_of(rollout).tolist() == [6, 6] and not rollout.finished
    mixed = spread.to_rollout(request(), context, said, params, version=6, token_versions=np.array([5, 6]))
    assert spread.versions_of(mixed).tolist() == [5, 6]
