"""Grade many responses, several at a time, each within its time: one response that hangs costs its own point only.

What takes a bounded time is graded in place. Mathematics and regular expressions go to worker processes, which are
ended and replaced when they exceed their time; programs go to ``evaluate.sandbox``.

Not on pebble's ``ProcessPool``: its workers import the main module of whoever uses it again (a trainer's, seconds and
hundreds of MiB each time one is replaced), and one that hangs outlives a killed parent (docs/lab-notebook.md).
"""

from __future__ import annotations

import ast
import atexit
import json
import logging
import os
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeVar

from megatron_tropd.config.sections import CodeExecution
from megatron_tropd.data.line_process import LineProcess
from megatron_tropd.errors import ConfigError, DataError, SandboxError
from megatron_tropd.evaluate.code_tests import TYPING_PRELUDE, prelude_alone, read_code_reference
from megatron_tropd.evaluate.rules import (
    CODE,
    UNFINISHED,
    GradingRule,
    check_reference,
    extracted,
    grade,
    graded_part,
)
from megatron_tropd.evaluate.runners import source_without_runners
from megatron_tropd.evaluate.sandbox import (
    Outcome,
    SandboxLimits,
    SandboxTask,
    detect_isolation,
    hide_from_programs,
    run_program,
)
from megatron_tropd.progress.phases import Phase

logger = logging.getLogger(__name__)

