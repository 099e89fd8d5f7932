"""Answers are graded against their own problem, whoever grades them; the records of suites say what was measured."""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from megatron_tropd.config.sections import DataConfig, SourceConfig, SuiteConfig
from megatron_tropd.data.table import table_of
from megatron_tropd.errors import DataError, SandboxError
from megatron_tropd.evaluate import suites as evaluation
from megatron_tropd.evaluate.grader_pool import Grade
from megatron_tropd.evaluate.rules import GradingRule
from megatron_tropd.methods import build_method
from megatron_tropd.report.table import accuracy_table
from megatron_tropd.train import sample_report as samples
from megatron_tropd.types import Prompt, Rollout, RolloutRequest, SamplingParams, single_turn

END = 0
EXACT = GradingRule(kind="exact")


class Letters:
    """Token i is the i-th letter; 0 and 99 end a response and show as nothing."""

    eos_ids = (END, 99)

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(chr(96 + i) for i in ids if i not in self.eos_ids)

    response_text = decode

    def tokens(self, ids: Sequence[int]) -> list[str]:
        return [self.decode([i]) for i in ids]


def ids(text: str) -> np.ndarray:
    return np.array([ord(letter) - 96 for letter in text], dtype=np.int64)


def problems(*answers: str | None, **options: Any) -> list[Prompt]:
    """Prompts of different lengths, which hold none of the answers."""
    return [
        Prompt(index=10 + i, token_ids=ids("z" * (i + 1)), text=f"problem {i}", answer=answer, **options)
        for i, answer in enumerate(answers)
    ]


@dataclass
class Says:
    """A sampler that answers in the order given; an answer with a full stop ends by itself."""

    answers: Sequence[str]
    asked: list[tuple[Sequence[RolloutRequest], SamplingParams, int, int]] = field(default_factory=list)

    def generate(
        self, requests: Sequence[RolloutRequest], params: SamplingParams, *, seed: int, step: int
    ) -> list[Rollout]:
        self.asked.append((requests, params, seed, step))
        return [rollout(request, answer) for request, answer in zip(requests, self.answers, strict=True)]


def rollout(request: RolloutRequest, answer: str) -> Rollout:
    said = np.append(ids(answer[:-1]), END) if answer.endswith(".") else ids(answer)
    return Rollout(
        sequence_id=request.sequence_id,
        prompt_index=request.prompt_index,
        token_ids=np.concatenate([request.prompt_ids, request.prefix_ids, said]),
        region_L=single_turn(prompt=len(request.prompt_ids), prefix=len(request.prefix_ids), continuation=len(said)),
        sampling_logprob=np.zeros(len(said), np.float32),
        model_logprob=np.zeros(len(said), np.float32),
        finished=answer.endswith("."),
    )


def suite(**options: Any) -> SuiteConfig:
    return SuiteConfig(name="s", grader="exact", max_new_tokens=9, **options)


def test_answers_are_graded_against_their_own_problem_and_counted():
    said = ["ab.", "cd", "ab.", "cd.", "ab.", "efgh."]
    sampler = Says(said)
    config = suite(samples=2, temperature=0.5, top_p=0.9, top_k=7)
    found = evaluation.answer_suite(sampler, config, problems("ab", "cd", "ef"), Letters(), seed=5)
    np.testing.assert_array_equal(found.right, [[1, 0], [0, 1], [0, 0]])
    assert found.mean_length == pytest.approx((3 + 2 + 3 + 3 + 3 + 5) / 6)  # end tokens are tokens
    assert found.finished == pytest.approx(5 / 6) and found.timed_out == 0
    ((requests, params, seed, step),) = sampler.asked
    assert [request.prompt_index for request in requests] == [10, 10, 11, 11, 12, 12]
    assert params == SamplingParams(max_new_tokens=9, temperature=0.5, top_p=0.9, top_k=7, stop_token_ids=(0, 99))
    assert (seed - 5, step) == (1 << 40, 0)  # not the draws of training


def test_the_teacher_s_prefix_is_part_of_the_answer_and_the_prompt_is_not():
    request = RolloutRequest(
        sequence_id=0, prompt_index=0, prompt_ids=ids("zz"), prefix_ids=ids("ab"), max_new_tokens=3
    )
    assert evaluation.answer_text(rollout(request, "cd."), Letters()) == "abcd"


