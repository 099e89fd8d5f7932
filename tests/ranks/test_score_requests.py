"""What a vLLM teacher is asked, what follows from its answers, and what it is not asked: all without vLLM."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.special
import torch

from megatron_tropd.config.loading import load_config
from megatron_tropd.errors import ConfigError, ServingError
from megatron_tropd.losses.support import entropy_at_most, log_tail
from megatron_tropd.setup.validate import check_method, check_teacher, teacher_request
from megatron_tropd.vllm_bridge.requests import TeacherScores
from megatron_tropd.vllm_bridge.score_requests import ScoreRequest, Whole, answer_of, checked_answer, in_batches
from tests.support.run_inputs import Task, commands, make_task

VOCAB = 23


def told(logp_LV: np.ndarray, token_ids: np.ndarray, columns: int) -> tuple[list[int], list[float]]:
    """As vLLM's flat prompt log-probs: per token after the first, its own and then the likeliest ids."""
    ids, logprobs = [], []
    for row, token in enumerate(token_ids[1:].tolist()):
        order = [token, *np.argsort(-logp_LV[row], kind="stable")[:columns].tolist()]
        ids += order
        logprobs += logp_LV[row][order].tolist()
    return ids, logprobs


@pytest.fixture
def sequence() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    return scipy.special.log_softmax(3 * rng.normal(size=(11, VOCAB)), axis=1), rng.integers(0, VOCAB, 12)


READ = np.array([2, 3, 4, 8, 10])  # two stretches and a last prediction


@pytest.mark.parametrize("positions", [np.arange(4, 11), READ, np.array([0]), None], ids=str)
def test_the_likeliest_ids_are_what_was_told_of_the_predictions_that_count(sequence, positions):
    logp, token_ids = sequence
    question = ScoreRequest(number=3, token_ids=token_ids, positions=positions, top_k=5)
    same = ScoreRequest.of_json(json.loads(json.dumps(question.as_json())))
    read = np.arange(11) if positions is None else positions
    for asked in (question, same):
        graded = checked_answer(answer_of(asked, *told(logp, token_ids, 5)), question)
        np.testing.assert_allclose(graded.logprob, logp[read, token_ids[read + 1]], rtol=1e-6)
        assert (graded.topk_ids == np.argsort(-logp[read], axis=1)[:, :5]).all() and graded.entropy is None


@pytest.mark.parametrize("positions", [[-1, 2], [3, 11], [4, 4], [5, 2], [1.5], [[1, 2]], ["a"], 3])
def test_a_server_refuses_positions_that_no_sequence_has(positions):
    asked = {"token_ids": list(range(12)), "top_k": 1, "positions": positions}
    with pytest.raises((TypeError, ValueError), match="positions must"):
        ScoreRequest.of_json(asked)


def test_a_request_of_an_older_version_is_refused_instead_of_answered_for_other_predictions():
    with pytest.raises(ValueError, match="older version"):
        ScoreRequest.of_json({"token_ids": [1, 2, 3], "top_k": 1, "first": 1})


def test_from_all_ids_follow_another_temperature_fewer_ids_entropy_and_the_mass_of_the_rest(sequence):
    logp, token_ids = sequence
    token_ids %= VOCAB - 4
    asked = np.array([[1, 7, int(token_ids[t + 1])] for t in READ])
    whole = Whole(temperature=0.6, vocab_size=VOCAB - 4, query_ids=asked)
    question = ScoreRequest(number=0, token_ids=token_ids, positions=READ, top_k=3, whole=whole)
    same = ScoreRequest.of_json(question.as_json())
    assert same.whole is not None and (same.whole.query_ids == asked).all() and (same.read_n == READ).all()
    graded = checked_answer(answer_of(same, *told(logp, token_ids, VOCAB)), question)
    expected = scipy.special.log_softmax(logp[READ, : VOCAB - 4] / 0.6, axis=1)
    np.testing.assert_allclose(graded.logprob, expected[np.arange(5), token_ids[READ + 1]], rtol=1e-5)
    np.testing.assert_allclose(graded.topk_logprob, -np.sort(-expected, axis=1)[:, :3], rtol=1e-5)
    np.testing.assert_allclose(graded.query_logprob, np.take_along_axis(expected, asked, axis=1), rtol=1e-5)
    np.testing.assert_allclose(graded.entropy, scipy.special.entr(np.exp(expected)).sum(1), rtol=1e-5)
    for row in range(5):
        listed = {*asked[row].tolist(), *graded.topk_ids[row].tolist(), int(token_ids[READ[row] + 1])}
        rest = [i for i in range(VOCAB - 4) if i not in listed]
        assert graded.logtail[row] == pytest.approx(scipy.special.logsumexp(expected[row][rest]), rel=1e-5)