_BOUNDED = ("final_number", "exact", "choice")
_START_S = 60.0  # a worker's first task: importing the mathematics takes seconds, on a busy machine many
_MOST_WORKERS = 8
_TRIES_AFTER_S = (0.0, 0.1, 1.0, 10.0)  # at a sandbox that cannot be set up: what others hold may come free
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One response and what it is graded by."""

    rule: GradingRule
    response: str
    answer: str  # reference


@dataclass(frozen=True, slots=True)
class Grade:
    """``note`` says why a response could not be graded, or why a program failed; empty otherwise."""

    correct: bool
    note: str = ""
    timed_out: bool = False
    bad_reference: bool = False
    given_up: bool = False  # the grader had no answer in time, so that nobody knows; a program out of time is wrong
    unrun: bool = False  # nobody knows, as the program could not be run here; it is given up, too


class GraderPool:
    """Grade with up to ``workers`` processes, started when first needed and ended by ``close`` or with this process.

    Args:
        allow_code: programs are run only when whoever started us has said so.
    """

    def __init__(self, *, workers: int | None = None, allow_code: CodeExecution = False) -> None:
        self._count = workers or _workers()
        self._allow_code = allow_code
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for _ in range(self._count):
            self._idle.put(_Worker())
        self._unrun = False  # the last program could not be started
        self._probed: dict[str, str] = {}  # by tests of programs: why they are of no use, empty when they are

    def grade(self, items: Sequence[Item]) -> list[Grade]:
        """Grade many responses; one grade per item, in their order.

        Raises:
            ConfigError: a program is to be run and that is not allowed, or not possible here; or a rule is unknown.
        """
        if any(item.rule.kind == CODE for item in items):
            check_code_allowed(self._allow_code)
        for pattern in {item.rule.extract for item in items}:
            extracted("", pattern)  # refuses what is no regular expression
        slow = [number for number, item in enumerate(items) if _is_slow(item.rule)]
        grades = {number: _grade_in_place(items[number]) for number in set(range(len(items))) - set(slow)}
        grades.update(zip(slow, self._map(self._grade_slowly, [items[i] for i in slow]), strict=True))
        return [grades[number] for number in range(len(items))]

    def check(self, rule: GradingRule, references: Sequence[str]) -> list[str]:
        """Say why each reference cannot be graded against; empty where it can.

        The tests of programs are run after programs that must not pass.

        Raises:
            ConfigError: programs are to be run and that is not allowed, or not possible here.
            SandboxError: one could not be run.
        """
        if rule.kind == CODE:
            check_code_allowed(self._allow_code)
        items = [Item(rule=rule, response="", answer=reference) for reference in references]
        check = self._check_slowly if rule.kind in (CODE, "math", "regex") else _check_in_place
        return self._map(check, items) if check == self._check_slowly else list(map(check, items))

    def _map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Apply a function to items, several at a time."""
        with ThreadPoolExecutor(max_workers=self._count) as threads, Phase("graded", total=len(items)) as phase:
            return list(phase.watch(threads.map(function, items)))

    def close(self) -> None:
        """End the workers."""
        for _ in range(self._count):
            worker = self._idle.get()
            worker.end()
            self._idle.put(worker)

    def _grade_slowly(self, item: Item) -> Grade:
        if item.rule.kind != CODE:
            return self._ask(item, "grade")[0]
        found, program = self._ask(item, "program")
        if not found.correct:
            return found
        try:
            outcome = self._run(_tests_of(item, program), item.rule)
            grade = Grade(outcome.ok, outcome.reason, timed_out=outcome.timed_out)
            # tests are believed once they have failed
            useless = self._check_slowly(item) if grade.correct else ""
        except SandboxError as error:
            return Grade(False, str(error), given_up=True, unrun=True)
        return Grade(False, useless, bad_reference=True) if useless else grade

    def _check_slowly(self, item: Item) -> str:
        if item.rule.kind != CODE:
            return self._ask(item, "check")[0].note
        if item.answer not in self._probed:
            self._probed[item.answer] = _check_in_place(item) or self._probe_tests(item)
        return self._probed[item.answer]

    def _probe_tests(self, item: Item) -> str:
        """Run tests after programs that must not pass; say which did."""
        reference = read_code_reference(item.answer)
        if not reference.probes:
            return ""
        prelude = TYPING_PRELUDE + _imports_of(reference.prelude)
        task = SandboxTask(program="", prelude=prelude, tests=reference.tests, probes=reference.probes)
        outcome = self._run(task, item.rule)
        if outcome.ok or outcome.timed_out:
            return ""
        return f"the tests {item.answer[:80]!r} would let every program pass: {outcome.reason}."

    def _run(self, task: SandboxTask, rule: GradingRule) -> Outcome:
        """Run a program, trying again where it cannot be started.

        Raises:
            SandboxError: it never could.
        """
        limits = replace(SandboxLimits(), seconds=rule.seconds, cpu_seconds=max(1, int(rule.seconds)))
        # where one has been waited for in vain, the others of a batch are not
        for pause_s in (0.0,) if self._unrun else _TRIES_AFTER_S:
            time.sleep(pause_s)
            outcome = run_program(task, limits=limits)
            if not outcome.unrun:
                self._unrun = False
                return outcome
        self._unrun = True
        raise SandboxError(
            f"a program of a model could not be started ({outcome.reason}), so that nobody knows whether it is right. "
            "Look at what this machine is short of (ulimit -u, df, free, /proc/sys/user), and start again."
        )

    def _ask(self, item: Item, what: str) -> tuple[Grade, str]:
        worker = self._idle.get()
        try:
            return worker.ask(item, what)
        finally:
            self._idle.put(worker)


def check_code_allowed(allowed: CodeExecution) -> None:
    """Raise ConfigError unless programs may be run, and can be kept from this machine; hide this process from them.

    Where they cannot, ``allowed`` must be "unconfined", and one warning says what they are not kept from.
    """
    if not allowed:
        raise ConfigError(
            "the grader 'code' runs programs that a model wrote, which is not allowed here. To allow it, set "
            "evaluate.allow_code_execution=true or give --allow-code-execution."
        )
    isolation = detect_isolation()
    if not isolation.namespaces and allowed != "unconfined":
        raise ConfigError(
            f"this machine gives a program of a model no namespaces of its own ({isolation.reason}): it could "
            f"{', '.join(isolation.missing)}. Install bubblewrap, allow user namespaces, or evaluate elsewhere. "
            "evaluate.sandbox=none (or --sandbox none) runs programs here all the same: then nothing that this user "
            "may do is kept from them."
        )
    hide_from_programs()
    _warn_of_missing_isolation()