class UpToTheEnd(Letters):
    def response_text(self, ids: Sequence[int]) -> str:
        return self.decode(list(takewhile(lambda i: i not in self.eos_ids, ids)))


def test_what_a_tool_said_is_no_part_of_the_answer_and_every_turn_is_read_to_its_own_end():
    one = problems(None)[0]
    request = RolloutRequest(
        sequence_id=0, prompt_index=0, prompt_ids=one.token_ids, prefix_ids=ids(""), max_new_tokens=9
    )
    whole = rollout(request, "abzzc.")
    assert whole.region_L.tolist() == [0, 2, 2, 2, 2, 2, 2]
    turns = np.array([0, 2, 2, 4, 4, 2, 2], np.uint8)
    ended = replace(whole, region_L=turns, token_ids=np.array([26, 1, END, 26, 26, 3, END]))
    assert evaluation.answer_text(replace(whole, region_L=turns), UpToTheEnd()) == "abc"
    assert evaluation.answer_text(ended, UpToTheEnd()) == "ac"


def test_a_shown_answer_gives_observations_neither_gate_nor_ratio_and_others_their_own():
    request = RolloutRequest(sequence_id=0, prompt_index=0, prompt_ids=ids("zz"), prefix_ids=ids(""), max_new_tokens=9)
    turns = np.array([0, 0, 1, 2, 4, 4, 2], np.uint8)
    gate = np.array([[1.0, -0.5], [0.0, -1.5], [1.0, -2.5]])
    run: Any = SimpleNamespace(tokenizer=Letters())
    tokens = samples._sample_tokens(run, replace(rollout(request, "abcde"), region_L=turns), gate)
    assert [(t.text, t.region, t.trusted, t.log_ratio) for t in tokens] == [
        ("a", "prefix", None, -0.5),
        ("b", "continuation", False, -1.5),
        ("c", "observation", None, None),
        ("d", "observation", None, None),
        ("e", "continuation", True, -2.5),
    ]


def test_a_problem_without_an_answer_is_refused_by_number():
    with pytest.raises(DataError, match="problem 11 has no reference answer"):
        evaluation.answer_suite(Says(["ab.", "cd."]), suite(), problems("ab", None), Letters(), seed=0)


def test_the_rule_of_a_training_prompt_is_that_of_its_source():
    listed = [SourceConfig(name="own", prompts=(Path("a"),), grader="choice"), SourceConfig(name="b", prompts=("b",))]
    data = DataConfig(sources=tuple(listed), grader="regex")
    kinds = {name: evaluation.training_rule(data, problems("x", source=name)[0]).kind for name in ("own", "b", "")}
    assert kinds == {"own": "choice", "b": "regex", "": "regex"}


def test_samples_of_one_problem_are_not_counted_as_independent_and_one_each_is_wilsons():
    each = evaluation.Answered(right=np.array([[1.0], [1.0], [1.0], [0.0], [0.0]]), mean_length=1.0)
    alone = evaluation.summarize(each, suite(), model="teacher")
    assert (alone.low, alone.high) == (pytest.approx(0.2307, abs=1e-4), pytest.approx(0.8824, abs=1e-4))
    # all samples of a problem agree: worth one each, so the interval is that of 5 draws with their spread (ddof=1),
    # 0.24 / (0.3 / 5) = 4 of them; Wilson's interval of 0.6 with n = 4, by hand
    same = evaluation.Answered(right=np.repeat(each.right, 8, axis=1), mean_length=1.0, finished=0.5, timed_out=3)
    summary = evaluation.summarize(same, suite(samples=8, temperature=1.0, pass_at=(1, 8)), model="m", step=4)
    z, n = 1.959964, 4
    half = z / (1 + z**2 / n) * (0.24 / n + z**2 / (4 * n**2)) ** 0.5
    center = (0.6 + z**2 / (2 * n)) / (1 + z**2 / n)
    assert (summary.low, summary.high) == (pytest.approx(center - half), pytest.approx(center + half))
    assert (summary.problems, summary.samples, summary.step, summary.finished, summary.timed_out) == (5, 8, 4, 0.5, 3)
    assert list(summary.pass_at) == ["1", "8"]
    for interval in summary.pass_at.values():  # 8 answers that agree say no more than one
        assert interval == pytest.approx([0.6, center - half, center + half])


