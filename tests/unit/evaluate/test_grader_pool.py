"""Many responses graded within their time: a hanging one costs its own point, a program runs only when allowed."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time

import psutil
import pytest

from megatron_tropd.errors import ConfigError, SandboxError
from megatron_tropd.evaluate import grader_pool
from megatron_tropd.evaluate.grader_pool import GraderPool, Item
from megatron_tropd.evaluate.rules import GradingRule
from megatron_tropd.evaluate.sandbox import Outcome


def items(*rows: tuple[str, str, str], **options: object) -> list[Item]:
    return [
        Item(rule=GradingRule(kind=kind, **options), response=response, answer=answer)
        for kind, response, answer in rows
    ]


@pytest.fixture(scope="module")
def pool():
    pool = GraderPool(workers=2, allow_code=True)
    yield pool
    pool.close()
    assert not [p for p in psutil.Process().children() if "grader_worker" in " ".join(p.cmdline())]


def test_every_kind_is_graded_in_the_order_given(pool):
    rows = [
        ("math", r"so \boxed{\frac{1}{2}}", "0.5"),
        ("exact", "no", "yes"),
        ("regex", "it is 42!", r"\b42\b"),
        ("math", r"\boxed{3}", "4"),
        ("final_number", "#### 7", "7"),
        ("choice", "The answer is (C).", "C"),
        ("code", "```python\ndef f(x):\n    return x + 1\n```", "assert f(1) == 2"),
        ("code", "def f(x): return x", "assert f(1) == 2"),
    ]
    right = [grade.correct for grade in pool.grade(items(*rows))]
    assert right == [True, False, True, False, True, True, True, False]
    assert pool.grade([]) == []


def test_extraction_takes_the_last_match_before_grading(pool):
    pattern = r"(?m)^Answer: (.+)$"
    rows = [("exact", "Answer: 3\nno,\nAnswer: 4", "4"), ("exact", "4", "4"), ("math", "Answer: $\\frac12$", "0.5")]
    assert [grade.correct for grade in pool.grade(items(*rows, extract=pattern))] == [True, False, True]
    tagged = ("code", "<answer>x = 1</answer>\n```python\nx = 2\n```", "assert x == 1")
    assert pool.grade(items(tagged, extract="(?s)<answer>(.*?)</answer>"))[0].correct
    with pytest.raises(ConfigError, match="is not a regular expression"):
        pool.grade(items(*rows, extract="("))


def test_a_response_that_hangs_is_wrong_and_the_others_are_not(pool):
    pool.grade(items(("math", "1", "1"), ("math", "1", "1")))  # both workers are there
    hanging = ("regex", "a" * 60 + "b", "(a+)+c|(a|a)+$")  # exponential, in C code that no signal interrupts
    right = ("regex", "aaa", "a{3}")
    started = time.monotonic()
    patient = items(right, right, right, seconds=60)
    grades = pool.grade([patient[0], *items(hanging, seconds=1.0), *patient[1:]])
    assert time.monotonic() - started < 30
    assert [(grade.correct, grade.timed_out) for grade in grades] == [
        (True, False), (False, True), (True, False), (True, False),
    ]  # fmt: skip
    assert "took longer than 1 s" in grades[1].note
    (endless,) = pool.grade(items(("code", "while True: pass", "assert f"), seconds=1.0))
    assert not endless.correct and endless.timed_out


def test_a_number_too_large_to_write_down_does_not_stop_the_others(pool):
    huge, right = ("math", r"\boxed{9^{9^{9^{9}}}}", "1"), ("math", r"\boxed{1}", "1")
    grades = pool.grade([*items(huge, seconds=2.0), *items(right, seconds=60)])
    assert [grade.correct for grade in grades] == [False, True]


def test_a_worker_that_dies_is_replaced(pool):
    pool.grade(items(("math", "1", "1"), ("math", "1", "1")))
    for process in psutil.Process().children():
        if "grader_worker" in " ".join(process.cmdline()):
            os.kill(process.pid, signal.SIGKILL)
    assert [grade.correct for grade in pool.grade(items(*[("math", "$2$", "2")] * 4))] == [True] * 4


def test_a_worker_that_dies_between_the_look_at_it_and_the_task_is_replaced():
    pool, before = GraderPool(workers=1), psutil.Process().children()
    right = items(("regex", "aaa", "a{3}"), seconds=60)
    try:
        assert pool.grade(right)[0].correct
        (process,) = set(psutil.Process().children()) - set(before)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has been told
        poll, asked = subprocess.Popen.poll, []

        def told_late(popen):
            if popen.pid == process.pid and len(asked) < 2:  # for its time limit, and before the task is written
                asked.append(popen)
                return None
            return poll(popen)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(subprocess.Popen, "poll", told_late)
            assert pool.grade(right)[0].correct and len(asked) == 2
    finally:
        pool.close()


def test_a_worker_that_no_longer_answers_is_ended_before_the_next_response():
    pool, before = GraderPool(workers=1), psutil.Process().children()
    right, wrong = ("regex", "aaa", "a{3}"), ("regex", "aaa", "b")
    try:
        assert [grade.correct for grade in pool.grade(items(right, seconds=60))] == [True]
        (process,) = set(psutil.Process().children()) - set(before)
        process.suspend()
        first, second = pool.grade([*items(wrong, seconds=0.5), *items(right, seconds=60)])
        # its late answer to the first would have been taken for one to the second
        assert first.timed_out and second.correct and not process.is_running()
    finally:
        pool.close()


def test_ranks_of_a_machine_share_its_cores_between_their_workers(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    for ranks, workers in ((1, 8), (3, 4), (64, 1)):  # 8 at most
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert GraderPool()._count == workers


def test_references_that_cannot_be_used_are_said_not_raised(pool):
    grades = pool.grade(items(("final_number", "#### 7", "seven"), ("math", "7", ""), ("choice", "A", "K")))
    assert not any(grade.correct for grade in grades) and all(grade.bad_reference for grade in grades)
    assert "'seven' is not a number" in grades[0].note and "math-verify can read" in grades[1].note


def test_grading_works_off_the_main_thread(pool):
    results: list[bool] = []
    rows = items(("math", r"\boxed{\frac{1}{2}}", "0.5"))
    thread = threading.Thread(target=lambda: results.append(pool.grade(rows)[0].correct))
    thread.start()
    thread.join()
    assert results == [True]


# --------------------------------------------------------------------------- sandboxes that cannot be set up

RIGHT = ("code", "def f(): return 1", "assert f() == 1")
UNRUN = Outcome(ok=False, reason="sandbox: no processes left", unrun=True)


@pytest.fixture
def sandboxes(monkeypatch):
    """What sandboxes do in their order, the last one for ever; the programs that were given to them."""
    outcomes, given = [UNRUN], []

    def run(task, *, limits):
        given.append(task)
        return outcomes.pop(0) if len(outcomes) > 1 else outcomes[0]

    monkeypatch.setattr(grader_pool, "run_program", run)
    monkeypatch.setattr(grader_pool, "check_code_allowed", lambda allowed: None)
    monkeypatch.setattr(grader_pool, "_TRIES_AFTER_S", (0.0, 0.0, 0.0))
    return outcomes, given


def test_a_sandbox_that_cannot_be_set_up_is_tried_again_and_then_no_answer_is_wrong(pool, sandboxes):
    outcomes, given = sandboxes
    grades = pool.grade(items(RIGHT))
    assert len(given) == 3
    assert [(g.correct, g.unrun, g.given_up, g.bad_reference, g.timed_out) for g in grades] == [
        (False, True, True, False, False)
    ]
    assert "could not be started (sandbox: no processes left)" in grades[0].note
    assert pool.grade(items(RIGHT))[0].unrun and len(given) == 4  # where one has waited in vain, others do not
    outcomes[:] = [UNRUN, Outcome(ok=True)]
    pool._unrun = False
    assert pool.grade(items(RIGHT))[0].correct


def test_tests_that_could_not_be_tried_are_neither_good_nor_bad(pool, sandboxes):
    outcomes, _ = sandboxes
    reference = "assert f() == 2"
    with pytest.raises(SandboxError, match="nobody knows whether it is right"):
        pool.check(GradingRule(kind="code"), [reference])
    outcomes[:] = [Outcome(ok=True)]
    assert pool.check(GradingRule(kind="code"), [reference]) == [""]


def test_programs_run_only_where_that_is_allowed():
    with pytest.raises(ConfigError, match=r"which is not allowed here. To allow it, set evaluate.allow_code_execution"):
        GraderPool(workers=1).grade(items(("code", "pass", "pass")))