def test_an_answer_of_another_size_is_refused(sequence):
    logp, token_ids = sequence
    ids, logprobs = told(logp, token_ids, 5)
    question = ScoreRequest(number=3, token_ids=token_ids, top_k=5)
    with pytest.raises(ServingError, match="sequence 3 with 65 ids and 66 log-probs for 11 tokens"):
        answer_of(question, ids[:-1], logprobs)
    with pytest.raises(ServingError, match="sequence 3 with arrays of shapes"):
        checked_answer(answer_of(question, *told(logp, token_ids, 4)), question)
    whole = Whole(vocab_size=VOCAB, query_ids=np.empty((11, 0), np.int64))
    question = ScoreRequest(number=3, token_ids=token_ids, top_k=5, whole=whole)
    with pytest.raises(ServingError, match=f"sequence 3 with 5 ids, not with all {VOCAB}"):
        answer_of(question, ids, logprobs)
    ids_NK, logprob_NK = np.tile(np.arange(5), (11, 1)), np.full((11, 5), -2.0)
    bare = TeacherScores(logprob=np.zeros(11), topk_ids=ids_NK, topk_logprob=logprob_NK)
    with pytest.raises(ServingError, match="without all that was requested"):
        checked_answer(bare, question)


def test_questions_are_batched_by_the_size_of_their_answers():
    questions = [
        ScoreRequest(number=n, token_ids=np.zeros(length), top_k=9) for n, length in enumerate((3, 2, 1, 9, 1, 1))
    ]
    batches = in_batches(questions, vocab_size=VOCAB, most_values=50)
    assert [[q.number for q in batch] for batch in batches] == [[0, 1], [2], [3], [4, 5]]
    assert in_batches([], vocab_size=VOCAB, most_values=50) == []


def test_the_bound_of_the_entropy_is_the_entropy_where_the_rest_is_even_and_above_it_elsewhere():
    torch.manual_seed(0)
    logp = (2 * torch.randn(40, VOCAB, dtype=torch.float64)).log_softmax(-1)
    logp[:20, 6:] = logp[:20, 6:].logsumexp(-1, keepdim=True) - np.log(VOCAB - 6)
    exact = torch.from_numpy(scipy.special.entr(logp.exp().numpy()).sum(1))
    mask = torch.ones(40, 6, dtype=torch.bool)
    bound = entropy_at_most(logp[:, :6], log_tail(logp[:, :6], mask), mask, vocab_size=VOCAB)
    torch.testing.assert_close(bound[:20], exact[:20], rtol=1e-9, atol=1e-9)
    assert (bound[20:] > exact[20:]).all()
    whole = entropy_at_most(logp, log_tail(logp), vocab_size=VOCAB)
    torch.testing.assert_close(whole, exact, rtol=1e-9, atol=1e-9)
    # an id that is listed twice counts once
    twice = torch.cat([logp[:, :1], logp[:, :6]], dim=1)
    mask = torch.tensor([True, False, True, True, True, True, True]).expand(40, 7)
    again = entropy_at_most(twice, log_tail(twice, mask), mask, vocab_size=VOCAB)
    torch.testing.assert_close(again, bound, rtol=1e-9, atol=1e-9)


# --------------------------------------------------------------------------- from packs to signals


def test_signals_are_put_together_from_the_answers_to_every_sequence_of_every_pack():
    commands().call(signals_of_a_model_that_looks_at_one_token)