# --------------------------------------------------------------------------- several ranks


class Ranks:
    """As much of ``torch.distributed`` as ranks that are threads need."""

    def __init__(self, count: int) -> None:
        self._count, self._own = count, threading.local()
        self._barrier, self._parts = threading.Barrier(count, timeout=60), [None] * count

    def run(self, function: Callable[[], Any]) -> list[Any]:
        results: list[Any] = [None] * self._count

        def work(rank: int) -> None:
            self._own.rank = rank
            results[rank] = function()

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self._count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results

    def is_initialized(self) -> bool:
        return True

    def get_world_size(self) -> int:
        return self._count

    def get_rank(self) -> int:
        return self._own.rank

    def all_gather_object(self, into: list[Any], mine: Any) -> None:
        self._parts[self.get_rank()] = mine
        self._barrier.wait()
        into[:] = self._parts
        self._barrier.wait()


@pytest.mark.parametrize("count", [2, 3, 8])
def test_ranks_that_share_the_grading_all_know_every_verdict_in_order(monkeypatch, count):
    monkeypatch.setattr(evaluation, "dist", ranks := Ranks(count))
    said = ["ab", "x", "x", "cd", "ef", "ef", "x"]
    requests = evaluation.make_requests(
        problems("ab", "b", "c", "cd", "ef", "f", "g"), samples=1, guided=0, fraction=0.0, max_new_tokens=9
    )
    rollouts = Says(said).generate(requests, SamplingParams(max_new_tokens=9), seed=0, step=0)
    graded = problems("ab", "b", "c", "cd", "ef", "f", "g")
    found = ranks.run(
        lambda: evaluation.correctness(rollouts, graded, Letters(), lambda _: EXACT, allow_code=False)[:, 0].tolist()
    )
    assert found == [[1, 0, 0, 1, 1, 0, 0]] * count


# --------------------------------------------------------------------------- answers shown in the report


def test_sampled_answers_stand_with_their_own_prompt_and_say_what_the_teacher_wrote():
    prompts = problems("ab", "cd", None, response_ids=np.array([1, 2, 3, 4, END]))
    run = SimpleNamespace(
        prompts=SimpleNamespace(first=lambda count: prompts[:count]),
        method=build_method("tropd"),
        rollout=SimpleNamespace(guided_per_prompt=1, max_new_tokens=9, temperature=1.0, top_p=1.0, top_k=0),
        train=SimpleNamespace(steps=6),
        data=DataConfig(prompts=(Path("p"),), grader="exact"),
        evaluate=SimpleNamespace(code_execution=False),
        seed=5,
        tokenizer=Letters(),
        scores_new=False,  # a recording has no grades for new answers
    )
    sampler = Says(["ab.", "c.", "ab.", "", "cd.", "x"])
    shown = samples.sample_answers(run, sampler, when="after", count=3)
    assert [(one.prompt, one.correct) for one in shown] == [
        ("problem 0", True), ("problem 0", False),  # of the guided ones the teacher wrote "ab"
        ("problem 1", False), ("problem 1", False),
        ("problem 2", None), ("problem 2", None),
    ]  # fmt: skip
    assert [token.text for token in shown[1].tokens] == ["a", "b", "c", ""]
    assert [token.region for token in shown[1].tokens] == ["prefix", "prefix", "continuation", "continuation"]
    assert {token.region for one in shown[::2] for token in one.tokens} == {"continuation"}
    assert sampler.asked[0][2:] == (5, 6)  # draws of no training step


def test_parts_of_a_sequence_are_joined_by_position_whichever_rank_has_them():
    own = {7: np.array([[4.0, 1, 0.4], [2, 0, 0.2]]), 9: np.array([[1.0, 1, 1.5]])}
    other = {7: np.array([[3.0, 0, 0.3]])}
    for parts in ([own, other], [other, own]):
        joined = samples._joined(parts)
        np.testing.assert_array_equal(joined[7], [[0, 0.2], [0, 0.3], [1, 0.4]])
        np.testing.assert_array_equal(joined[9], [[1, 1.5]])