@lru_cache(maxsize=2)
def shared_pool(allow_code: CodeExecution = False) -> GraderPool:
    """Return the pool of this process; its workers end with it."""
    pool = GraderPool(allow_code=allow_code)
    atexit.register(pool.close)
    return pool


def _workers() -> int:
    """Count the workers to start: one per core, shared with the other ranks of this machine."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MOST_WORKERS, len(os.sched_getaffinity(0)) // ranks))


def _is_slow(rule: GradingRule) -> bool:
    return rule.kind not in _BOUNDED or rule.extract is not None


def _grade_in_place(item: Item) -> Grade:
    try:
        correct = grade(item.rule.kind, item.response, item.answer)
    except DataError as error:
        return Grade(False, str(error), bad_reference=True)
    return Grade(correct, "" if correct or graded_part(item.response) is not None else UNFINISHED)


def _check_in_place(item: Item) -> str:
    try:
        check_reference(item.rule.kind, item.answer)
    except DataError as error:
        return str(error)
    return ""


@lru_cache(maxsize=1)
def _warn_of_missing_isolation() -> None:
    missing = detect_isolation().missing
    if missing:
        logger.warning(
            "programs of a model run here with limits alone: they can %s. Evaluate on a machine that may be lost",
            "; ".join(missing),
        )


def _tests_of(item: Item, program: str) -> SandboxTask:
    """Return the program of a response and what proves it right."""
    reference = read_code_reference(item.answer)
    prelude = TYPING_PRELUDE + prelude_alone(reference.prelude)
    # a script may end as it likes; what tests follow must not end the process
    program = program if reference.cases else source_without_runners(program)
    return SandboxTask(program=program, prelude=prelude, tests=reference.tests, cases=reference.cases)


def _imports_of(prelude: str) -> str:
    """Return the imports of a prelude: its unfinished functions do not stand for an answer."""
    tree = ast.parse(prelude_alone(prelude))
    return "\n".join(ast.unparse(node) for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom))


# --------------------------------------------------------------------------- workers


class _Worker:
    """A process that runs ``grader_worker``, replaced after it had to be ended."""

    def __init__(self) -> None:
        self._process = LineProcess("megatron_tropd.evaluate.grader_worker", environment={"OPENBLAS_NUM_THREADS": "1"})

    def ask(self, item: Item, what: str) -> tuple[Grade, str]:
        """Have a response graded, its reference checked, or its program found, which is returned, too."""
        started = time.monotonic()
        reply = self._try(item, what)
        if reply is None and time.monotonic() - started < item.rule.seconds:
            reply = self._try(item, what)  # it did not take long: the worker had died of something else
        if reply is None:
            note = f"grading took longer than {item.rule.seconds:g} s, or too much memory"
            return Grade(False, note, timed_out=True, given_up=True), ""
        bad = reply.get("bad_reference", "")
        return Grade(reply["correct"], bad or reply.get("note", ""), bad_reference=bool(bad)), reply.get("program", "")

    def _try(self, item: Item, what: str) -> dict[str, Any] | None:
        # its own limits first; what they cannot interrupt, its watchdog; and in the end we
        patience = item.rule.seconds + 3.0 + (0.0 if self._process.is_running() else _START_S)
        task = {
            "do": what,
            "kind": item.rule.kind,
            "extract": item.rule.extract,
            "blocks": item.rule.blocks,
            "seconds": item.rule.seconds,
            "response": item.response,
            "answer": item.answer,
        }
        self._process.start()
        return self._process.exchange(json.dumps(task).encode() + b"\n", patience)

    def end(self) -> None:
        """End the process, if there is one."""
        self._process.end()