def signals_of_a_model_that_looks_at_one_token() -> None:
    """Its log-probs are a table: what any signal must be can be read off it. One pack carries no loss."""
    from megatron_tropd.config.sections import Layout
    from megatron_tropd.data.packing import pack
    from megatron_tropd.parallel.groups import GroupBuilder, initialize_distributed
    from megatron_tropd.teacher.engines.vllm import VLLMTeacher
    from megatron_tropd.teacher.protocol import TeacherRequest
    from megatron_tropd.types import Rollout, single_turn

    device, rng = initialize_distributed(), np.random.default_rng(1)
    table_VV = scipy.special.log_softmax(2 * rng.normal(size=(VOCAB, VOCAB)), axis=1)

    class Table:
        def answer(self, questions: Any) -> list[TeacherScores]:
            answers = []
            for question in questions:
                assert question.read_n[-1] == len(question.token_ids) - 2, "read to its last prediction, no further"
                logp = table_VV[question.token_ids[:-1]]
                columns = VOCAB if question.whole is not None else question.top_k
                answers.append(answer_of(question, *told(logp, question.token_ids, columns)))
            return answers

        def close(self) -> None: ...

    def rollout(number: int, prompt: int, prefix: int, written: int) -> Rollout:
        nothing = np.zeros(written, np.float32)
        return Rollout(
            sequence_id=number,
            prompt_index=number,
            token_ids=rng.integers(0, VOCAB, prompt + prefix + written),
            region_L=single_turn(prompt=prompt, prefix=prefix, continuation=written),
            sampling_logprob=nothing,
            model_logprob=nothing,
            finished=True,
        )

    turns = replace(rollout(6, 2, 0, 9), region_L=np.array([0, 0, 2, 2, 4, 4, 4, 1, 2, 4, 4], np.uint8))
    full = pack([turns, *(rollout(i, 1 + i, i % 2, 3 + i) for i in range(6))], max_tokens=20, multiple_of=4)[0]
    packs = [[*full, *pack([rollout(9, 5, 0, 0)], max_tokens=20)[0]]]
    assert packs[0][-1].num_valid == 0 and len(full) > 1
    groups = GroupBuilder().build(Layout())
    options: Any = {"vocab_size": VOCAB}
    spec = TeacherRequest(top_k=4, entropy=False, entropy_bound=True, tail_mass=True)
    told_signals = VLLMTeacher(Table(), groups, groups, device, **options).score(packs, spec)
    asked = [torch.from_numpy(rng.integers(0, VOCAB, (item.num_valid, 3))) for item in packs[0]]
    ends = (5, 2)
    spec = TeacherRequest(top_k=4, queries=3, tail_mass=True, end_ids=ends)
    whole = VLLMTeacher(Table(), groups, groups, device, temperature=0.5, whole=True, **options)
    all_signals = whole.score(packs, spec, asked)
    for item, ids_NJ, a, b in zip(packs[0], asked, told_signals, all_signals, strict=True):
        assert a is not None and b is not None
        valid = (item.region_T == 1) | (item.region_T == 2)
        seen, target = item.token_T[valid], item.target_T[valid]
        rows = np.arange(len(seen))
        for signal, logp_NV in (
            (a, table_VV[seen]),
            (b, scipy.special.log_softmax(table_VV[seen] / 0.5, axis=1)),
        ):
            top_NK = np.argsort(-logp_NV, axis=1)[:, :4]
            np.testing.assert_allclose(signal.logprob_N, logp_NV[rows, target], rtol=1e-5)
            np.testing.assert_array_equal(signal.topk_ids_NK, top_NK)
            np.testing.assert_allclose(signal.topk_logprob_NK, np.take_along_axis(logp_NV, top_NK, 1), rtol=1e-5)
            listed_NX = np.concatenate([target[:, None], top_NK], axis=1)
            if signal is b:
                np.testing.assert_allclose(
                    b.query_logprob_NJ, np.take_along_axis(logp_NV, ids_NJ.numpy(), 1), rtol=1e-5
                )
                np.testing.assert_allclose(b.entropy_N, scipy.special.entr(np.exp(logp_NV)).sum(1), rtol=1e-5)
                np.testing.assert_allclose(b.end_logprob_NX, logp_NV[:, list(ends)], rtol=1e-5)
                end_NX = np.tile(ends, (len(seen), 1))
                listed_NX = np.concatenate([listed_NX, ids_NJ.numpy(), end_NX], axis=1)
            outside = np.exp(logp_NV)
            np.put_along_axis(outside, listed_NX, 0.0, axis=1)
            np.testing.assert_allclose(np.exp(signal.logtail_N), outside.sum(1), rtol=1e-4, atol=1e-6)
        entropy = scipy.special.entr(np.exp(table_VV[seen])).sum(1)
        assert a.entropy_bound_N is not None and (a.entropy_bound_N.numpy() >= entropy - 1e-5).all()


# --------------------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tmp_path_factory.mktemp("task"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["method.trusted=rkl_full"], "needs the teacher's hidden states; teacher.engine=vllm reports log-probs only"),
        (["method.support=student"], "method.support=student needs the log-probs of ids that the student names"),
        (["method.support=union"], "method.support=union needs the log-probs of ids that the student names"),
        (["method.temperature=0.9"], "method.temperature=0.9 is not 1, but teacher.engine=vllm reports"),
        (["teacher.model=LARGER"], "the models share 50 of the teacher's 60 ids, over which its softmax runs"),
    ],
)
def test_what_vllm_cannot_tell_is_refused_unless_it_tells_all_ids(task: Task, changes: list[str], message: str):
    larger = "teacher.model=LARGER" in changes
    changes = [change for change in changes if not change.startswith("teacher.model")]
    config = load_config(task.config, ["teacher.engine=vllm", *changes])
    inputs = inputs_of(config, 50, 60 if larger else 50)
    with pytest.raises(ConfigError, match=message):
        check_teacher(config, inputs)
    assert teacher_request(config, inputs.method).entropy is False
    if "hidden" not in message:
        config = load_config(task.config, ["teacher.engine=vllm", "teacher.whole_vocabulary=true", *changes])
        check_teacher(config, inputs_of(config, 50, 60))
        assert teacher_request(config, inputs.method).entropy
    # a recording says whatever it was recorded with
    check_teacher(
        load_config(task.config, ["teacher.engine=vllm", f"teacher.recorded_from={Path()}", *changes]), inputs
    )


def test_a_method_that_needs_the_exact_entropy_is_refused(task: Task):
    text = task.config.read_text().replace("name: tropd\n  k: 7\n  beta: 0.3", "name: eopd")
    path = task.directory / "eopd.yaml"
    path.write_text(text)
    config = load_config(path, ["teacher.engine=vllm"])
    with pytest.raises(ConfigError, match=r"method.name=eopd with these options needs the teacher's exact entropy"):
        check_teacher(config, inputs_of(config, 50, 50))


def inputs_of(config: Any, shared: int, teacher: int) -> Any:
    from types import SimpleNamespace

    return SimpleNamespace(method=check_method(config), vocab_size=shared, teacher=SimpleNamespace(vocab_size=teacher))