def test_a_token_has_its_own_gate_and_log_ratio_and_a_prefix_no_gate():
    request = RolloutRequest(sequence_id=0, prompt_index=0, prompt_ids=ids("zz"), prefix_ids=ids("a"), max_new_tokens=3)
    gate = np.array([[1.0, -0.5], [0.0, -2.5], [1.0, 0.25]])
    run = SimpleNamespace(tokenizer=Letters())
    tokens = samples._sample_tokens(run, rollout(request, "bc"), gate)
    assert [token.trusted for token in tokens] == [None, False, True]
    assert [token.log_ratio for token in tokens] == [-0.5, -2.5, 0.25]


# --------------------------------------------------------------------------- answers that are kept


def test_every_answer_of_a_kept_suite_is_a_line_beside_the_evaluation(tmp_path):
    model = evaluation.EvaluatedModel(name="m x", step=3, answers_dir=tmp_path)
    asked = table_of(problems("ab", "cd"))
    asked.left_out = 5
    sampler = Says(["ab.", "cd", "ab.", "cd."])
    (result,) = evaluation.answer_suites(
        sampler,
        [suite(samples=2, temperature=1.0)],
        {"s": asked},
        Letters(),
        model=model,
        seed=0,
        allow_code=False,
    )
    assert (result.accuracy, result.problems, result.left_out, result.step) == (0.5, 2, 5, 3)
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("answers-m_x-") and file.name.endswith("-s.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["problem"], row["sample"], row["answer"], row["correct"]) for row in rows] == [
        (10, 0, "ab", True), (10, 1, "cd", False), (11, 0, "ab", False), (11, 1, "cd", True),
    ]  # fmt: skip
    assert [(row["finished"], row["tokens"]) for row in rows] == [(True, 3), (False, 2), (True, 3), (True, 3)]
    assert rows[0]["prompt"] == "problem 0" and rows[2]["reference"] == "cd"
    shown = Console(width=200, file=io.StringIO())
    shown.print(accuracy_table([result]))
    assert re.search(r"problems left out +5\b", shown.file.getvalue())


def test_an_answer_cut_in_thinking_that_its_prompt_opened_is_wrong():
    class Thinks(Letters):
        def tokens(self, ids: Sequence[int]) -> list[str]:
            return ["<think>" if i == 26 else self.decode([i]) for i in ids]

    found = evaluation.answer_suite(Says(["ab", "ab"]), suite(), problems("ab", "ab"), Thinks(), seed=0)
    assert found.right.tolist() == [[0], [0]]
    assert [one.answer for one in found.answers] == ["<think>ab"] * 2 and found.answers[0].note


def test_an_answer_to_a_useless_reference_cannot_be_told_in_training():
    prompts = problems("3", "some")
    requests = evaluation.make_requests(prompts, samples=1, guided=0, fraction=0.0, max_new_tokens=9)
    rollouts = Says(["c", "c"]).generate(requests, SamplingParams(max_new_tokens=9), seed=0, step=0)
    right = evaluation.correctness(rollouts, prompts, Letters(), lambda _: GradingRule(), allow_code=False)
    np.testing.assert_array_equal(right, [[0], [np.nan]])


def test_an_answer_whose_program_could_not_run_is_not_wrong(monkeypatch, caplog):
    unrun = Grade(False, "a program could not be started", given_up=True, unrun=True)
    monkeypatch.setattr(evaluation, "grades", lambda *_, **__: [Grade(True), unrun])
    with pytest.raises(SandboxError, match="of 2 answers 1 cannot be graded: a program could not be started"):
        evaluation.answer_suite(Says(["ab", "ab"]), suite(), problems("ab", "ab"), Letters(), seed=0)
    right = evaluation.correctness([], problems("a", "b"), Letters(), lambda _: GradingRule(), allow_code=True)
    np.testing.assert_array_equal(right, [[1], [np.nan]])
    assert "1 of 2 answers count neither as right nor as wrong: a program could not be started" in caplog.text
