"""A server may answer anything: what cannot have been asked for is refused, in little memory, in printable words."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Any

import numpy as np
import pytest

from megatron_tropd.errors import ServingError
from megatron_tropd.types import SamplingParams
from megatron_tropd.vllm_bridge.client import Refused, Server, Unreachable, WeightSteps
from megatron_tropd.vllm_bridge.requests import Task
from megatron_tropd.vllm_bridge.score_requests import ScoreRequest
from megatron_tropd.vllm_bridge.wire import DIGEST, encoded
from tests.support.attacks.server import asked_of, reply

VOCAB = 40
TASK = Task(number=3, token_ids=np.arange(5), max_new_tokens=4, seed=0)
PARAMS = SamplingParams(max_new_tokens=4, stop_token_ids=(1,))
SCORE = ScoreRequest(number=7, token_ids=np.arange(4), top_k=2)
GOOD_TEXT: dict[str, Any] = {
    "token_ids": np.array([5, 6, 7, 1]),
    "logprob": np.full(4, -1.0, np.float32),
    "versions": np.full(4, 2),
    "finished": np.array([True]),
}
GOOD_SCORES: dict[str, Any] = {
    "logprob": np.full(3, -1.0, np.float32),
    "topk_ids": np.array([[1, 2], [3, 4], [5, 6]], np.int32),
    "topk_logprob": np.full((3, 2), -1.5, np.float32),
}


def write(server: Server) -> Any:
    steps = WeightSteps(oldest=1, newest=lambda: 3)
    return server.write(TASK, PARAMS, forbidden=range(VOCAB, VOCAB), weights=steps, timeout_s=60)


def score(server: Server) -> Any:
    return server.answer(SCORE, timeout_s=60)


def test_good_answers_are_taken():
    assert asked_of(reply(encoded(GOOD_TEXT)), write).token_ids.tolist() == [5, 6, 7, 1]
    assert asked_of(reply(encoded(GOOD_SCORES)), score).topk_ids.tolist() == [[1, 2], [3, 4], [5, 6]]


@pytest.mark.parametrize(
    ("change", "named"),
    {
        "ids that are no whole numbers": ({"token_ids": np.array([5.0, 6.0, 7.0, 1.0])}, "ids of type float64"),
        "ids beyond the vocabulary": ({"token_ids": np.array([5, 6, 10**9, 1])}, "up to 1000000000; there are 40 ids"),
        "versions that are no whole numbers": ({"versions": np.full(4, 2.0)}, "weight versions of type float64"),
        "versions yet to come": ({"versions": np.full(4, 2**40)}, "with weights of step 1099511627776"),
        "one of them": ({"versions": np.array([2, 2, 4, 2])}, r"with weights of step 4 \(-1"),
        "versions of before": ({"versions": np.array([2, 0, 2, 2])}, r"with weights of step 0 \(-1"),
        "log-probs above 0": ({"logprob": np.full(4, 0.5, np.float32)}, "not finite or above 0"),
    }.values(),
)
def test_texts_that_cannot_be_are_refused(change: dict[str, Any], named: str):
    with pytest.raises(ServingError, match=named):
        asked_of(reply(encoded(GOOD_TEXT | change)), write)


@pytest.mark.parametrize(
    ("change", "named"),
    {
        "ids beyond the vocabulary": ({"topk_ids": np.full((3, 2), 10**9)}, "there are 40 ids"),
        "ids below 0": ({"topk_ids": np.array([[1, 2], [3, -4], [5, 6]])}, "ids below 0"),
        "ids that are no whole numbers": ({"topk_ids": np.ones((3, 2))}, "ids of type float64"),
        "an id twice": ({"topk_ids": np.array([[1, 2], [3, 3], [5, 6]])}, "an id listed twice"),
        "more than all of the mass": ({"topk_logprob": np.full((3, 2), -0.1, np.float32)}, "ids that hold 1.81 of"),
    }.values(),
)
def test_scores_that_cannot_be_are_refused(change: dict[str, Any], named: str):
    with pytest.raises(ServingError, match=named):
        asked_of(reply(encoded(GOOD_SCORES | change)), score)


def test_a_body_without_end_is_left_after_what_can_have_been_asked_for():
    sent = 0

    async def endless(writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        while True:
            writer.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
            await writer.drain()
            sent += 0x10000

    for call in (write, score, Server.info):
        with pytest.raises(ServingError, match=r"gave an answer of more than [0-9,]+ bytes"):
            asked_of(endless, call)
    assert sent < 64 << 20  # what sockets and buffers hold


def test_nothing_is_unpacked():
    bomb = gzip.compress(bytes(64 << 20), mtime=0)
    with pytest.raises(ServingError, match="an answer in the encoding gzip: none was allowed"):
        asked_of(reply(bomb, headers={"content-encoding": "gzip"}), Server.info)


@pytest.mark.parametrize(("status", "kind"), [("500 Oh", Unreachable), ("400 No", Refused)])
def test_control_characters_of_a_server_do_not_reach_a_terminal(status: str, kind: type[ServingError]):
    body = b"\x1b]0;owned\x07\x1b[2Jbad \xff thing\r\n" + b"x" * 10_000
    with pytest.raises(kind, match=r"bad . thing") as caught:
        asked_of(reply(body, status=status), Server.info)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 700


def test_an_object_with_a_wrong_checksum_is_refused():
    body = json.dumps({"vocab_size": 3}).encode()
    with pytest.raises(ServingError, match="the checksum does not match"):
        asked_of(reply(body, headers={DIGEST: "0"}), Server.info)
