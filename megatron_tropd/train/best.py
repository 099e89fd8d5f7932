"""Which weights of a run answer best, by one suite, and how long there has been no gain."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from megatron_tropd.config.sections import SuiteConfig
from megatron_tropd.report.records import AFTER, DURING, Evaluation


def deciding_suite(suites: Sequence[SuiteConfig], named: str | None) -> str | None:
    """Name the suite that decides: the one named, else the first that samples, else the first; None without any."""
    if named is not None or not suites:
        return named
    return next((suite.name for suite in suites if suite.temperature > 0), suites[0].name)


class BestSoFar:
    """The evaluations of a run's own weights, by one suite. Equal on every rank that is told the same."""

    def __init__(self, suite: str | None, earlier: Iterable[Evaluation] = ()) -> None:
        """Take up what a run that resumes has measured ``earlier``."""
        self._suite = suite
        self._accuracy: dict[int, float] = {}
        for one in earlier:
            self._note(one)

    def add(self, evaluations: Iterable[Evaluation]) -> bool:
        """Note the results of the newest weights; say whether these are better than all before, of trained ones."""
        before = self.step
        for one in evaluations:
            self._note(one)
        return self.step != before

    @property
    def step(self) -> int | None:
        """Return after how many steps the weights were best, the first of equals; None before any evaluation."""
        best = max(self._accuracy.values(), default=None)
        return min((step for step, value in self._accuracy.items() if value == best), default=None)

    @property
    def without_gain(self) -> int:
        """Count the evaluations since the best one."""
        best = self.step
        return 0 if best is None else sum(step > best for step in self._accuracy)

    def _note(self, one: Evaluation) -> None:
        if one.suite == self._suite and one.model in (DURING, AFTER) and one.step:
            self._accuracy[one.step] = one.accuracy
