"""``tropd score`` scores what is missing in a directory, once: more fields, more candidates, another cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_tropd.commands.score import _Known
from megatron_tropd.teacher.schema import TeacherRequest
from megatron_tropd.teacher.store import SequenceScores, Store, sequence_key, write_part
from megatron_tropd.types import Region, Rollout, regions_of, single_turn

TOKENS = np.arange(9)
LEAST = TeacherRequest(entropy=False)


def rollout(region_L: np.ndarray, token_ids: np.ndarray = TOKENS) -> Rollout:
    written = np.full(np.count_nonzero(region_L == Region.CONTINUATION), np.nan, np.float32)
    return Rollout(
        sequence_id=0,
        prompt_index=0,
        token_ids=token_ids,
        region_L=region_L,
        sampling_logprob=written,
        model_logprob=written,
        finished=True,
    )


def cut(prompt: int) -> Rollout:
    return rollout(single_turn(prompt=prompt, prefix=9 - prompt))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Holds the predictions of tokens 5 to 8, with entropies and three candidates."""
    fields = {
        "logprob": torch.zeros(4),
        "topk_ids": torch.zeros(4, 3, dtype=torch.int64),
        "topk_logprob": torch.zeros(4, 3),
        "logtail": torch.zeros(4),
        "entropy": torch.zeros(4),
    }
    item = SequenceScores(key=sequence_key(TOKENS), position=np.arange(4, 8), fields=fields)
    write_part(tmp_path, [item], vocab_size=9, values="fp16")
    return Store(tmp_path)


@pytest.mark.parametrize(
    ("request_", "new"),
    [
        (LEAST, False),
        (TeacherRequest(top_k=3, tail_mass=True, entropy_needed=True), False),
        (TeacherRequest(top_k=2), False),
        (TeacherRequest(top_k=4), True),
        (TeacherRequest(base=True), True),
        (TeacherRequest(hidden_states=True), True),
        (TeacherRequest(queries=1), True),
    ],
)
def test_a_sequence_is_known_when_it_has_all_that_is_requested(store: Store, request_: TeacherRequest, new: bool):
    known = _Known(store, request_)
    assert known.is_new(cut(5)) is new
    assert not known.is_new(cut(5)), "scored once"


def test_another_cut_of_the_same_tokens_is_known_when_its_predictions_are(store: Store):
    assert [_Known(store, LEAST).is_new(cut(prompt)) for prompt in (4, 5, 6, 9)] == [True, False, False, False]
    # an answer of a tool between two of the student's: tokens 5 and 8, and 3 and 8
    for first, new in ((5, False), (3, True)):
        stretches = ((Region.PROMPT, first), (Region.CONTINUATION, 1), (Region.OBSERVATION, 7 - first))
        assert _Known(store, LEAST).is_new(rollout(regions_of(*stretches, (Region.CONTINUATION, 1)))) is new


def test_two_cuts_in_one_pass_are_scored_once_each_and_the_narrower_not_after_the_wider(store: Store):
    others = np.arange(10, 19)
    narrow, wide = (rollout(single_turn(prompt=n, prefix=9 - n), others) for n in (5, 2))
    known = _Known(store, LEAST)
    assert [known.is_new(one) for one in (narrow, wide, narrow, wide)] == [True, True, False, False]
    known = _Known(store, LEAST)
    assert [known.is_new(one) for one in (wide, narrow)] == [True, False]
